"""What the checks measure: losses and distances of distributions in nats, and means that are told from chance."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from betakd_ray.check.subject import Subject, targets

SIGMAS = 4.0
"""Standard errors by which a mean must differ from zero to count: about 1 of 30,000 draws does so by chance."""


def losses(subject: Subject, shifts: Sequence[int]) -> dict[int, Tensor]:
    """Return each sample's mean cross-entropy in nats [samples] for each shift of its answer's tokens by places.

    It is NaN for a sample without a target.
    """
    found: dict[int, list[Tensor]] = {shift: [] for shift in shifts}
    for rendering, logits in zip(subject.renderings, subject.each_logits(subject.hidden), strict=True):
        for shift in shifts:
            found[shift].append(_loss(logits, targets(rendering, shift).to(logits.device)))
    return {shift: torch.stack(each).cpu() for shift, each in found.items()}


def _loss(logits: Tensor, wanted: Tensor) -> Tensor:
    count = min(len(logits), len(wanted))
    logits, wanted = logits[:count], wanted[:count]
    has_target = (wanted >= 0) & (wanted < logits.shape[1])
    return torch.nn.functional.cross_entropy(logits[has_target], wanted[has_target])


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
