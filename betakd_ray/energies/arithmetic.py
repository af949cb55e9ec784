"""Arithmetic that the energies share: softmax, divergences and distances that stay exact at their limits."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in one common dtype, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def tempered(logits: Float[Tensor, "rows vocab"], temperature: Tensor | float) -> Float[Tensor, "rows vocab"]:
    (logits,) = upcast(logits)
    if isinstance(temperature, Tensor):
        # The derivative in T multiplies the gradient of an id by its logit. A logit of −inf would make it NaN.
        masked = logits == -math.inf
        return (logits.masked_fill(masked, 0.0) / temperature).masked_fill_(masked, -math.inf)
    if temperature <= 0:
        raise ValueError(f"a temperature is {temperature}, expected a positive number")
    return logits if temperature == 1.0 else logits / temperature


def log_probabilities(logits: Float[Tensor, "rows vocab"], temperature: Tensor | float) -> Float[Tensor, "rows vocab"]:
    return torch.log_softmax(tempered(logits, temperature), dim=-1)


def probabilities(logits: Float[Tensor, "rows vocab"], temperature: float) -> Float[Tensor, "rows vocab"]:
    return torch.softmax(tempered(logits, temperature), dim=-1)


def expectation(probs: Float[Tensor, "rows vocab"], values: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """Return Σ_v probs(v) · values(v) with 0 · (anything) = 0.

    It overwrites `values`, so no other code may use that tensor. It uses a plain product and sum, because a matrix
    product would follow TF32 and autocast settings and compute below float32.
    """
    return (probs * zero_where_impossible(values, probs)).sum(-1)


def zero_where_impossible(
    values: Float[Tensor, "rows vocab"], probs: Float[Tensor, "rows vocab"]
) -> Float[Tensor, "rows vocab"]:
    """Overwrite `values` with zero where `probs` is zero, so that a product with `probs` never computes 0 · inf.

    This happens before the product, because the gradient of `probs` multiplies by `values` too. Autograd does not
    record it: the gradient of `values` at these places is a product with `probs`, which is already zero.
    """
    values.detach().masked_fill_(probs == 0, 0.0)
    return values


def kl(log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """Return KL(p ‖ q). The derivative through log p is Σ p d(log p) = Σ dp = 0, so log p is detached."""
    return never_negative(-expectation(log_p.exp(), log_q - log_p.detach()))


def soft_cross_entropy(
    log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"]
) -> Float[Tensor, " rows"]:
    """Return −Σ p log q, in nats per row."""
    return expectation(log_p.exp(), -log_q)


def skew_kl(
    log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"], skew: float
) -> Float[Tensor, " rows"]:
    """Return KL(p ‖ m) for m = λp + (1−λ)q and λ = skew, in nats per row.

    log(p/m) = −log(λ + (1−λ) q/p) = −log λ − softplus(log(q/p) − log(λ/(1−λ)))

    This form keeps fewer vocabulary-wide tensors in memory than log m does. Its gradient is finite where that of
    logaddexp of two −inf is not.
    """
    odds = log_odds(skew, "skew")
    probs = log_p.exp()
    log_ratio = zero_where_impossible(log_q - log_p, probs)
    # torch replaces softplus(x) by x above its threshold (20 by default). At 50 this is exact in float64 too.
    log_share = torch.nn.functional.softplus(log_ratio - odds, threshold=50)
    return never_negative(-math.log(skew) - (probs * log_share).sum(-1))


def log_odds(weight: float, name: str) -> float:
    if not 0 < weight < 1:
        raise ValueError(
            f"{name} is {weight}, expected a number strictly between 0 and 1; at the ends the divergence is a plain KL "
            f"or zero. Choose fkl or rkl for a plain KL."
        )
    return math.log(weight) - math.log1p(-weight)


def never_negative(divergence: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Raise a value that rounding made negative to zero, without a change to the gradient.

    A clamp would also zero the gradient: a divergence of −1e-8 still has a gradient of about 1e-4.
    """
    return divergence - divergence.detach().clamp(max=0.0)


def head_and_tail_gaps(
    p: Float[Tensor, "rows vocab"], q: Float[Tensor, "rows vocab"], head_mass: float
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return Σ|p − q| over the ids that hold the first `head_mass` of the teacher's probability, and over the rest."""
    # A stable sort puts equally probable ids into head or tail by their order, so every device gives the same result.
    sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
    gap = (p - q).abs_().gather(-1, order)
    in_head = torch.ones_like(sorted_p, dtype=torch.bool)
    # An id is in the head if the ids before it hold less than head_mass. So the first id always is.
    in_head[:, 1:] = sorted_p.cumsum(-1)[:, :-1] < head_mass
    return (gap * in_head).sum(-1), (gap * ~in_head).sum(-1)


def masked_out(
    teacher: Float[Tensor, "rows vocab"], student: Float[Tensor, "rows vocab"]
) -> Bool[Tensor, "rows vocab"]:
    return (teacher == -math.inf) & (student == -math.inf)


def kept_logits(
    teacher: Float[Tensor, "rows vocab"], student: Float[Tensor, "rows vocab"]
) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, "rows vocab"], Bool[Tensor, "rows vocab"], Int[Tensor, "rows 1"]]:
    """Return both logits with zero at masked-out ids, the mask of these ids, and the number of ids that remain."""
    teacher, student = upcast(teacher, student)
    masked = masked_out(teacher, student)
    size = teacher.shape[-1] - masked.sum(-1, keepdim=True)
    return teacher.masked_fill(masked, 0.0), student.masked_fill(masked, 0.0), masked, size


def centre(
    logits: Float[Tensor, "rows vocab"], masked: Bool[Tensor, "rows vocab"], size: Int[Tensor, "rows 1"]
) -> Float[Tensor, "rows vocab"]:
    return (logits - logits.sum(-1, keepdim=True) / size).masked_fill_(masked, 0.0)


def z_scores(
    logits: Float[Tensor, "rows vocab"], masked: Bool[Tensor, "rows vocab"], size: Int[Tensor, "rows 1"]
) -> Float[Tensor, "rows vocab"]:
    """Return z-scores over the kept ids: a centred row divided by its unbiased standard deviation ‖row‖ / √(V−1)."""
    return unit(centre(logits, masked, size)) * (size - 1).to(logits.dtype).sqrt()


def unit(vectors: Float[Tensor, "rows size"]) -> Float[Tensor, "rows size"]:
    """Return the vectors scaled to length one. A zero vector stays zero, with a finite gradient."""
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors * norm.masked_fill(norm == 0, 1.0).reciprocal()


def cosine_distance(a: Float[Tensor, "rows size"], b: Float[Tensor, "rows size"]) -> Float[Tensor, " rows"]:
    """Return 1 − cos(a, b) as ½‖a/‖a‖ − b/‖b‖‖², which stays precise near agreement, where 1 − cos loses all digits."""
    return squared_norm(unit(b) - unit(a)) / 2


def squared_norm(vectors: Float[Tensor, "rows size"]) -> Float[Tensor, " rows"]:
    """Return Σ v² through the norm: one kernel squares and sums, and the gradient keeps no second vector."""
    return torch.linalg.vector_norm(vectors, dim=-1).square()


def gram(features: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens tokens"]:
    (features,) = upcast(features)
    # Autocast would run the matrix product in bfloat16.
    with torch.autocast(features.device.type, enabled=False):
        return features @ features.mT
