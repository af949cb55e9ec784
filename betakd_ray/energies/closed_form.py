"""Value and derivatives of an energy in closed form, without a graph of autograd.

An energy is a function of a `Pair`, the two rows' logits, and returns a `Result`. It states its derivative with respect
to the log-probabilities, because it is short there: a slope s(v) = ∂D/∂log q(v) gives the gradient in the logits

    ∂D/∂z_s(v) = ( s(v) − q(v) Σ_u s(u) ) / T_s.

`Gradient` adds up the slopes of all energies before it takes this last step, once per temperature. The
log-probabilities and probabilities are shared by all energies of a `Pair`.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from betakd_ray.energies.arithmetic import kept_logits, upcast

Temperature = Tensor | float
LARGEST = 1e18
"""Norm of logits up to which no softmax, at any sensible temperature, has a logarithm of −inf."""


def is_known(tensor: Tensor) -> bool:
    """Return whether the host may read a number of `tensor` at once.

    On a GPU it would wait for all that was launched before, and a fake tensor (`betakd plan`) has no numbers.
    """
    return type(tensor) is Tensor and tensor.device.type == "cpu"


class Side:
    """One side's logits [rows, vocab], and what the energies share of it at each temperature."""

    def __init__(self, logits: Float[Tensor, "rows vocab"]) -> None:
        self.logits = logits
        self._log_probs: dict[float | int, Tensor] = {}
        self._probs: dict[float | int, Tensor] = {}

    def log_probs(self, temperature: Temperature = 1.0) -> Float[Tensor, "rows vocab"]:
        """Return log softmax(z/T), which is shared: do not change it. Raises ValueError unless T > 0."""
        key = _key(temperature)
        if key not in self._log_probs:
            self._log_probs[key] = torch.log_softmax(_tempered(self.logits, temperature), dim=-1)
        return self._log_probs[key]

    def probs(self, temperature: Temperature = 1.0) -> Float[Tensor, "rows vocab"]:
        """Return softmax(z/T), which is shared: do not change it."""
        key = _key(temperature)
        if key not in self._probs:
            # From the logarithm on both sides, also where one of the two has no use for it: else they would differ by
            # rounding, and an energy would not be exactly zero at agreement.
            self._probs[key] = self.log_probs(temperature).exp()
        return self._probs[key]


def _key(temperature: Temperature) -> float | int:
    return id(temperature) if isinstance(temperature, Tensor) else float(temperature)


def _tempered(logits: Tensor, temperature: Temperature) -> Tensor:
    if isinstance(temperature, Tensor):  # not checked, because the check would wait for the device
        return logits / temperature
    if temperature <= 0:
        raise ValueError(f"a temperature is {temperature}, expected a positive number")
    return logits if temperature == 1.0 else logits / temperature


class Slope(NamedTuple):
    """Derivative of an energy on one side: factor · values = ∂D/∂log q, at a temperature."""

    values: Float[Tensor, "rows vocab"]
    """Shared with others: it is read, and never changed."""
    total: Float[Tensor, " rows"] | float
    """Σ_v values(v); known in closed form for most energies, which is exact and saves a pass over the vocabulary."""
    temperature: Temperature | None = 1.0
    """None: factor · values is the gradient in the logits themselves."""
    factor: Float[Tensor, " rows"] | Temperature = 1.0


class Result(NamedTuple):
    """Value of an energy, and its derivatives, which are computed when they are called."""

    value: Float[Tensor, " rows"]
    student: Callable[[], Slope]
    teacher: Callable[[], Slope]
    moving: Callable[[], Float[Tensor, " rows"]] | None = None
    """∂D/∂(the number that changes during a job), for energies that have one."""


class Pair:
    """Logits of teacher and student on the same ids, in one dtype of at least float32."""

    def __init__(self, teacher: Side, student: Side) -> None:
        self.teacher = teacher
        self.student = student

    @cached_property
    def is_finite(self) -> bool:
        """Return whether all logits are known to be finite, so that no product is 0 · inf and no id is masked out."""
        both = (self.teacher.logits, self.student.logits)
        return all(is_known(each) and torch.linalg.vector_norm(each).item() < LARGEST for each in both)

    def expectation(
        self, probs: Float[Tensor, "rows vocab"], values: Float[Tensor, "rows vocab"]
    ) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, " rows"]]:
        """Return probs(v) · values(v), with 0 · (anything) = 0, and the sum over v.

        A matrix product would follow TF32 and autocast settings and compute below float32.
        """
        terms = probs * values
        if not self.is_finite:
            terms.masked_fill_(probs == 0, 0.0)
        return terms, terms.sum(-1)

    @cached_property
    def kept(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Return both logits with zero at masked-out ids, their mask or None, and the number of other ids [rows, 1]."""
        teacher, student = self.teacher.logits, self.student.logits
        if self.is_finite:
            return teacher, student, None, teacher.new_full((teacher.shape[0], 1), teacher.shape[1])
        teacher, student, masked, size = kept_logits(teacher, student)
        return teacher, student, masked, size.to(teacher.dtype)


class _Sum(NamedTuple):
    """Weighted sum of the slopes at one temperature."""

    temperature: Temperature | None
    values: Tensor | None
    """None: zero everywhere, apart from targets that are added at the end."""
    total: Tensor


class Gradient:
    """Σ_k w_k ∂D_k/∂z on one side: slopes of one temperature are added up before its softmax is applied once."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self._sums: dict[float | int | None, _Sum] = {}
        self._targets: tuple[Tensor, Tensor] | None = None

    def add(self, slope: Slope, weights: Float[Tensor, " rows"]) -> None:
        """Add an energy's slope, times the weight of each row."""
        weights = weights * slope.factor
        key = None if slope.temperature is None else _key(slope.temperature)
        before, total = self._sums.get(key), weights * slope.total
        if before is None:
            self._sums[key] = _Sum(slope.temperature, slope.values * weights[:, None], total)
        elif before.values is None:
            self._sums[key] = _Sum(slope.temperature, slope.values * weights[:, None], before.total + total)
        else:
            before.values.addcmul_(slope.values, weights[:, None])
            self._sums[key] = before._replace(total=before.total + total)

    def add_cross_entropy(self, targets: Int[Tensor, " rows"], weights: Float[Tensor, " rows"]) -> None:
        """Add the cross-entropy −log q(y), whose slope is −1 at the target and 0 elsewhere. Call it once."""
        before = self._sums.get(1.0, _Sum(1.0, None, torch.zeros_like(weights)))
        self._sums[1.0] = before._replace(total=before.total - weights)
        self._targets = targets.long()[:, None], -weights[:, None]

    def write(self, out: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """Overwrite `out` with the gradient, and return it. `out` may be the side's logits."""
        # First, because they may be made from the logits.
        probs = {key: self.side.probs(each.temperature) for key, each in self._sums.items() if each.temperature}
        if not self._sums:
            return out.zero_()
        for at, (key, each) in enumerate(self._sums.items()):
            part = _projected(each, probs.get(key), None if at else out)
            if each.temperature is not None and key != 1.0:
                part /= each.temperature
            if at:
                out += part
        return out if self._targets is None else out.scatter_add_(1, *self._targets)


def _projected(slopes: _Sum, probs: Tensor | None, out: Tensor | None) -> Tensor:
    """Return values − probs · total, in `out` if it is given."""
    if probs is None:
        assert slopes.values is not None
        return slopes.values if out is None else out.copy_(slopes.values)
    if slopes.values is None:
        return torch.mul(probs, -slopes.total[:, None], out=out)
    return torch.addcmul(slopes.values, probs, slopes.total[:, None], value=-1, out=out)


ClosedForm = Callable[..., Result]
"""Function of (pair, **options)."""


def differentiable(closed_form: ClosedForm) -> Callable[..., Tensor]:
    """Return the energy as a function of (teacher_logits, student_logits, **options), for autograd.

    The objective uses its attribute `closed_form` instead.
    """

    def energy(teacher_logits: Tensor, student_logits: Tensor, **options: Any) -> Tensor:
        moving = next((name for name, option in options.items() if isinstance(option, Tensor)), None)
        return _Energy.apply(teacher_logits, student_logits, moving and options[moving], closed_form, options, moving)

    for name in ("__name__", "__qualname__", "__doc__", "__module__"):
        setattr(energy, name, getattr(closed_form, name))
    energy.closed_form = closed_form  # pyright: ignore[reportFunctionMemberAccess]
    return energy


class _Energy(torch.autograd.Function):
    """Autograd function of an energy; the forward pass computes what the backward pass multiplies."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        teacher_logits: Tensor,
        student_logits: Tensor,
        moving: Tensor | None,
        closed_form: ClosedForm,
        options: dict[str, Any],
        moving_name: str | None,
    ) -> Tensor:
        at = {moving_name: upcast(moving)[0]} if moving is not None else {}
        sides = [Side(logits) for logits in upcast(teacher_logits, student_logits)]
        result = closed_form(Pair(*sides), **{**options, **at})
        ones = torch.ones_like(result.value)
        gradients: list[Tensor | None] = []
        for side, slope, is_needed in zip(sides, (result.teacher, result.student), ctx.needs_input_grad, strict=False):
            gradients.append(_on_logits(side, slope(), ones) if is_needed else None)
        is_learned = ctx.needs_input_grad[2] and result.moving is not None
        ctx.save_for_backward(*gradients, result.moving() if is_learned else None)  # pyright: ignore[reportOptionalCall]
        ctx.inputs = teacher_logits.dtype, student_logits.dtype, moving
        return result.value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        teacher, student, moving = ctx.saved_tensors
        teacher_dtype, student_dtype, number = ctx.inputs
        return (
            None if teacher is None else (teacher * grad_value[:, None]).to(teacher_dtype),
            None if student is None else (student * grad_value[:, None]).to(student_dtype),
            None if moving is None else (moving * grad_value).sum().to(number.dtype).expand_as(number),
            None,
            None,
            None,
        )


def _on_logits(side: Side, slope: Slope, weights: Tensor) -> Tensor:
    gradient = Gradient(side)
    gradient.add(slope, weights)
    return gradient.write(torch.empty_like(side.logits))


def through_autograd(function: Callable[..., Tensor], pair: Pair, needs_gradient: bool, **options: Any) -> Result:
    """Return the result of an energy that has no closed form, from a user's module."""
    student = pair.student.logits.detach()
    with torch.set_grad_enabled(needs_gradient):
        student.requires_grad_(needs_gradient)
        value = function(pair.teacher.logits, student, **options)

    def slope() -> Slope:
        (gradient,) = torch.autograd.grad(value, student, torch.ones_like(value))
        return Slope(gradient, 0.0, temperature=None)

    def no_slope() -> Slope:
        raise NotImplementedError("an energy without a closed form has a derivative in the student only")

    return Result(value.detach(), slope, no_slope)
