"""What a teacher knows of the true answers: probabilities of their tokens, in a form that wrong labels do not upset.

Data may be wrong: in a job with half of its labels noisy the best teacher has a high loss. A loss is unbounded, so a
few wrong labels outweigh all others. A probability is not: the mean probability of the true token of an honest teacher
falls, but stays above that of any wrong setting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from betakd_ray.batch.sample import Rendering
from betakd_ray.check.subject import Subject, targets


@dataclass(frozen=True)
class Answers:
    """Content rows (no end-of-sequence tokens) of one sample: the distributions there, and the true tokens."""

    probabilities: Tensor
    """[rows, vocab]"""
    tokens: Tensor
    """[rows]"""

    @property
    def right(self) -> Tensor:
        """Return the mean probability of the true tokens; NaN without rows."""
        return self.probabilities.gather(1, self.tokens[:, None]).mean()

    def expected_gain(self, other: "Answers") -> Tensor:
        """Return by how much `right` would exceed that of `other` if these probabilities were the truth."""
        count = min(len(self.tokens), len(other.tokens))
        p, q = self.probabilities[:count], other.probabilities[:count]
        return (p * (p - q)).sum(-1).mean()


def answers_of(
    subject: Subject, renderings: Sequence[Rendering], hidden: Sequence[Tensor] | None = None
) -> list[Answers]:
    """Return the answers of each rendering; `hidden` has its hidden states, if they are known already."""
    special = torch.tensor(sorted(subject.renderer.tokenizer.all_special_ids))
    found = []
    for rendering, states in zip(renderings, hidden or subject.ask(renderings), strict=True):
        logits, wanted = subject.logits(states), targets(rendering)[: len(states)]
        is_content = ~torch.isin(wanted, special) & (wanted < logits.shape[1])
        found.append(Answers(logits[is_content].softmax(-1), wanted[is_content]))
    return found


def right(answers: Sequence[Answers]) -> Tensor:
    """Return each sample's mean probability of its true tokens [samples]; NaN for a sample without content rows."""
    return torch.stack([each.right for each in answers])
