"""Channels of an objective on one block of rows: their values, and the gradient of their weighted sum.

The gradient is written into the memory of the student's logits. All other tensors as wide as the vocabulary have the
rows of one block, so their number does not matter: on a CPU they stay in its cache, on a GPU they are a small part of
the logits of a chunk.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from betakd_ray.energies.closed_form import Gradient, Pair, Result, Side, is_known
from betakd_ray.energies.rows import entropy, matching_distance

BLOCK_BYTES = {"cpu": 2**22, "other": 2**25}
"""Bytes of one tensor of a block: several of them fit a core's cache, or a GPU has enough to do with each."""
RowResult = Callable[[Pair, Mapping[str, Tensor], bool], Result]
"""Function of (pair, `moving`: channel → number [], whether a gradient is needed)."""


@dataclass(frozen=True)
class TopK:
    """The teacher's k largest probabilities of each row, and one bucket for all other ids."""

    ids: Int[Tensor, "rows k"]
    log_probs: Float[Tensor, "rows buckets"]
    vocab: int
    """The student's first `vocab` ids are compared."""


def blocks(logits: Float[Tensor, "rows vocab"]) -> Iterator[slice]:
    """Yield the slices of the rows that are computed together."""
    row = logits.shape[1] * logits.element_size()
    size = max(1, BLOCK_BYTES["cpu" if is_known(logits) else "other"] // row)
    for start in range(0, len(logits), size):
        yield slice(start, start + size)


def rest_of(logits: Float[Tensor, "rows vocab"], ids: Int[Tensor, "rows k"]) -> Float[Tensor, "rows 1"]:
    """Return the log-sum-exp of each row over all ids except `ids`."""
    # Not log(1 − Σ p): that loses all digits where the k largest hold almost all of the probability.
    return logits.scatter(1, ids, -math.inf).logsumexp(dim=1, keepdim=True)


@dataclass
class Channels:
    """Cross-entropy and energies of an objective, for all blocks of a micro-batch."""

    ce: bool
    energies: Mapping[str, RowResult]
    """Channel → its function, in the order of the columns."""
    moving: Mapping[str, Tensor]
    learned: frozenset[str]
    """Channels whose moving number is learned."""
    statistics: bool
    needs_gradient: bool
    moving_gradients: dict[str, Tensor] = field(default_factory=dict)
    """Channel → ∂total/∂(its learned number), added up over the blocks."""

    def compute(
        self,
        logits: Float[Tensor, "rows vocab"],
        teacher: Float[Tensor, "rows teacher_vocab"] | TopK | None,
        targets: Int[Tensor, " rows"],
        weights: Float[Tensor, "rows channels"],
    ) -> Float[Tensor, "rows columns"]:
        """Return the value of each channel and statistic, and overwrite `logits` with the gradient, if it is needed."""
        student, weights = Side(logits), weights.to(logits.dtype)
        compared = _compared(student, teacher)
        hard = Gradient(student)
        # With one vocabulary on both sides, one softmax is behind the cross-entropy and the energies.
        soft = hard if compared is None or compared.student is student else Gradient(compared.student)
        columns = []
        if self.ce:
            columns.append(-student.log_probs().gather(1, targets.long()[:, None])[:, 0])
            hard.add_cross_entropy(targets, weights[:, 0])
        if compared is not None:
            for at, name in enumerate(self.energies, len(columns)):
                columns.append(self._add_energy(name, compared, soft, weights[:, at]))
        if self.statistics:
            columns += _statistics(compared, student)
        values = torch.stack(columns, dim=1) if columns else logits.new_zeros((len(logits), 0))
        if self.needs_gradient:
            _write(hard, soft, teacher, logits)
            _clear_absent(logits, weights)
        return values

    def _add_energy(self, name: str, pair: Pair, gradient: Gradient, weights: Tensor) -> Tensor:
        """Return the values of an energy, and add what it contributes to the gradients."""
        result = self.energies[name](pair, self.moving, self.needs_gradient)
        if self.needs_gradient:
            gradient.add(result.student(), weights)
            if name in self.learned and result.moving is not None:
                part = torch.where(weights != 0, weights * result.moving(), 0.0).sum()
                self.moving_gradients[name] += part.to(self.moving_gradients[name].dtype)
        return result.value


def _compared(student: Side, teacher: Tensor | TopK | None) -> Pair | None:
    """Return both sides on the same ids, or in the same buckets."""
    if isinstance(teacher, TopK):
        logits = student.logits[:, : teacher.vocab or None]
        buckets = torch.cat([logits.gather(1, teacher.ids), rest_of(logits, teacher.ids)], dim=1)
        return Pair(Side(teacher.log_probs.to(buckets.dtype)), Side(buckets))
    if teacher is None:
        return None
    vocab = min(teacher.shape[1], student.logits.shape[1])
    same = vocab == student.logits.shape[1]
    return Pair(Side(teacher[:, :vocab]), student if same else Side(student.logits[:, :vocab]))


def _write(hard: Gradient, soft: Gradient, teacher: Tensor | TopK | None, out: Tensor) -> None:
    """Overwrite `out`, the student's logits, with the sum of the gradients of cross-entropy and energies."""
    if soft is hard:
        hard.write(out)
        return
    # Before `out` is overwritten, because the energies' gradient is made from the logits.
    part = soft.write(torch.empty_like(soft.side.logits))
    if isinstance(teacher, TopK):
        part = _of_ids(part, soft.side.logits[:, -1:], teacher, out)
    hard.write(out)
    out[:, : part.shape[1]] += part


def _of_ids(
    of_buckets: Float[Tensor, "rows buckets"], rest: Float[Tensor, "rows 1"], teacher: TopK, logits: Tensor
) -> Float[Tensor, "rows ids"]:
    """Return the gradient in the ids from that in the buckets: the rest's is shared out by ∂rest/∂z = exp(z − rest)."""
    # If nothing but the k ids is left, `rest` is −inf, and −inf − (−inf) would be NaN.
    rest = rest.clamp_min(torch.finfo(rest.dtype).min)
    part = (logits[:, : teacher.vocab or None] - rest).exp_().mul_(of_buckets[:, -1:])
    return part.scatter_(1, teacher.ids, of_buckets[:, :-1])


def _clear_absent(gradient: Tensor, weights: Tensor) -> None:
    """Overwrite the gradient of rows whose weights are all 0 with 0.

    Such a row may not be finite, and 0 · NaN would make the gradient of the head NaN.
    """
    absent = (weights == 0).all(dim=1, keepdim=True)
    if not is_known(absent) or absent.any():
        gradient.masked_fill_(absent, 0.0)


def _statistics(compared: Pair | None, student: Side) -> Sequence[Tensor]:
    """Return each statistic of `objective.STATISTICS` that there is; of the buckets with a top-k signal."""
    if compared is None:
        return [entropy(student.logits)]
    teacher_logits, logits = compared.teacher.logits, compared.student.logits
    agree = teacher_logits.argmax(1) == logits.argmax(1)
    return [
        entropy(logits),
        entropy(teacher_logits),
        matching_distance(teacher_logits, logits),
        agree.to(logits.dtype),
    ]
