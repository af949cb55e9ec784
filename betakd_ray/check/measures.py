"""What the checks measure: losses and distances of distributions in nats, and means that are told from chance."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from betakd_ray.check.subject import Subject, targets

SIGMAS = 4.0
"""Standard errors by which a mean must differ from zero to count: about 1 of 30,000 draws does so by chance."""


def losses(subject: Subject, hidden: Tensor, wanted: Tensor) -> Tensor:
    """Return the cross-entropy of each row that has a target, in nats."""
    logits = subject.logits(hidden)[: len(wanted)]
    has_target = (wanted[: len(logits)] >= 0) & (wanted[: len(logits)] < logits.shape[1])
    return torch.nn.functional.cross_entropy(
        logits[has_target].float(), wanted[: len(logits)][has_target], reduction="none"
    )


def loss(subject: Subject, hidden: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return each sample's mean cross-entropy in nats [samples]; NaN for a sample without a target."""
    return torch.stack([losses(subject, *pair).mean() for pair in zip(hidden, wanted, strict=True)])


def own_loss(subject: Subject) -> Tensor:
    """Return each sample's mean cross-entropy of its true answer, in nats."""
    return loss(subject, subject.hidden, [targets(each) for each in subject.renderings])


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return the Kullback–Leibler divergence KL(first ‖ second) of each row of logits, in nats."""
    p, q = first.double().log_softmax(-1), second.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def relative_difference(first: Tensor, second: Tensor) -> float:
    """Return ‖first − second‖ / ‖second‖; NaN if one of them is not finite."""
    first, second = first.double(), second.double()
    return float((first - second).norm() / second.norm().clamp(min=1e-30))


def is_positive(values: Tensor, sigmas: float = 3.0) -> bool:
    """Return whether the mean of independent values is above zero by more than chance."""
    return _score(values) > sigmas


def is_negative(values: Tensor, sigmas: float = SIGMAS) -> bool:
    """Return whether the mean of independent values is below zero by more than chance."""
    return _score(values) < -sigmas


def _score(values: Tensor) -> float:
    """Return the mean in standard errors."""
    values = values[values.isfinite()].double()
    if len(values) < 2:
        return 0.0
    error = float(values.std()) / math.sqrt(len(values))
    return float(values.mean()) / max(error, 1e-12)
