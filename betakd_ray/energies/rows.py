"""Other numbers of a row of logits: the cross-entropy with the data, and what is logged beside the energies."""

from jaxtyping import Float, Int
from torch import Tensor

from betakd_ray.energies.arithmetic import centre, kept_logits, log_probabilities, soft_cross_entropy


def cross_entropy(student_logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return the negative log-likelihood of the target ids, in nats per row.

    CE_n = −log q_n(y_n)                                             (Beta-KD §3.1)

    Every row counts. A target outside the vocabulary, such as the label −100, is an error (IndexError or RuntimeError
    from torch's gather); it does not give zero.
    """
    log_q = log_probabilities(student_logits)
    return -log_q.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)


def entropy(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """Return the Shannon entropy of softmax(logits), in nats per row, from 0 to log V.

    H_n = −Σ_v p_n(v) log p_n(v)                                     (Shannon 1948)
    """
    log_p = log_probabilities(logits)
    # Detached, because the derivative through log p is zero, as in `kl`.
    return soft_cross_entropy(log_p, log_p.detach())


def matching_distance(
    teacher_logits: Float[Tensor, "rows vocab"], student_logits: Float[Tensor, "rows vocab"]
) -> Float[Tensor, " rows"]:
    """Return the mean absolute difference of the logits after centring each row, in units of the logits.

    (1/V) Σ_v |(z_t(v) − z̄_t) − (z_s(v) − z̄_s)|                      (Beta-KD Figure 5)

    Centring removes the constant that softmax ignores. V counts the ids that are not masked out.
    """
    teacher, student, masked, size = kept_logits(teacher_logits, student_logits)
    return centre(teacher - student, masked, size).abs().sum(-1) / size.squeeze(-1)
