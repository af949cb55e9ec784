"""Values with their derivatives that several energies share."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from betakd_ray.energies.arithmetic import centre, squared_norm
from betakd_ray.energies.closed_form import Pair, Result, Slope


def log_odds(weight: float, name: str) -> float:
    """Return log(w / (1−w)). Raises ValueError unless 0 < w < 1."""
    if not 0 < weight < 1:
        raise ValueError(
            f"{name} is {weight}, expected a number strictly between 0 and 1; at the ends the divergence is a plain KL "
            f"or zero. Choose fkl or rkl for a plain KL."
        )
    return math.log(weight) - math.log1p(-weight)


def skew_kl(pair: Pair, a: Tensor, log_a: Tensor, log_b: Tensor, skew: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL(a ‖ m) for m = λa + (1−λ)b [rows], a log(a/m) without a multiple of a, and a (1−λ) b / m.

    log(a/m) = −log λ − softplus(x),  (1−λ) b / m = sigmoid(x),  x = log(b/a) − log(λ/(1−λ))

    This form never takes the logarithm of a probability that has underflowed.
    """
    odds = log_odds(skew, "skew")
    x = log_b - log_a
    if not pair.is_finite:
        x.masked_fill_(a == 0, 0.0)
    x -= odds
    # torch replaces softplus(x) by x above its threshold (20 by default). At 50 this is exact in float64 too.
    terms = torch.nn.functional.softplus(x, threshold=50).mul_(a).neg_()
    value = (terms.sum(-1) - math.log(skew)).clamp(min=0.0)
    return value, terms, x.sigmoid_().mul_(a)


def slope_in_temperature(p: Tensor, q: Tensor, log_p: Tensor, gap: Tensor, temperature: Tensor | float) -> Tensor:
    """Return ∂(T² KL)/∂T from gap = log p − log q, for finite logits.

    = 2 T K − T Σ_v [ (p g − p K) log p + (p − q) gap ],  g = gap + e^(−gap) − 1,  K = Σ p g = KL

    Near agreement the terms of the usual form are first order in the gap and their sum is second order, which float32
    does not have any more. Here every term is second order.
    """
    change = torch.where(gap.abs() < 1, p * torch.expm1(-gap), q - p)
    terms = torch.addcmul(change, p, gap)
    divergence = terms.sum(-1)
    along = ((terms - p * divergence[:, None]) * log_p - change * gap).sum(-1)
    return 2 * temperature * divergence - temperature * along


def sum_of(terms: Tensor, others: Tensor, temperature: float) -> Slope:
    values = terms + others
    return Slope(values, values.sum(-1), temperature)


def target_between(pair: Pair, t: Tensor | float) -> Tensor:
    """Return (1−t) z_s + t z_t.

    An id that one side masks out is masked out here too, unless that side has weight 0.
    """
    teacher, student = pair.teacher.logits, pair.student.logits
    t = torch.as_tensor(t, dtype=student.dtype, device=student.device)
    if pair.is_finite:
        return torch.lerp(student, teacher, t)
    # The −inf are replaced before lerp and put back after it: lerp subtracts, and −inf − (−inf) and 0 · (−inf) are NaN.
    teacher_out, student_out = teacher == -math.inf, student == -math.inf
    between = torch.lerp(student.masked_fill(student_out, 0.0), teacher.masked_fill(teacher_out, 0.0), t)
    return between.masked_fill_(teacher_out & (t > 0) | student_out & (t < 1), -math.inf)


def cosine_distance(
    a: Float[Tensor, "rows size"], b: Float[Tensor, "rows size"]
) -> tuple[Float[Tensor, " rows"], Callable[[], Tensor], Callable[[], Tensor]]:
    """Return 1 − cos(a, b) as ½‖â − b̂‖², and its gradients in a and b.

    ∂/∂b = (b̂ − â − b̂ (b̂·(b̂ − â))) / ‖b‖

    This stays precise near agreement, where 1 − cos loses all digits. A zero vector stays zero, with a finite gradient.
    """
    norms = [torch.linalg.vector_norm(each, dim=-1, keepdim=True) for each in (a, b)]
    inverses = [norm.masked_fill(norm == 0, 1.0).reciprocal() for norm in norms]
    # Not addcmul: it would round only one of the two products, and the gap at agreement would not be zero.
    gap = (b * inverses[1]).sub_(a * inverses[0])
    value = squared_norm(gap) / 2
    lengths = [(norm != 0).to(a.dtype) for norm in norms]

    def gradient(of: Tensor, side: int, sign: float) -> Tensor:
        # b̂·(b̂ − â) = ½‖b̂ − â‖² + ½‖b̂‖² − ½‖â‖²: the value, unless one of the two is a zero vector.
        along = value[:, None] + (lengths[side] - lengths[1 - side]) / 2
        return torch.addcmul(sign * inverses[side] * gap, of, inverses[side].square() * along, value=-1)

    return value, lambda: gradient(a, 0, -1.0), lambda: gradient(b, 1, 1.0)


def centred(pair: Pair) -> tuple[Tensor, Tensor]:
    """Return both sides less their mean over the kept ids. A z-score is this, to a factor that the cosine ignores."""
    teacher, student, masked, size = pair.kept
    return centre(teacher, masked, size), centre(student, masked, size)


def of_gradients(value: Tensor, teacher: Callable[[], Tensor], student: Callable[[], Tensor]) -> Result:
    return Result(
        value,
        student=lambda: Slope(student(), 0.0, temperature=None),
        teacher=lambda: Slope(teacher(), 0.0, temperature=None),
    )
