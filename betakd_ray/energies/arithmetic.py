"""Arithmetic that the energies share: softmax, divergences and distances that stay exact at their limits."""

import math

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in one common dtype, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def log_probabilities(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
    return torch.log_softmax(*upcast(logits), dim=-1)


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


def soft_cross_entropy(
    log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"]
) -> Float[Tensor, " rows"]:
    """Return −Σ p log q, in nats per row."""
    return expectation(log_p.exp(), -log_q)


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
    logits: Float[Tensor, "rows vocab"], masked: Bool[Tensor, "rows vocab"] | None, size: Num[Tensor, "rows 1"]
) -> Float[Tensor, "rows vocab"]:
    """Return the logits less their mean over the ids that are not masked out, and zero at the others."""
    centred = logits - logits.sum(-1, keepdim=True) / size
    return centred if masked is None else centred.masked_fill_(masked, 0.0)


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
