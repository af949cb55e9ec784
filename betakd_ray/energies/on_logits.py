"""Energies on the logits of answer rows, in closed form. `betakd_ray.energies` has their notation and their rules.

Each is written as a function of a `Pair`, and called with (teacher_logits, student_logits, **options); see
`closed_form`. A slope is the derivative in the log-probabilities. Terms whose derivative is the same multiple of every
probability are left out of it, because the gradient in the logits does not depend on them.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from betakd_ray.energies.arithmetic import squared_norm
from betakd_ray.energies.closed_form import Pair, Result, Slope, differentiable
from betakd_ray.energies.derivatives import (
    centred,
    cosine_distance,
    log_odds,
    of_gradients,
    skew_kl,
    slope_in_temperature,
    sum_of,
    target_between,
)
from betakd_ray.energies.partition import head_of


@differentiable
def forward_kl(
    pair: Pair,
    *,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    reference: bool = False,
) -> Result:
    """Return the forward Kullback–Leibler divergence, teacher to student, in nats per row.

    D_n = Σ_v p_n(v) [log p_n(v) − log q_n(v)]                       (Beta-KD §3.1; Hinton et al. 2015)
    ∂D/∂log q = −p

    `reference=True` returns the cross-entropy −Σ p log q instead. It is larger by H(p) and has the same gradient in the
    student.
    """
    log_p, log_q = pair.teacher.log_probs(teacher_temperature), pair.student.log_probs(student_temperature)
    p = pair.teacher.probs(teacher_temperature)
    terms, value = pair.expectation(p, -log_q if reference else log_p - log_q)
    return Result(
        value.clamp(min=0.0),
        student=lambda: Slope(p, 1.0, student_temperature, factor=-1.0),
        teacher=lambda: Slope(terms, value, teacher_temperature),
    )


@differentiable
def reverse_kl(
    pair: Pair,
    *,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> Result:
    """Return the reverse Kullback–Leibler divergence, student to teacher, in nats per row.

    D_n = Σ_v q_n(v) [log q_n(v) − log p_n(v)]                       (Gu et al. 2024, MiniLLM)
    ∂D/∂log q = q (log q − log p), and its sum is D

    The result is infinite where only the teacher masks an id out.
    """
    log_p, log_q = pair.teacher.log_probs(teacher_temperature), pair.student.log_probs(student_temperature)
    q = pair.student.probs(student_temperature)
    terms, value = pair.expectation(q, log_q - log_p)
    return Result(
        value.clamp(min=0.0),
        student=lambda: Slope(terms, value, student_temperature),
        teacher=lambda: Slope(q, 1.0, teacher_temperature, factor=-1.0),
    )


@differentiable
def skew_forward_kl(
    pair: Pair,
    *,
    skew: float = 0.1,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    reference: bool = False,
) -> Result:
    """Return the forward KL to a mixture with a share `skew` = λ of the teacher, in nats per row; at most −log λ.

    D_n = KL(p_n ‖ m_n),  m_n = λ p_n + (1−λ) q_n                    (Ko et al. 2024, DistiLLM)
    ∂D/∂log q = −p (1−λ) q / m

    `reference=True` adds H(p), as the released code does. The gradient in the student is the same.

    Raises ValueError unless 0 < skew < 1.
    """
    log_p, log_q = pair.teacher.log_probs(teacher_temperature), pair.student.log_probs(student_temperature)
    p = pair.teacher.probs(teacher_temperature)
    value, terms, shared = skew_kl(pair, p, log_p, log_q, skew)
    if reference:
        entropies, entropy = pair.expectation(p, -log_p)
        value, terms = value + entropy, terms + entropies
    return Result(
        value,
        student=lambda: Slope(shared, shared.sum(-1), student_temperature, factor=-1.0),
        teacher=lambda: sum_of(terms, shared, teacher_temperature),
    )


@differentiable
def skew_reverse_kl(
    pair: Pair,
    *,
    skew: float = 0.1,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> Result:
    """Return the reverse KL to a mixture with a share `skew` = λ of the student, in nats per row; at most −log λ.

    D_n = KL(q_n ‖ m_n),  m_n = (1−λ) p_n + λ q_n                    (Ko et al. 2024, DistiLLM)
    ∂D/∂log q = q log(q/m) + q (1−λ) p / m

    Raises ValueError unless 0 < skew < 1.
    """
    log_p, log_q = pair.teacher.log_probs(teacher_temperature), pair.student.log_probs(student_temperature)
    q = pair.student.probs(student_temperature)
    value, terms, shared = skew_kl(pair, q, log_q, log_p, skew)
    return Result(
        value,
        student=lambda: sum_of(terms, shared, student_temperature),
        teacher=lambda: Slope(shared, shared.sum(-1), teacher_temperature, factor=-1.0),
    )


@differentiable
def jensen_shannon(
    pair: Pair,
    *,
    mixture: float = 0.5,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> Result:
    """Return the Jensen–Shannon divergence with weight `mixture` = w on the teacher, in nats per row; at most log 2.

    D_n = w KL(p_n ‖ M_n) + (1−w) KL(q_n ‖ M_n),  M_n = w p_n + (1−w) q_n        (Wen et al. 2023)
    ∂D/∂log q = (1−w) q log(q/M): the derivatives through M sum to −Σ_v dM(v) = 0

    Raises ValueError unless 0 < mixture < 1.
    """
    log_p, log_q = pair.teacher.log_probs(teacher_temperature), pair.student.log_probs(student_temperature)
    log_m = log_q - log_odds(mixture, "mixture")
    torch.logaddexp(log_p, log_m, out=log_m).add_(math.log(mixture))
    of_p, from_p = pair.expectation(pair.teacher.probs(teacher_temperature), log_p - log_m)
    of_q, from_q = pair.expectation(pair.student.probs(student_temperature), log_q - log_m)
    return Result(
        mixture * from_p.clamp(min=0.0) + (1 - mixture) * from_q.clamp(min=0.0),
        student=lambda: Slope(of_q, from_q, student_temperature, factor=1 - mixture),
        teacher=lambda: Slope(of_p, from_p, teacher_temperature, factor=mixture),
    )


@differentiable
def total_variation(
    pair: Pair,
    *,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> Result:
    """Return the total variation distance, from 0 to 1 per row.

    D_n = ½ Σ_v |p_n(v) − q_n(v)|                                    (Wen et al. 2023)
    ∂D/∂log q = ½ q sign(q − p)
    """
    p, q = pair.teacher.probs(teacher_temperature), pair.student.probs(student_temperature)
    gap = q - p

    def slope(probs: Tensor, temperature: float, factor: float) -> Slope:
        values = gap.sign().mul_(probs)
        return Slope(values, values.sum(-1), temperature, factor)

    return Result(
        gap.abs().sum(-1) / 2,
        student=lambda: slope(q, student_temperature, 0.5),
        teacher=lambda: slope(p, teacher_temperature, -0.5),
    )


@differentiable
def adaptive_kl(
    pair: Pair,
    *,
    head_mass: float = 0.5,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> Result:
    """Return forward and reverse KL, weighted by where teacher and student differ, in nats per row.

    D_n = h KL(p_n ‖ q_n) + t KL(q_n ‖ p_n),  h = g_h/(g_h+g_t),  t = g_t/(g_h+g_t)       (Wu et al. 2025)
    ∂D/∂log q = −h p + t q (log q − log p)

    The head is the smallest set of the teacher's most probable ids whose mass reaches `head_mass`; it has at least one
    id. The tail is the rest. g_h and g_t are Σ|p − q| over head and tail, treated as constants. The result is zero
    where g_h + g_t = 0.

    Raises ValueError unless 0 < head_mass < 1.
    """
    if not 0 < head_mass < 1:
        raise ValueError(f"head_mass is {head_mass}, expected a probability strictly between 0 and 1")
    log_p, log_q = pair.teacher.log_probs(teacher_temperature), pair.student.log_probs(student_temperature)
    p, q = pair.teacher.probs(teacher_temperature), pair.student.probs(student_temperature)
    gap = (p - q).abs_()
    total_gap = gap.sum(-1)
    total_gap.masked_fill_(total_gap == 0, 1.0)
    tail_gap = gap.masked_fill(head_of(p, head_mass), 0.0).sum(-1)
    tail = tail_gap / total_gap
    head = (gap.sum(-1) - tail_gap) / total_gap
    difference = log_p - log_q
    of_p, forward = pair.expectation(p, difference)
    of_q, reverse = pair.expectation(q, difference.neg_())

    def slope(of_head: Tensor, of_tail: Tensor, total: Tensor, temperature: float) -> Slope:
        return Slope(of_head.addcmul_(of_tail, tail[:, None]), total, temperature)

    return Result(
        head * forward.clamp(min=0.0) + tail * reverse.clamp(min=0.0),
        student=lambda: slope(p * -head[:, None], of_q, tail * reverse - head, student_temperature),
        teacher=lambda: slope(of_p * head[:, None], -q, head * forward - tail, teacher_temperature),
    )


@differentiable
def curriculum_temperature(
    pair: Pair,
    *,
    temperature: Float[Tensor, ""] | float,
    reference: bool = False,
) -> Result:
    """Return the forward KL at a shared temperature T, which may be learned, in nats per row.

    D_n = T² KL(p_n ‖ q_n),  p_n = softmax(z_t/T),  q_n = softmax(z_s/T)         (Li et al. 2023, CTKD)
    ∂D/∂log q = −T² p
    ∂D/∂T = 2 D/T − T Σ_v [ p (log p − log q − KL) log p + (q − p) log q ]

    The result is differentiable in T. The caller decides, by a gradient reversal, whether learning T lowers or raises
    D. `reference=True` returns −T² Σ p log q instead. It is larger by T² H(p); the gradient in the student is the same,
    the gradient in T is different.
    """
    log_p, log_q = pair.teacher.log_probs(temperature), pair.student.log_probs(temperature)
    p, q = pair.teacher.probs(temperature), pair.student.probs(temperature)
    gap = -log_q if reference else log_p - log_q
    terms, divergence = pair.expectation(p, gap)
    value = temperature**2 * divergence.clamp(min=0.0)

    def moving() -> Tensor:
        if reference or not pair.is_finite:
            # z = T log p + a constant, which cancels. So z/T moves by −log p / T.
            _, from_teacher = pair.expectation(p, (gap - divergence[:, None]) * log_p)
            _, from_student = pair.expectation(q - p, log_q)
            return 2 * value / temperature - temperature * (from_teacher + from_student)
        return slope_in_temperature(p, q, log_p, gap, temperature)

    return Result(
        value,
        student=lambda: Slope(p, 1.0, temperature, factor=-(temperature**2)),
        teacher=lambda: Slope(terms, divergence, temperature, factor=temperature**2),
        moving=moving,
    )


@differentiable
def taid(
    pair: Pair,
    *,
    t: Float[Tensor, ""] | float,
    reference: bool = False,
) -> Result:
    """Return the forward KL from a target that moves from the student (t = 0) to the teacher (t = 1), in nats per row.

    D_n = KL(r_n ‖ q_n),  r_n = softmax((1−t) sg(z_s) + t z_t)       (Shing et al. 2025, TAID)
    ∂D/∂log q = −r

    sg is stop-gradient: the gradient moves the student to the target, never the target to the student.
    `reference=True` returns −Σ r log q instead. It is larger by H(r) and has the same gradient in the student.

    Raises ValueError unless 0 ≤ t ≤ 1. A tensor `t` is not checked, because the check would wait for the device.
    """
    if not isinstance(t, Tensor) and not 0 <= t <= 1:
        raise ValueError(f"t is {t}, expected a number from 0 (the student) to 1 (the teacher)")
    log_r, log_q = torch.log_softmax(target_between(pair, t), dim=-1), pair.student.log_probs()
    r = log_r.exp()
    gap = -log_q if reference else log_r - log_q
    terms, value = pair.expectation(r, gap)

    def teacher() -> Slope:
        return Slope(terms.addcmul(r, value[:, None], value=-1), 0.0, temperature=None, factor=t)

    def moving() -> Tensor:
        between = (gap - value[:, None]) * (pair.teacher.logits - pair.student.logits)
        return pair.expectation(r, between)[1]

    return Result(value.clamp(min=0.0), student=lambda: Slope(r, 1.0, factor=-1.0), teacher=teacher, moving=moving)


@differentiable
def mse_logits(
    pair: Pair,
    *,
    standardize: bool = False,
) -> Result:
    """Return the mean squared difference of the logits per row, in squared logits (without unit if standardized).

    D_n = (1/V) Σ_v (z_s(v) − z_t(v))²                               (Kim et al. 2021)
    ∂D/∂z_s = (2/V) (z_s − z_t)

    `standardize=True` first z-scores each row over the vocabulary (Sun et al. 2024) with the unbiased standard
    deviation (V − 1 in its denominator). It is computed as D = 2(V−1)/V · `cosine_logits`(standardized).
    V counts the ids that are not masked out.
    """
    teacher, student, _, size = pair.kept
    size = size[:, 0]
    if standardize:
        scale = 2 * (size - 1) / size
        value, on_teacher, on_student = cosine_distance(*centred(pair))
        return of_gradients(scale * value, lambda: on_teacher() * scale[:, None], lambda: on_student() * scale[:, None])
    gap = student - teacher
    return Result(
        squared_norm(gap) / size,
        student=lambda: Slope(gap, 0.0, temperature=None, factor=2 / size),
        teacher=lambda: Slope(gap, 0.0, temperature=None, factor=-2 / size),
    )


@differentiable
def mse_probs(
    pair: Pair,
    *,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> Result:
    """Return the squared distance of the distributions (the Brier score), from 0 to 2 per row.

    D_n = Σ_v (p_n(v) − q_n(v))²                                     (Brier 1950)
    ∂D/∂log q = 2 q (q − p)

    It is a sum over the vocabulary, because the mean would be at most 2/V: too small to train a student.
    """
    p, q = pair.teacher.probs(teacher_temperature), pair.student.probs(student_temperature)
    gap = q - p

    def slope(probs: Tensor, temperature: float, factor: float) -> Slope:
        values = probs * gap
        return Slope(values, values.sum(-1), temperature, factor)

    return Result(
        squared_norm(gap),
        student=lambda: slope(q, student_temperature, 2.0),
        teacher=lambda: slope(p, teacher_temperature, -2.0),
    )


@differentiable
def cosine_logits(
    pair: Pair,
    *,
    standardize: bool = False,
) -> Result:
    """Return the cosine distance of the logits, from 0 to 2 per row.

    D_n = 1 − z_s·z_t / (‖z_s‖ ‖z_t‖)                                (Beta-KD Table 1)
    ∂D/∂z_s = (cos · ẑ_s − ẑ_t) / ‖z_s‖,  ẑ = z/‖z‖

    `standardize=True` z-scores each row over the vocabulary first; the result is then one minus the correlation.
    """
    return of_gradients(*cosine_distance(*(centred(pair) if standardize else pair.kept[:2])))


@differentiable
def cosine_probs(
    pair: Pair,
    *,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> Result:
    """Return the cosine distance of the distributions, from 0 to 1 per row.

    D_n = 1 − q_n·p_n / (‖q_n‖ ‖p_n‖)                                (Beta-KD Table 1; Ham et al. 2023)
    ∂D/∂log q = q (cos · q̂ − p̂) / ‖q‖,  q̂ = q/‖q‖
    """
    p, q = pair.teacher.probs(teacher_temperature), pair.student.probs(student_temperature)
    value, on_p, on_q = cosine_distance(p, q)

    def slope(derivative: Tensor, probs: Tensor, temperature: float) -> Slope:
        values = derivative.mul_(probs)
        return Slope(values, values.sum(-1), temperature)

    return Result(
        value,
        student=lambda: slope(on_q(), q, student_temperature),
        teacher=lambda: slope(on_p(), p, teacher_temperature),
    )
