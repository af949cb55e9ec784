"""Answer rows → energies per row and the gradient of one scalar, chunk by chunk.

The weights of a batch are known before its losses (see `weighting`). Therefore the forward pass also computes the
gradient with respect to the logits: it overwrites them, and logits of only one chunk of rows exist at a time, whatever
the size of the batch. All energies of a job share one computation of the teacher's and the student's logits.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from betakd_ray.energies.block import Channels, RowResult, TopK, blocks, rest_of
from betakd_ray.energies.closed_form import Pair, Result, is_known, through_autograd
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
CHUNK_BYTES = 2**27
"""Bytes of the logits of one chunk, for each side. Fewer chunks are fewer passes over the head's gradient."""
LEAST_CHUNK = 64
"""Smallest number of rows in a chunk that the byte limit leads to; matrix products with fewer rows are slow."""
RowEnergy = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""Function of (teacher_logits [rows, vocab], student_logits [rows, vocab], `moving`: channel → number []) → [rows]."""


def project(
    rows: Float[Tensor, "rows width"],
    weight: Float[Tensor, "vocab width"],
    out: Float[Tensor, "rows vocab"] | None = None,
) -> Float[Tensor, "rows vocab"]:
    """Return logits in float32 (or float64 for float64 rows), without rounding them to bfloat16 first.

    With logits rounded to bfloat16, a small KL would lose its gradient. They are in `out` if it is given.
    """
    if _has_tensor_cores(rows):
        return torch.mm(rows, weight.t(), out_dtype=torch.float32)
    dtype = torch.promote_types(torch.float32, rows.dtype)
    return torch.mm(rows.to(dtype), weight.to(dtype).t(), out=out)


def _has_tensor_cores(rows: Tensor) -> bool:
    """Return whether matrix products take `rows` in half precision and give float32."""
    return rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16)


def _add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """Add a @ b to `total` in float32 without a second matrix; `is_first`: overwrite it, which saves making it zero."""
    beta = 0.0 if is_first else 1.0
    if _has_tensor_cores(b):
        torch.addmm(total, a.to(b.dtype), b, beta=beta, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a, b.to(total.dtype), beta=beta)


def top_k(
    logits: Float[Tensor, "rows vocab"], k: int
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"], Float[Tensor, "rows 1"]]:
    """Return the k largest logits of each row, their ids, and the log-sum-exp of the rest."""
    top, ids = logits.topk(k, dim=1)
    return top, ids, rest_of(logits, ids)


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


def row_result(energy: LogitsEnergy) -> RowResult:
    """Return the value and the derivatives of an energy, with the options that the spec gives. Raises SpecError."""
    function, options = load(energy.function, "objective.energies"), energy.options
    closed_form = getattr(function, "closed_form", None)

    def result(pair: Pair, moving: Mapping[str, Tensor], needs_gradient: bool) -> Result:
        at = {energy.moving: moving[energy.name]} if energy.moving else {}
        if closed_form is None:
            return through_autograd(function, pair, needs_gradient, **options, **at)
        return closed_form(pair, **options, **at)

    return result


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
        self.results = {energy.name: row_result(energy) for energy in self.energies}
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
        rows = _Rows(self, teacher, targets, row_weights, moving or {}, statistics)
        total, values = _ChunkedRows.apply(student_rows, self.lm_head.weight, self.lm_head.bias, rows)
        return RowLosses(total, values, rows.channels.moving_gradients)

    def chunk_size(self, rows: int, vocab: int, element_size: int) -> int:
        """Return the number of rows in a chunk; chunks are of equal size, so that none is small."""
        most = self.chunk_rows or max(LEAST_CHUNK, CHUNK_BYTES // (vocab * element_size))
        return math.ceil(rows / math.ceil(rows / most))

    def _has_logits(self, teacher: TeacherRows) -> bool:
        return teacher.top_ids is not None or (teacher.hidden is not None and self.teacher_head is not None)


class _Rows:
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
        is_compared = bool(objective.energies) or statistics  # else the teacher's features alone are of use
        self.teacher = teacher if is_compared and teacher is not None and objective._has_logits(teacher) else None
        self.targets = targets
        self.row_weights = row_weights
        # Detached: the objective returns gradients for these numbers and does not update them.
        moving = {name: value.detach() for name, value in moving.items()}
        learned = frozenset(energy.name for energy in objective.energies if energy.is_learned and energy.name in moving)
        gradients = {name: torch.zeros_like(moving[name]) for name in sorted(learned)}
        self.channels = Channels(objective.ce, objective.results, moving, learned, statistics, False, gradients)
        self.columns = row_weights.shape[1] + (len(objective.measures) if statistics else 0)
        # The row of an absent sample may hold NaN, and the zero of its gradient would not remove it: 0 · NaN is NaN.
        self.absent = (row_weights == 0).all(dim=1, keepdim=True)

    @property
    def vocab(self) -> int:
        """Return the number of ids of the side that has more."""
        head = self.objective.teacher_head
        return max(len(self.objective.lm_head.weight), 0 if head is None else len(head))

    def chunks(self, element_size: int) -> Iterator[slice]:
        """Yield the slices of the rows whose logits exist at a time."""
        if count := len(self.targets):
            size = self.objective.chunk_size(count, self.vocab, element_size)
            for start in range(0, count, size):
                yield slice(start, min(start + size, count))

    def compute(self, rows: slice, logits: Tensor, teacher: Tensor | None) -> Tensor:
        """Return the values [rows, columns] of one chunk, and overwrite `logits` with ∂total/∂logits if it is needed.

        `teacher` are the teacher's logits; None without, or with a top-k signal.
        """
        values = []
        for block in blocks(logits):
            at = slice(rows.start + block.start, min(rows.start + block.stop, rows.stop))
            theirs = self._top_k(at) if teacher is None else teacher[block]
            values.append(self.channels.compute(logits[block], theirs, self.targets[at], self.row_weights[at]))
        return torch.cat(values)

    def _top_k(self, rows: slice) -> TopK | None:
        if self.teacher is None or self.teacher.top_ids is None:
            return None
        assert self.teacher.top_log_probs is not None
        return TopK(self.teacher.top_ids[rows].long(), self.teacher.top_log_probs[rows], self.objective.top_k_vocab)


class _Buffers:
    """Memory for the logits of one chunk, which the next chunk uses again: fresh memory costs the CPU a page fault."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def project(self, name: str, rows: Tensor, weight: Tensor) -> Tensor:
        """Return the logits of `rows`, valid until the next call with this name."""
        if not is_known(rows):  # a GPU's allocator gives the same memory again by itself
            return project(rows, weight)
        dtype = torch.promote_types(torch.float32, rows.dtype)
        if name not in self._memory:
            self._memory[name] = rows.new_empty((len(rows), len(weight)), dtype=dtype)
        return project(rows, weight, self._memory[name][: len(rows)])


class _ChunkedRows(torch.autograd.Function):
    """Autograd function whose forward pass already computes the gradient; the backward pass only scales it."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, student_rows: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows
    ) -> tuple[Tensor, Tensor]:
        # With no channel on logits (`fd` alone, without CE) there is nothing to differentiate.
        learns = bool(rows.objective.channels)
        needs = [need and learns for need in ctx.needs_input_grad[:3]]
        rows.channels.needs_gradient = any(needs)
        gradients = _HeadGradients(student_rows, weight, bias, needs)
        dtype = torch.promote_types(torch.float32, student_rows.dtype)
        values = student_rows.new_zeros((len(student_rows), rows.columns), dtype=dtype)
        buffers = _Buffers()
        for chunk in rows.chunks(dtype.itemsize):
            logits = buffers.project("student", student_rows[chunk], weight)
            if bias is not None:
                logits += bias
            teacher = None
            if rows.teacher is not None and rows.teacher.top_ids is None:
                assert rows.teacher.hidden is not None
                assert rows.objective.teacher_head is not None
                teacher = buffers.project("teacher", rows.teacher.hidden[chunk], rows.objective.teacher_head)
            values[chunk] = rows.compute(chunk, logits, teacher)
            if any(needs):
                taking_part = student_rows[chunk].masked_fill(rows.absent[chunk], 0.0)
                gradients.add(chunk, logits, taking_part, weight)
        weights = rows.row_weights
        # A row with weight 0 may have an infinite value, and 0 · inf would make the sum NaN.
        total = torch.where(weights != 0, values[:, : weights.shape[1]] * weights, 0.0).sum().to(dtype)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(values)
        return total, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError("the objective's gradient was used already: call the objective again for another one")
        # Handed over, and not kept: so autograd takes them as they are, without a copy of the head's.
        gradients, ctx.gradients = ctx.gradients, None
        return *gradients.scaled(grad_total), None


class _HeadGradients:
    """Gradients of rows, head and bias, added up over chunks in at least float32; `scaled` rounds them once."""

    def __init__(self, rows: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> None:
        self.dtypes = rows.dtype, weight.dtype, None if bias is None else bias.dtype
        dtype = torch.promote_types(torch.float32, rows.dtype)
        # The first chunk overwrites them; without a chunk they have to be zero.
        make = torch.empty_like if len(rows) else torch.zeros_like
        self.rows = torch.zeros_like(rows) if needs[0] else None
        self.weight = make(weight, dtype=dtype) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if needs[2] and bias is not None else None

    def add(self, chunk: slice, gradient: Tensor, rows: Tensor, weight: Tensor) -> None:
        """Add what a chunk's gradient in the logits [rows, vocab] contributes.

        `rows` and `weight` are not kept until the backward pass: ZeRO-3 frees the weight before it.
        """
        if self.rows is not None:
            self.rows[chunk] = (gradient.to(weight.dtype) @ weight).to(self.rows.dtype)
        if self.weight is not None:
            _add_product(self.weight, gradient.t(), rows, is_first=chunk.start == 0)
        if self.bias is not None:
            self.bias += gradient.sum(0)

    def scaled(self, factor: Tensor) -> Iterator[Tensor | None]:
        """Yield each gradient times `factor`, in the dtype of what it belongs to. The result may be the same memory."""
        is_one = is_known(factor) and factor.item() == 1
        for gradient, dtype in zip((self.rows, self.weight, self.bias), self.dtypes, strict=True):
            yield None if gradient is None else (gradient if is_one else gradient.mul_(factor)).to(dtype)


def segment_mean(
    values: Float[Tensor, "rows columns"], segment: Int[Tensor, " rows"], counts: Int[Tensor, " segments"]
) -> Float[Tensor, "segments columns"]:
    """Return the mean of the rows of each segment; zero for an empty segment."""
    sums = values.new_zeros((counts.shape[0], values.shape[1])).index_add_(0, segment, values)
    return sums / counts.clamp_min(1)[:, None].to(values.dtype)
