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


@dataclass(frozen=True)
class Truth:
    """The true tokens of some renderings, found once for many questions to a model."""

    tokens: tuple[Tensor, ...]
    """[rows] of each sample."""
    is_content: tuple[Tensor, ...]
    """[rows] of each sample: false for end-of-sequence tokens and for tokens without a row of the head."""

    @classmethod
    def of(cls, subject: Subject, renderings: Sequence[Rendering]) -> "Truth":
        """Return the true tokens of renderings."""
        special = torch.tensor(sorted(subject.renderer.tokenizer.all_special_ids))
        tokens = tuple(map(targets, renderings))
        return cls(tokens, tuple(~torch.isin(each, special) & (each < len(subject.head)) for each in tokens))

    def right(self, subject: Subject, hidden: Sequence[Tensor]) -> Tensor:
        """Return what `right` does for hidden states of the renderings; no distribution is kept."""
        rows, tokens = self.content(hidden)
        pairs = zip(subject.each_logits(rows), tokens, strict=True)
        found = [logits.softmax(-1).gather(1, each.to(logits.device)[:, None]).mean() for logits, each in pairs]
        return torch.stack(found).cpu()

    def content(self, hidden: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the hidden states and the true tokens of each sample's content rows."""
        rows, tokens = [], []
        for states, ids, is_content in zip(hidden, self.tokens, self.is_content, strict=True):
            kept = is_content[: len(states)]
            rows.append(states[: len(kept)][kept])
            tokens.append(ids[: len(kept)][kept])
        return rows, tokens


def answers_of(subject: Subject, renderings: Sequence[Rendering], hidden: Sequence[Tensor]) -> list[Answers]:
    """Return the answers of each rendering, from its hidden states."""
    rows, tokens = Truth.of(subject, renderings).content(hidden)
    pairs = zip(subject.each_logits(rows), tokens, strict=True)
    return [Answers(logits.softmax(-1).cpu(), each) for logits, each in pairs]


def right(answers: Sequence[Answers]) -> Tensor:
    """Return each sample's mean probability of its true tokens [samples]; NaN for a sample without content rows."""
    return torch.stack([each.right for each in answers])
