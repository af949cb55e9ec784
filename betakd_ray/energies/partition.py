"""The head of a distribution: its most probable ids, up to a mass, without a sort of the vocabulary if possible."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from betakd_ray.energies.closed_form import is_known

FIRST = 64
"""Number of largest probabilities that are tried first; with a trained teacher they hold the head of most rows."""


def head_of(p: Float[Tensor, "rows vocab"], mass: float) -> Bool[Tensor, "rows vocab"]:
    """Return whether an id is in the head: the ids before it, by falling probability, hold less than `mass`.

    So the first id always is. Equally probable ids are taken in their order, so every device gives the same result.
    """
    least, count = _least_and_count(p, mass)
    head = p > least
    left = count - head.sum(-1, keepdim=True)
    last = p == least
    if is_known(p) and torch.equal(last.sum(-1, keepdim=True), left):
        return head | last
    return head | last & (last.cumsum(-1) <= left)


def _least_and_count(
    p: Float[Tensor, "rows vocab"], mass: float
) -> tuple[Float[Tensor, "rows 1"], Int[Tensor, "rows 1"]]:
    """Return the smallest probability in each row's head, and the number of its ids."""
    if not is_known(p) or p.shape[1] <= FIRST:
        return _of_sorted(p.sort(dim=-1, descending=True).values, mass)
    first = p.topk(FIRST, dim=-1).values
    least, count = _of_sorted(first, mass)
    # A row whose first ids hold less has more ids in its head. A NaN sorts its row too.
    rows = (~(first.sum(-1) > mass + 1e-3)).nonzero()[:, 0]
    if len(rows):
        # Values alone, and by numpy, which is ten times as fast as torch's sort of values and ids.
        falling = np.sort(p[rows].numpy(), axis=-1)[:, ::-1]
        least[rows], count[rows] = _of_sorted(torch.from_numpy(np.ascontiguousarray(falling)), mass)
    return least, count


def _of_sorted(
    falling: Float[Tensor, "rows ids"], mass: float
) -> tuple[Float[Tensor, "rows 1"], Int[Tensor, "rows 1"]]:
    """Return the same of probabilities in falling order."""
    before = falling.cumsum(-1).roll(1, dims=-1)
    before[:, 0] = 0.0
    count = (before < mass).sum(-1, keepdim=True)
    # 0 only with a NaN, for which there is no head.
    return falling.gather(-1, (count - 1).clamp_min(0)), count
