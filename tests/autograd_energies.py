"""The energies once more, by autograd from their definitions: the oracle of the closed forms."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from betakd_ray.energies.arithmetic import (
    centre,
    cosine_distance,
    expectation,
    kept_logits,
    soft_cross_entropy,
    squared_norm,
    unit,
    upcast,
    zero_where_impossible,
)
from betakd_ray.energies.derivatives import log_odds


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


def kl(log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """Return KL(p ‖ q). The derivative through log p is Σ p d(log p) = Σ dp = 0, so log p is detached."""
    return never_negative(-expectation(log_p.exp(), log_q - log_p.detach()))


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


def z_scores(
    logits: Float[Tensor, "rows vocab"], masked: Bool[Tensor, "rows vocab"], size: Int[Tensor, "rows 1"]
) -> Float[Tensor, "rows vocab"]:
    """Return z-scores over the kept ids: a centred row divided by its unbiased standard deviation ‖row‖ / √(V−1)."""
    return unit(centre(logits, masked, size)) * (size - 1).to(logits.dtype).sqrt()


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
    log_p = log_probabilities(teacher_logits, teacher_temperature)
    log_q = log_probabilities(student_logits, student_temperature)
    return soft_cross_entropy(log_p, log_q) if reference else kl(log_p, log_q)


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
    log_p = log_probabilities(teacher_logits, teacher_temperature)
    log_q = log_probabilities(student_logits, student_temperature)
    return kl(log_q, log_p)


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
    log_p = log_probabilities(teacher_logits, teacher_temperature)
    log_q = log_probabilities(student_logits, student_temperature)
    divergence = skew_kl(log_p, log_q, skew)
    return divergence + soft_cross_entropy(log_p, log_p) if reference else divergence


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
    log_p = log_probabilities(teacher_logits, teacher_temperature)
    log_q = log_probabilities(student_logits, student_temperature)
    return skew_kl(log_q, log_p, skew)


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
    log_p = log_probabilities(teacher_logits, teacher_temperature)
    log_q = log_probabilities(student_logits, student_temperature)
    # The derivatives through M sum to −Σ_v dM(v) = 0, so M needs no gradient.
    with torch.no_grad():
        log_m = log_q - log_odds(mixture, "mixture")
        torch.logaddexp(log_p, log_m, out=log_m).add_(math.log(mixture))
    return mixture * kl(log_p, log_m) + (1 - mixture) * kl(log_q, log_m)


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
    p = probabilities(teacher_logits, teacher_temperature)
    q = probabilities(student_logits, student_temperature)
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
    log_p = log_probabilities(teacher_logits, teacher_temperature)
    log_q = log_probabilities(student_logits, student_temperature)
    head_gap, tail_gap = head_and_tail_gaps(log_p.detach().exp(), log_q.detach().exp(), head_mass)
    total_gap = head_gap + tail_gap
    total_gap = total_gap.masked_fill(total_gap == 0, 1.0)
    return head_gap / total_gap * kl(log_p, log_q) + tail_gap / total_gap * kl(log_q, log_p)


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
        (temperature,) = upcast(temperature)
    log_p = log_probabilities(teacher_logits, temperature)
    log_q = log_probabilities(student_logits, temperature)
    return temperature**2 * (soft_cross_entropy(log_p, log_q) if reference else kl(log_p, log_q))


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
    teacher_logits, student_logits = upcast(teacher_logits, student_logits)
    t = torch.as_tensor(t, dtype=student_logits.dtype, device=student_logits.device)
    # An id that one side masks out is masked out of the target too, unless that side has weight 0 in the target. The
    # −inf are replaced before lerp and put back after it: lerp subtracts, and −inf − (−inf) and 0 · (−inf) are NaN.
    teacher_out, student_out = (logits == -math.inf for logits in (teacher_logits, student_logits))
    ends = student_logits.detach().masked_fill(student_out, 0.0), teacher_logits.masked_fill(teacher_out, 0.0)
    target_logits = torch.lerp(*ends, t).masked_fill(teacher_out & (t > 0) | student_out & (t < 1), -math.inf)
    log_r = log_probabilities(target_logits, 1.0)
    log_q = log_probabilities(student_logits, 1.0)
    return soft_cross_entropy(log_r, log_q) if reference else kl(log_r, log_q)


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
    teacher, student, masked, size = kept_logits(teacher_logits, student_logits)
    if standardize:
        teacher, student = z_scores(teacher, masked, size), z_scores(student, masked, size)
    return squared_norm(student - teacher) / size.squeeze(-1)


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
    p = probabilities(teacher_logits, teacher_temperature)
    q = probabilities(student_logits, student_temperature)
    return squared_norm(q - p)


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
    teacher, student, masked, size = kept_logits(teacher_logits, student_logits)
    if standardize:
        teacher, student = z_scores(teacher, masked, size), z_scores(student, masked, size)
    return cosine_distance(teacher, student)


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
    p = probabilities(teacher_logits, teacher_temperature)
    q = probabilities(student_logits, student_temperature)
    return cosine_distance(p, q)


ORACLES = {
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "sfkl": skew_forward_kl,
    "srkl": skew_reverse_kl,
    "js": jensen_shannon,
    "tvd": total_variation,
    "adaptive_kl": adaptive_kl,
    "ctkd": curriculum_temperature,
    "taid": taid,
    "mse_logits": mse_logits,
    "mse_probs": mse_probs,
    "cosine_logits": cosine_logits,
    "cosine_probs": cosine_probs,
}
