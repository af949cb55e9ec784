"""Answer rows → energies per row and the gradient of one scalar: the only module with vocabulary-wide tensors.

The weights of a batch are known before its losses (see `weighting`). Therefore the forward pass also computes the
gradient with respect to the logits, chunk by chunk: logits of only `chunk_rows` rows exist at a time, whatever the size
of the batch. All energies of a job share one computation of the teacher's and the student's logits.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from betakd_ray.energies.rows import cross_entropy, entropy, matching_distance
from betakd_ray.errors import SpecError
from betakd_ray.plugins import load
from betakd_ray.spec import LogitsEnergy, ObjectiveSpec, PluginEnergy
from betakd_ray.weighting import CE

STATISTICS = ("student_entropy", "teacher_entropy", "matching_distance", "top1_agreement")
"""Names of statistics per row, averaged over samples like an energy (paper Figures 5, 6).

They are computed on logging steps only. All except the first need a teacher's logits.
"""

PROBE = (4, 11)
"""Rows and token ids of the random logits on which an energy from a user's module is tried."""
PROBE_TOLERANCE = 1e-5
RowEnergy = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""Function of (teacher_logits [rows, vocab], student_logits [rows, vocab], `moving`: channel → number []) → [rows]."""


def project(rows: Float[Tensor, "rows width"], weight: Float[Tensor, "vocab width"]) -> Float[Tensor, "rows vocab"]:
    """Return logits in float32 (or float64 for float64 rows), without rounding them to bfloat16 first.

    With logits rounded to bfloat16, a small KL would lose its gradient.
    """
    if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(rows, weight.t(), out_dtype=torch.float32)
    dtype = torch.promote_types(torch.float32, rows.dtype)
    return rows.to(dtype) @ weight.to(dtype).t()


def top_k(
    logits: Float[Tensor, "rows vocab"], k: int
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"], Float[Tensor, "rows 1"]]:
    """Return the k largest logits of each row, their ids, and the log-sum-exp of the rest."""
    top, ids = logits.topk(k, dim=1)
    return top, ids, rest_of(logits, ids)


def rest_of(logits: Float[Tensor, "rows vocab"], ids: Int[Tensor, "rows k"]) -> Float[Tensor, "rows 1"]:
    """Return the log-sum-exp of each row over all ids except `ids`."""
    # Not log(1 − Σ p): that loses all digits where the k largest hold almost all of the probability.
    return logits.scatter(1, ids, -math.inf).logsumexp(dim=1, keepdim=True)


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's output for each answer row: hidden states, the k largest probabilities, or both."""

    hidden: Float[Tensor, "rows teacher_width"] | None = None
    """Final hidden states of the teacher; the objective holds the teacher's head."""
    top_ids: Int[Tensor, "rows k"] | None = None
    top_log_probs: Float[Tensor, "rows buckets"] | None = None
    """Log-probabilities of the `top_ids`, then of all other ids together: buckets = k + 1."""


def energy_function(energy: LogitsEnergy) -> RowEnergy:
    """Return the function of an energy, with the options that the spec gives. Raises SpecError if it is not found."""
    function, options = load(energy.function, "objective.energies"), energy.options

    def value(teacher_logits: Tensor, student_logits: Tensor, moving: Mapping[str, Tensor]) -> Tensor:
        at = {energy.moving: moving[energy.name]} if energy.moving else {}
        return function(teacher_logits, student_logits, **options, **at)

    return value


def check_plugins(spec: ObjectiveSpec) -> None:
    """Call each energy from a user's module on a few rows. Raises SpecError if it breaks a rule of energies.

    The rules: one finite number per row, never negative, zero where the two agree, differentiable in the student.
    """
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, *PROBE, generator=generator)
    for energy in spec.energies:
        if isinstance(energy, PluginEnergy):
            try:
                broken = _broken_rule(energy_function(energy), teacher, student.requires_grad_())
            except SpecError:
                raise
            except Exception as error:  # the function is the user's
                broken = f"raises {type(error).__name__}: {error}"
            if broken:
                raise SpecError(f"objective.energies: {energy.function} with {energy.options}: {broken}")


def _broken_rule(function: RowEnergy, teacher: Tensor, student: Tensor) -> str | None:
    values = function(teacher, student, {})
    if not isinstance(values, Tensor) or values.shape != teacher.shape[:1]:
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        return f"returns {shape} for logits of {list(teacher.shape)}, but must return one number per row"
    if not values.isfinite().all() or (values < -PROBE_TOLERANCE).any():
        return f"returns {values.tolist()}, but an energy must be finite and never negative"
    if not values.requires_grad or not torch.autograd.grad(values.sum(), student)[0].isfinite().all():
        return "has no finite gradient with respect to the student's logits, so nothing could be learned"
    if (agreeing := function(teacher, teacher, {})).abs().max() > PROBE_TOLERANCE:
        return f"returns {agreeing.tolist()} where teacher and student agree, but a learned β needs zero there"
    return None


class RowLosses(NamedTuple):
    """Result of the objective for a micro-batch's answer rows."""

    total: Float[Tensor, ""]
    """Weighted sum, differentiable with respect to the student's rows and the lm_head."""
    values: Float[Tensor, "rows values"]
    """One column per channel, then one per name in `RowObjective.measures` if statistics were requested; detached."""
    moving_gradients: Mapping[str, Float[Tensor, ""]]
    """Channel → ∂total/∂(its learned number)."""


class RowObjective(nn.Module):
    """Energies on logits, for the answer rows of a micro-batch.

    It holds the student's lm_head, so that ZeRO-3, which gathers a module's parameters before its forward pass, gathers
    that head too. It also holds a frozen copy of the teacher's, `teacher_head` [V_t, H_t]. If the two vocabularies
    differ by padding, energies compare the common ids (with a top-k signal, the first `top_k_vocab` ids). The
    cross-entropy uses all ids of the student.
    """

    def __init__(
        self,
        spec: ObjectiveSpec,
        lm_head: nn.Linear,
        teacher_head: Float[Tensor, "vocab width"] | None,
        top_k_vocab: int = 0,
    ) -> None:
        super().__init__()
        self.energies = tuple(energy for energy in spec.energies if isinstance(energy, LogitsEnergy))
        self.channels = ((CE,) if spec.ce else ()) + tuple(energy.name for energy in self.energies)
        self.ce = spec.ce
        self.chunk_rows = spec.chunk_rows
        self.lm_head = lm_head
        self.functions = [energy_function(energy) for energy in self.energies]
        self.top_k_vocab = top_k_vocab
        self.measures = STATISTICS if teacher_head is not None or top_k_vocab else STATISTICS[:1]
        # Not a buffer: a buffer would be saved with the student and rounded to the student's precision.
        self.teacher_head = teacher_head

    def forward(
        self,
        student_rows: Float[Tensor, "rows width"],
        teacher: TeacherRows | None,
        targets: Int[Tensor, " rows"],
        row_weights: Float[Tensor, "rows channels"],
        *,
        moving: Mapping[str, Float[Tensor, ""]] | None = None,
        statistics: bool = False,
    ) -> RowLosses:
        """Return Σ_rows Σ_channels w · D, and D per row and channel.

        `moving` maps each stateful channel to its current number (see `curriculum`). `statistics` requests the columns
        of `measures` too. Raises ValueError if there are energies and no teacher rows.
        """
        if self.energies and not (teacher and self._has_logits(teacher)):
            raise ValueError(
                f"energies {self.channels} compare with a teacher: give its rows, and its head for hidden states"
            )
        chunks = _Chunks(self, teacher, targets, row_weights, moving or {}, statistics)
        total, values = _ChunkedRows.apply(student_rows, self.lm_head.weight, self.lm_head.bias, chunks)
        return RowLosses(total, values, chunks.moving_gradients)

    def compared(
        self, teacher: TeacherRows | None, rows: slice, student_logits: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return the teacher's and the student's logits of one chunk on the same ids; None without a teacher's logits.

        `student_logits` is [rows, V_s]. Both results are [rows, common ids]; with a top-k signal, they are
        [rows, k + 1]: the `top_ids`, and one bucket for all other ids.
        """
        if teacher is None or not self._has_logits(teacher):
            return None
        if teacher.top_ids is not None:
            assert teacher.top_log_probs is not None
            ids = teacher.top_ids[rows].long()
            student_logits = student_logits[:, : self.top_k_vocab or None]
            buckets = torch.cat([student_logits.gather(1, ids), rest_of(student_logits, ids)], dim=1)
            return teacher.top_log_probs[rows].to(buckets.dtype), buckets
        assert teacher.hidden is not None
        assert self.teacher_head is not None
        teacher_logits = project(teacher.hidden[rows], self.teacher_head)
        vocab = min(teacher_logits.shape[1], student_logits.shape[1])
        return teacher_logits[:, :vocab], student_logits[:, :vocab]

    def _has_logits(self, teacher: TeacherRows) -> bool:
        return teacher.top_ids is not None or (teacher.hidden is not None and self.teacher_head is not None)

    def values(
        self,
        compared: tuple[Tensor, Tensor] | None,
        student_logits: Tensor,
        targets: Tensor,
        moving: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """Return the values of each channel for one chunk: a list of [rows], in the order of `channels`.

        `compared` is the result of the method `compared`: two [rows, ids]. `student_logits` is [rows, V_s], `targets`
        is [rows].
        """
        values = [cross_entropy(student_logits, targets)] if self.ce else []
        if compared is not None:
            teacher_logits, student_logits = compared
            values += [function(teacher_logits, student_logits, moving) for function in self.functions]
        return values

    @staticmethod
    def statistics(compared: tuple[Tensor, Tensor] | None, student_logits: Tensor) -> list[Tensor]:
        """Return each of `measures` for one chunk: a list of [rows]; of the buckets with a top-k signal.

        `compared` is the result of the method `compared`: two [rows, ids]. `student_logits` is [rows, V_s].
        """
        if compared is None:
            return [entropy(student_logits)]
        teacher_logits, student_logits = compared
        agree = teacher_logits.argmax(1) == student_logits.argmax(1)
        return [
            entropy(student_logits),
            entropy(teacher_logits),
            matching_distance(teacher_logits, student_logits),
            agree.to(student_logits.dtype),
        ]


class _Chunks:
    """Inputs of a chunked pass that autograd does not track, and the computation of one chunk at a time."""

    def __init__(
        self,
        objective: RowObjective,
        teacher: TeacherRows | None,
        targets: Tensor,
        row_weights: Tensor,
        moving: Mapping[str, Tensor],
        statistics: bool,
    ) -> None:
        self.objective = objective
        self.teacher = teacher
        self.targets = targets
        self.row_weights = row_weights
        self.statistics = statistics
        # Detached: the objective returns gradients for these numbers and does not update them.
        learned = {energy.name for energy in objective.energies if energy.is_learned}
        self.moving = {name: value.detach().requires_grad_(name in learned) for name, value in moving.items()}
        self.learned = {name: value for name, value in self.moving.items() if value.requires_grad}
        self.moving_gradients = {name: torch.zeros_like(value) for name, value in self.learned.items()}

    def slices(self) -> Iterator[slice]:
        """Yield the slices of the rows, `chunk_rows` rows each; the last may be shorter."""
        for start in range(0, len(self.targets), self.objective.chunk_rows):
            yield slice(start, start + self.objective.chunk_rows)

    def values(self, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum [] and the detached values [rows, columns] of one chunk with `logits` [rows, V_s]."""
        compared = self.objective.compared(self.teacher, rows, logits)
        columns = self.objective.values(compared, logits, self.targets[rows], self.moving)
        values = torch.stack(columns, dim=1) if columns else logits.new_zeros((logits.shape[0], 0))
        weights = self.row_weights[rows]
        # A row with weight 0 may have an infinite value, and 0 · inf would make the sum NaN.
        total = torch.where(weights != 0, values * weights, 0.0).sum()
        values = values.detach()
        if self.statistics:
            with torch.no_grad():
                extra = torch.stack(self.objective.statistics(compared, logits), dim=1)
            values = torch.cat([values, extra.to(values.dtype)], dim=1)
        return total, values

    def gradient(self, rows: slice, total: Tensor, logits: Tensor) -> Tensor:
        """Return ∂total/∂logits [rows, V_s], and add the gradients of the learned numbers to `moving_gradients`."""
        gradient, *learned = torch.autograd.grad(total, [logits, *self.learned.values()], allow_unused=True)
        for name, part in zip(self.learned, learned, strict=True):
            if part is not None:
                self.moving_gradients[name] += part
        return gradient.masked_fill_(self.absent(rows), 0.0)

    def absent(self, rows: slice) -> Tensor:
        """Return whether all weights of a row are 0, [rows, 1].

        Such a row may not be finite, and 0 · NaN would make the gradient of the head NaN.
        """
        return (self.row_weights[rows] == 0).all(dim=1, keepdim=True)


class _ChunkedRows(torch.autograd.Function):
    """Autograd function whose forward pass already computes the gradient; the backward pass only scales it."""

    @staticmethod
    def forward(
        ctx: Any, student_rows: Tensor, weight: Tensor, bias: Tensor | None, chunks: _Chunks
    ) -> tuple[Tensor, Tensor]:
        # With no channel on logits (`fd` alone, without CE) there is nothing to differentiate.
        learns = bool(chunks.objective.channels)
        need_rows, need_weight, need_bias = (need and learns for need in ctx.needs_input_grad[:3])
        dtype = torch.promote_types(torch.float32, student_rows.dtype)
        grad_rows = torch.zeros_like(student_rows) if need_rows else None
        # At least float32, because it is a sum over chunks. `backward` rounds it once.
        grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if need_bias and bias is not None else None
        total = student_rows.new_zeros((), dtype=dtype)
        values = []
        for rows in chunks.slices():
            logits = project(student_rows[rows], weight)
            if bias is not None:
                logits += bias
            # Autograd is off inside a Function's forward. It is enabled for one chunk's logits, so that the graph of
            # this chunk is freed before the next one starts.
            with torch.enable_grad():
                logits.requires_grad_(need_rows or need_weight or need_bias)
                chunk_total, chunk_values = chunks.values(rows, logits)
            total += chunk_total.detach()
            values.append(chunk_values)
            if not logits.requires_grad:
                continue
            grad = chunks.gradient(rows, chunk_total, logits)
            if grad_rows is not None:
                grad_rows[rows] = (grad.to(weight.dtype) @ weight).to(grad_rows.dtype)
            if grad_weight is not None:
                # An absent row may hold NaN, and the zero in `grad` would not remove it: 0 · NaN is NaN.
                taking_part = student_rows[rows].masked_fill(chunks.absent(rows), 0.0)
                grad_weight += project(grad.t().to(weight.dtype), taking_part.t())
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(grad_rows, grad_weight, grad_bias)
        ctx.dtypes = (student_rows.dtype, weight.dtype, None if bias is None else bias.dtype)
        columns = chunks.row_weights.shape[1] + (len(chunks.objective.measures) if chunks.statistics else 0)
        result = torch.cat(values) if values else total.new_zeros((0, columns))
        ctx.mark_non_differentiable(result)
        return total, result

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_rows, grad_weight, grad_bias = (
            None if grad is None else (grad * grad_total).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return grad_rows, grad_weight, grad_bias, None


def segment_mean(
    values: Float[Tensor, "rows columns"], segment: Int[Tensor, " rows"], counts: Int[Tensor, " segments"]
) -> Float[Tensor, "segments columns"]:
    """Return the mean of the rows of each segment; zero for an empty segment."""
    sums = values.new_zeros((counts.shape[0], values.shape[1])).index_add_(0, segment, values)
    return sums / counts.clamp_min(1)[:, None].to(values.dtype)
