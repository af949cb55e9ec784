"""Comparison of a teacher's stored signals with its live ones."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from betakd_ray.teacher.parts import PARTS, Signal

ROUNDING = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest relative difference between two signals of one teacher for one sample, by dtype.

Groups of other sizes use other kernels, and the rounding differences add up from layer to layer. Another template or
other weights give differences near 1.
"""


def differs(live: Signal, stored: Signal, dtype: str) -> str | None:
    """Return which part of a stored signal differs from the teacher's live signal, and by how much; None if none does.

    `dtype` is the dtype that the teacher computes in (`TeacherFacts.dtype`).
    """
    # All shapes are checked before any value, because `_missing_mass` reads two parts of a signal.
    for name, now in live.items():
        then = stored.get(name)
        if then is None or then.shape != now.shape:
            return f"{name}: has shape {None if then is None else then.shape} in the cache, but {now.shape} now"
    for name, now in live.items():
        difference = _missing_mass(live, stored) if name == "top_ids" else _difference(name, now, stored[name])
        # Not `>`, because NaN is a difference too.
        if not difference <= ROUNDING[dtype]:
            return f"{name}: a relative difference of {difference:.2g}, above {ROUNDING[dtype]:g} for {dtype}"
    return None


def _difference(name: str, now: NDArray[Any], then: NDArray[Any]) -> float:
    """Return ‖now − then‖ / ‖then‖. Log-probabilities are compared as probabilities, because most are almost zero."""
    first, second = _numbers(now), _numbers(then)
    if name == "top_log_probs":
        first, second = np.exp(first), np.exp(second)
    # The second term is the norm of an array of noise. Without it, rounding in a signal near zero would be a large
    # relative difference.
    size = np.linalg.norm(second) + PARTS[name].noise * second.size**0.5
    return float(np.linalg.norm(first - second) / max(size, 1e-12))


def _missing_mass(live: Signal, stored: Signal) -> float:
    """Return the total probability of the stored ids that are not among the live ids, as the mean over rows.

    Probability and not a count, because rounding alone swaps the last of the k ids with the next one.
    """
    # The last column belongs to no id: it is the probability of all the other ids together.
    mass = np.exp(_numbers(stored["top_log_probs"])[:, :-1])
    is_missing = ~(stored["top_ids"][:, :, None] == live["top_ids"][:, None, :]).any(axis=2)
    return float((mass * is_missing).sum(axis=1).mean())


def _numbers(array: NDArray[Any]) -> NDArray[np.float64]:
    if array.dtype == np.uint16:
        array = torch.from_numpy(array.copy()).view(torch.bfloat16).float().numpy()
    return array.astype(np.float64)
