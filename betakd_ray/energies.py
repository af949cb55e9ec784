"""Energies D(teacher, student): the distance of a student from its teacher, one number per row of logits.

Notation: z_t, z_s are the teacher's and the student's logits at one position, T a temperature, p = softmax(z_t/T_t)
and q = softmax(z_s/T_s). Energies built from p and q are in nats if they use a logarithm, otherwise they have no unit.
Every energy is zero where the two agree, with a zero gradient, and is never negative. Therefore a learned beta may
weight it. The only exception is `reference=True`, in the functions that have this argument.

Three rules hold for every function of logits here.

- Arithmetic is at least float32 (float64 stays float64); the gradient returns in the dtype of the input.
- A vocabulary id masked out on both sides (both logits are -inf) changes neither value nor gradient. A row that is not
  finite for another reason gives a result that is not finite: no function replaces such a value silently.
- Energies are differentiable once. Terms whose first derivative is zero everywhere are detached. This saves a
  vocabulary-wide backward pass and makes the gradient at agreement exactly zero. So second derivatives are wrong.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from betakd_ray.spec.energies import BY_NAME, LogitsEnergy


def forward_kl(
    teacher_logits: Float[Tensor, "rows vocab"],
    student_logits: Float[Tensor, "rows vocab"],
    *,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    reference: bool = False,
) -> Float[Tensor, " rows"]:
    """Return the forward Kullback–Leibler divergence, teacher to student, in nats per row.

    D_n = Σ_v p_n(v) [log p_n(v) − log q_n(v)]                       (Beta-KD §3.1; Hinton et al. 2015)

    `reference=True` returns the cross-entropy −Σ p log q instead. It is larger by H(p) and has the same gradient in the
    student.
    """
    log_p = _log_probs(teacher_logits, teacher_temperature)
    log_q = _log_probs(student_logits, student_temperature)
    return _soft_cross_entropy(log_p, log_q) if reference else _kl(log_p, log_q)


def reverse_kl(
    teacher_logits: Float[Tensor, "rows vocab"],
    student_logits: Float[Tensor, "rows vocab"],
    *,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> Float[Tensor, " rows"]:
    """Return the reverse Kullback–Leibler divergence, student to teacher, in nats per row.

    D_n = Σ_v q_n(v) [log q_n(v) − log p_n(v)]                       (Gu et al. 2024, MiniLLM)

    The result is infinite where only the teacher masks an id out.
    """
    log_p = _log_probs(teacher_logits, teacher_temperature)
    log_q = _log_probs(student_logits, student_temperature)
    return _kl(log_q, log_p)


def skew_forward_kl(
    teacher_logits: Float[Tensor, "rows vocab"],
    student_logits: Float[Tensor, "rows vocab"],
    *,
    skew: float = 0.1,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    reference: bool = False,
) -> Float[Tensor, " rows"]:
    """Return the forward KL to a mixture with a share `skew` = λ of the teacher, in nats per row; at most −log λ.

    D_n = KL(p_n ‖ λ p_n + (1−λ) q_n)                                (Ko et al. 2024, DistiLLM)

    `reference=True` adds H(p), as the released code does. The gradient in the student is the same.

    Raises ValueError unless 0 < skew < 1.
    """
    log_p = _log_probs(teacher_logits, teacher_temperature)
    log_q = _log_probs(student_logits, student_temperature)
    divergence = _skew_kl(log_p, log_q, skew)
    return divergence + _soft_cross_entropy(log_p, log_p) if reference else divergence


def skew_reverse_kl(
    teacher_logits: Float[Tensor, "rows vocab"],
    student_logits: Float[Tensor, "rows vocab"],
    *,
    skew: float = 0.1,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> Float[Tensor, " rows"]:
    """Return the reverse KL to a mixture with a share `skew` = λ of the student, in nats per row; at most −log λ.

    D_n = KL(q_n ‖ (1−λ) p_n + λ q_n)                                (Ko et al. 2024, DistiLLM)

    Raises ValueError unless 0 < skew < 1.
    """
    log_p = _log_probs(teacher_logits, teacher_temperature)
    log_q = _log_probs(student_logits, student_temperature)
    return _skew_kl(log_q, log_p, skew)


def jensen_shannon(
    teacher_logits: Float[Tensor, "rows vocab"],
    student_logits: Float[Tensor, "rows vocab"],
    *,
    mixture: float = 0.5,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> Float[Tensor, " rows"]:
    """Return the Jensen–Shannon divergence with weight `mixture` = w on the teacher, in nats per row; at most log 2.

    D_n = w KL(p_n ‖ M_n) + (1−w) KL(q_n ‖ M_n),  M_n = w p_n + (1−w) q_n        (Wen et al. 2023)

    Raises ValueError unless 0 < mixture < 1.
    """
    log_p = _log_probs(teacher_logits, teacher_temperature)
    log_q = _log_probs(student_logits, student_temperature)
    # The derivatives through M sum to −Σ_v dM(v) = 0, so M needs no gradient.
    with torch.no_grad():
        log_m = log_q - _log_odds(mixture, "mixture")
        torch.logaddexp(log_p, log_m, out=log_m).add_(math.log(mixture))
    return mixture * _kl(log_p, log_m) + (1 - mixture) * _kl(log_q, log_m)


def total_variation(
    teacher_logits: Float[Tensor, "rows vocab"],
    student_logits: Float[Tensor, "rows vocab"],
    *,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> Float[Tensor, " rows"]:
    """Return the total variation distance, from 0 to 1 per row.

    D_n = ½ Σ_v |p_n(v) − q_n(v)|                                    (Wen et al. 2023)
    """
    p = _probs(teacher_logits, teacher_temperature)
    q = _probs(student_logits, student_temperature)
    return (q - p).abs().sum(-1) / 2


def adaptive_kl(
    teacher_logits: Float[Tensor, "rows vocab"],
    student_logits: Float[Tensor, "rows vocab"],
    *,
    head_mass: float = 0.5,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> Float[Tensor, " rows"]:
    """Return forward and reverse KL, weighted by where teacher and student differ, in nats per row.

    D_n = g_h/(g_h+g_t) KL(p_n ‖ q_n) + g_t/(g_h+g_t) KL(q_n ‖ p_n)              (Wu et al. 2025)

    The head is the smallest set of the teacher's most probable ids whose mass reaches `head_mass`; it has at least one
    id. The tail is the rest. g_h and g_t are Σ|p − q| over head and tail, treated as constants. The result is zero
    where g_h + g_t = 0.

    Raises ValueError unless 0 < head_mass < 1.
    """
    if not 0 < head_mass < 1:
        raise ValueError(f"head_mass is {head_mass}, expected a probability strictly between 0 and 1")
    log_p = _log_probs(teacher_logits, teacher_temperature)
    log_q = _log_probs(student_logits, student_temperature)
    head_gap, tail_gap = _head_and_tail_gaps(log_p.detach().exp(), log_q.detach().exp(), head_mass)
    total_gap = head_gap + tail_gap
    total_gap = total_gap.masked_fill(total_gap == 0, 1.0)
    return head_gap / total_gap * _kl(log_p, log_q) + tail_gap / total_gap * _kl(log_q, log_p)


def curriculum_temperature(
    teacher_logits: Float[Tensor, "rows vocab"],
    student_logits: Float[Tensor, "rows vocab"],
    *,
    temperature: Float[Tensor, ""] | float,
    reference: bool = False,
) -> Float[Tensor, " rows"]:
    """Return the forward KL at a shared temperature T, which may be learned, in nats per row.

    D_n = T² KL(softmax(z_t/T) ‖ softmax(z_s/T))                     (Li et al. 2023, CTKD)

    The result is differentiable in T. The caller decides, by a gradient reversal, whether learning T lowers or raises
    D. `reference=True` returns −T² Σ p log q instead. It is larger by T² H(p); the gradient in the student is the same,
    the gradient in T is different.
    """
    if isinstance(temperature, Tensor):
        (temperature,) = _upcast(temperature)
    log_p = _log_probs(teacher_logits, temperature)
    log_q = _log_probs(student_logits, temperature)
    return temperature**2 * (_soft_cross_entropy(log_p, log_q) if reference else _kl(log_p, log_q))


def taid(
    teacher_logits: Float[Tensor, "rows vocab"],
    student_logits: Float[Tensor, "rows vocab"],
    *,
    t: Float[Tensor, ""] | float,
    reference: bool = False,
) -> Float[Tensor, " rows"]:
    """Return the forward KL from a target that moves from the student (t = 0) to the teacher (t = 1), in nats per row.

    D_n = KL(r_n ‖ q_n),  r_n = softmax((1−t) sg(z_s) + t z_t)       (Shing et al. 2025, TAID)

    sg is stop-gradient: the gradient moves the student to the target, never the target to the student.
    `reference=True` returns −Σ r log q instead. It is larger by H(r) and has the same gradient in the student.

    Raises ValueError unless 0 ≤ t ≤ 1. A tensor `t` is not checked, because the check would wait for the device.
    """
    if not isinstance(t, Tensor) and not 0 <= t <= 1:
        raise ValueError(f"t is {t}, expected a number from 0 (the student) to 1 (the teacher)")
    teacher_logits, student_logits = _upcast(teacher_logits, student_logits)
    t = torch.as_tensor(t, dtype=student_logits.dtype, device=student_logits.device)
    # An id that one side masks out is masked out of the target too, unless that side has weight 0 in the target. The
    # −inf are replaced before lerp and put back after it: lerp subtracts, and −inf − (−inf) and 0 · (−inf) are NaN.
    teacher_out, student_out = (logits == -math.inf for logits in (teacher_logits, student_logits))
    ends = student_logits.detach().masked_fill(student_out, 0.0), teacher_logits.masked_fill(teacher_out, 0.0)
    target_logits = torch.lerp(*ends, t).masked_fill(teacher_out & (t > 0) | student_out & (t < 1), -math.inf)
    log_r = _log_probs(target_logits, 1.0)
    log_q = _log_probs(student_logits, 1.0)
    return _soft_cross_entropy(log_r, log_q) if reference else _kl(log_r, log_q)


def mse_logits(
    teacher_logits: Float[Tensor, "rows vocab"],
    student_logits: Float[Tensor, "rows vocab"],
    *,
    standardize: bool = False,
) -> Float[Tensor, " rows"]:
    """Return the mean squared difference of the logits per row, in squared logits (without unit if standardized).

    D_n = (1/V) Σ_v (z_s(v) − z_t(v))²                               (Kim et al. 2021)

    `standardize=True` first z-scores each row over the vocabulary (Sun et al. 2024) with the unbiased standard
    deviation (V − 1 in its denominator), so that D = 2(V−1)/V · `cosine_logits`(standardized).
    V counts the ids that are not masked out.
    """
    teacher, student, masked, size = _kept_logits(teacher_logits, student_logits)
    if standardize:
        teacher, student = _standardize(teacher, masked, size), _standardize(student, masked, size)
    return _squared_norm(student - teacher) / size.squeeze(-1)


def mse_probs(
    teacher_logits: Float[Tensor, "rows vocab"],
    student_logits: Float[Tensor, "rows vocab"],
    *,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> Float[Tensor, " rows"]:
    """Return the squared distance of the distributions (the Brier score), from 0 to 2 per row.

    D_n = Σ_v (p_n(v) − q_n(v))²                                     (Brier 1950)

    It is a sum over the vocabulary, because the mean would be at most 2/V: too small to train a student.
    """
    p = _probs(teacher_logits, teacher_temperature)
    q = _probs(student_logits, student_temperature)
    return _squared_norm(q - p)


def cosine_logits(
    teacher_logits: Float[Tensor, "rows vocab"],
    student_logits: Float[Tensor, "rows vocab"],
    *,
    standardize: bool = False,
) -> Float[Tensor, " rows"]:
    """Return the cosine distance of the logits, from 0 to 2 per row.

    D_n = 1 − z_s·z_t / (‖z_s‖ ‖z_t‖)                                (Beta-KD Table 1)

    `standardize=True` z-scores each row over the vocabulary first; the result is then one minus the correlation.
    """
    teacher, student, masked, size = _kept_logits(teacher_logits, student_logits)
    if standardize:
        teacher, student = _standardize(teacher, masked, size), _standardize(student, masked, size)
    return _cosine_distance(teacher, student)


def cosine_probs(
    teacher_logits: Float[Tensor, "rows vocab"],
    student_logits: Float[Tensor, "rows vocab"],
    *,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> Float[Tensor, " rows"]:
    """Return the cosine distance of the distributions, from 0 to 1 per row.

    D_n = 1 − q_n·p_n / (‖q_n‖ ‖p_n‖)                                (Beta-KD Table 1; Ham et al. 2023)
    """
    p = _probs(teacher_logits, teacher_temperature)
    q = _probs(student_logits, student_temperature)
    return _cosine_distance(p, q)


ENERGIES: dict[str, Callable[..., Tensor]] = {
    name: globals()[section.function.partition(":")[2]]
    for name, section in BY_NAME.items()
    if issubclass(section, LogitsEnergy)
}
"""Energies on logits: name in specs → function."""


def energy(
    name: str,
    teacher_logits: Float[Tensor, "rows vocab"],
    student_logits: Float[Tensor, "rows vocab"],
    **options: Any,
) -> Float[Tensor, " rows"]:
    """Return one energy per row, chosen by its name in a spec, with its options, for your own training loop.

    `ctkd` needs `temperature=`, `taid` needs `t=`. Raises ValueError for an unknown name, for logits whose shapes
    differ and for an option out of its range. Raises TypeError for an unknown option and for a missing one.
    """
    if name not in ENERGIES:
        raise ValueError(f"no energy {name!r} on logits; there are {', '.join(ENERGIES)}")
    if teacher_logits.ndim != 2 or teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits are {list(teacher_logits.shape)} and student_logits {list(student_logits.shape)}: give "
            "both as [rows, vocab], on the ids that the models have in common"
        )
    return ENERGIES[name](teacher_logits, student_logits, **options)


def cross_entropy(student_logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return the negative log-likelihood of the target ids, in nats per row.

    CE_n = −log q_n(y_n)                                             (Beta-KD §3.1)

    Every row counts. A target outside the vocabulary, such as the label −100, is an error (IndexError or RuntimeError
    from torch's gather); it does not give zero.
    """
    log_q = _log_probs(student_logits, 1.0)
    return -log_q.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)


def entropy(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """Return the Shannon entropy of softmax(logits), in nats per row, from 0 to log V.

    H_n = −Σ_v p_n(v) log p_n(v)                                     (Shannon 1948)
    """
    log_p = _log_probs(logits, 1.0)
    return _soft_cross_entropy(log_p, log_p.detach())


def matching_distance(
    teacher_logits: Float[Tensor, "rows vocab"], student_logits: Float[Tensor, "rows vocab"]
) -> Float[Tensor, " rows"]:
    """Return the mean absolute difference of the logits after centring each row, in units of the logits.

    (1/V) Σ_v |(z_t(v) − z̄_t) − (z_s(v) − z̄_s)|                      (Beta-KD Figure 5)

    Centring removes the constant that softmax ignores. V counts the ids that are not masked out.
    """
    teacher, student, masked, size = _kept_logits(teacher_logits, student_logits)
    return _centre(teacher - student, masked, size).abs().sum(-1) / size.squeeze(-1)


def feature_distance(
    mapped_teacher: Float[Tensor, "tokens width"], student: Float[Tensor, "tokens width"]
) -> Float[Tensor, " tokens"]:
    """Return the mean squared distance of the features per token, in squared feature units.

    D_n = mean over channels of (W f_t,n − f_s,n)²                   (Beta-KD §4.1, FD)

    `mapped_teacher` is W f_t: the teacher's features, already mapped to the student's width.
    """
    mapped_teacher, student = _upcast(mapped_teacher, student)
    return (mapped_teacher - student).square().mean(dim=1)


def relation(
    teacher: Float[Tensor, "batch tokens t_width"], student: Float[Tensor, "batch tokens s_width"]
) -> Float[Tensor, " batch"]:
    """Return the cosine distance of the two token-by-token similarity matrices, from 0 to 1 per sample.

    D_i = 1 − cos(vec(F_t F_tᵀ), vec(F_s F_sᵀ))                      (Cai et al. 2024, LLaVA-KD)

    It does not depend on the width, scale or rotation of each side's features, so teacher and student need no map
    between their features.
    """
    return _cosine_distance(_gram(teacher).flatten(1), _gram(student).flatten(1))


def _upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in one common dtype, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _tempered(logits: Float[Tensor, "rows vocab"], temperature: Tensor | float) -> Float[Tensor, "rows vocab"]:
    (logits,) = _upcast(logits)
    if isinstance(temperature, Tensor):
        # The derivative in T multiplies the gradient of an id by its logit. A logit of −inf would make it NaN.
        masked = logits == -math.inf
        return (logits.masked_fill(masked, 0.0) / temperature).masked_fill_(masked, -math.inf)
    if temperature <= 0:
        raise ValueError(f"a temperature is {temperature}, expected a positive number")
    return logits if temperature == 1.0 else logits / temperature


def _log_probs(logits: Float[Tensor, "rows vocab"], temperature: Tensor | float) -> Float[Tensor, "rows vocab"]:
    return torch.log_softmax(_tempered(logits, temperature), dim=-1)


def _probs(logits: Float[Tensor, "rows vocab"], temperature: float) -> Float[Tensor, "rows vocab"]:
    return torch.softmax(_tempered(logits, temperature), dim=-1)


def _expectation(probs: Float[Tensor, "rows vocab"], values: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """Return Σ_v probs(v) · values(v) with 0 · (anything) = 0.

    It overwrites `values`, so no other code may use that tensor. It uses a plain product and sum, because a matrix
    product would follow TF32 and autocast settings and compute below float32.
    """
    return (probs * _zero_where_impossible(values, probs)).sum(-1)


def _zero_where_impossible(
    values: Float[Tensor, "rows vocab"], probs: Float[Tensor, "rows vocab"]
) -> Float[Tensor, "rows vocab"]:
    """Overwrite `values` with zero where `probs` is zero, so that a product with `probs` never computes 0 · inf.

    This happens before the product, because the gradient of `probs` multiplies by `values` too. Autograd does not
    record it: the gradient of `values` at these places is a product with `probs`, which is already zero.
    """
    values.detach().masked_fill_(probs == 0, 0.0)
    return values


def _kl(log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """Return KL(p ‖ q). The derivative through log p is Σ p d(log p) = Σ dp = 0, so log p is detached."""
    return _never_negative(-_expectation(log_p.exp(), log_q - log_p.detach()))


def _soft_cross_entropy(
    log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"]
) -> Float[Tensor, " rows"]:
    """Return −Σ p log q, in nats per row."""
    return _expectation(log_p.exp(), -log_q)


def _skew_kl(
    log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"], skew: float
) -> Float[Tensor, " rows"]:
    """Return KL(p ‖ m) for m = λp + (1−λ)q and λ = skew, in nats per row.

    log(p/m) = −log(λ + (1−λ) q/p) = −log λ − softplus(log(q/p) − log(λ/(1−λ)))

    This form keeps fewer vocabulary-wide tensors in memory than log m does. Its gradient is finite where that of
    logaddexp of two −inf is not.
    """
    log_odds = _log_odds(skew, "skew")
    probs = log_p.exp()
    log_ratio = _zero_where_impossible(log_q - log_p, probs)
    # torch replaces softplus(x) by x above its threshold (20 by default). At 50 this is exact in float64 too.
    log_share = torch.nn.functional.softplus(log_ratio - log_odds, threshold=50)
    return _never_negative(-math.log(skew) - (probs * log_share).sum(-1))


def _log_odds(weight: float, name: str) -> float:
    if not 0 < weight < 1:
        raise ValueError(
            f"{name} is {weight}, expected a number strictly between 0 and 1; at the ends the divergence is a plain KL "
            f"or zero. Choose fkl or rkl for a plain KL."
        )
    return math.log(weight) - math.log1p(-weight)


def _never_negative(divergence: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Raise a value that rounding made negative to zero, without a change to the gradient.

    A clamp would also zero the gradient: a divergence of −1e-8 still has a gradient of about 1e-4.
    """
    return divergence - divergence.detach().clamp(max=0.0)


def _head_and_tail_gaps(
    p: Float[Tensor, "rows vocab"], q: Float[Tensor, "rows vocab"], head_mass: float
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return Σ|p − q| over the ids that hold the first `head_mass` of the teacher's probability, and over the rest."""
    # A stable sort puts equally probable ids into head or tail by their order, so every device gives the same result.
    sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
    gap = (p - q).abs_().gather(-1, order)
    in_head = torch.ones_like(sorted_p, dtype=torch.bool)
    in_head[:, 1:] = sorted_p.cumsum(-1)[:, :-1] < head_mass
    return (gap * in_head).sum(-1), (gap * ~in_head).sum(-1)


def _masked_out(
    teacher: Float[Tensor, "rows vocab"], student: Float[Tensor, "rows vocab"]
) -> Bool[Tensor, "rows vocab"]:
    return (teacher == -math.inf) & (student == -math.inf)


def _kept_logits(
    teacher: Float[Tensor, "rows vocab"], student: Float[Tensor, "rows vocab"]
) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, "rows vocab"], Bool[Tensor, "rows vocab"], Int[Tensor, "rows 1"]]:
    """Return both logits with zero at masked-out ids, the mask of these ids, and the number of ids that remain."""
    teacher, student = _upcast(teacher, student)
    masked = _masked_out(teacher, student)
    size = teacher.shape[-1] - masked.sum(-1, keepdim=True)
    return teacher.masked_fill(masked, 0.0), student.masked_fill(masked, 0.0), masked, size


def _centre(
    logits: Float[Tensor, "rows vocab"], masked: Bool[Tensor, "rows vocab"], size: Int[Tensor, "rows 1"]
) -> Float[Tensor, "rows vocab"]:
    return (logits - logits.sum(-1, keepdim=True) / size).masked_fill_(masked, 0.0)


def _standardize(
    logits: Float[Tensor, "rows vocab"], masked: Bool[Tensor, "rows vocab"], size: Int[Tensor, "rows 1"]
) -> Float[Tensor, "rows vocab"]:
    """Return z-scores over the kept ids: a centred row divided by its unbiased standard deviation ‖row‖ / √(V−1)."""
    return _unit(_centre(logits, masked, size)) * (size - 1).to(logits.dtype).sqrt()


def _unit(vectors: Float[Tensor, "rows size"]) -> Float[Tensor, "rows size"]:
    """Return the vectors scaled to length one. A zero vector stays zero, with a finite gradient."""
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors * norm.masked_fill(norm == 0, 1.0).reciprocal()


def _cosine_distance(a: Float[Tensor, "rows size"], b: Float[Tensor, "rows size"]) -> Float[Tensor, " rows"]:
    """Return 1 − cos(a, b) as ½‖a/‖a‖ − b/‖b‖‖², which stays precise near agreement, where 1 − cos loses all digits."""
    return _squared_norm(_unit(b) - _unit(a)) / 2


def _squared_norm(vectors: Float[Tensor, "rows size"]) -> Float[Tensor, " rows"]:
    """Return Σ v² through the norm: one kernel squares and sums, and the gradient keeps no second vector."""
    return torch.linalg.vector_norm(vectors, dim=-1).square()


def _gram(features: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens tokens"]:
    (features,) = _upcast(features)
    # Autocast would run the matrix product in bfloat16.
    with torch.autocast(features.device.type, enabled=False):
        return features @ features.mT
