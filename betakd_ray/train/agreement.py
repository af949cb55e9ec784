"""Agreement of the ranks on the next step: how many samples, micro-batches and tokens it has.

The ranks' feeds agree here, one step ahead of the training. So no collective of the training waits for a teacher or for
data. The result does not depend on the speed of any rank or teacher.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

Gather = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Function that maps this rank's numbers [n] to every rank's [ranks, n] (collective: every rank must call it)."""


def shares(global_batch: int, ranks: int, step: int) -> list[int]:
    """Return how many samples of a global batch each rank has in a step.

    Shares differ by at most one sample. The ranks with the larger share change from step to step. So, over many steps,
    all ranks do the same work, and no rank uses up its rows before the others.
    """
    share, larger = divmod(global_batch, ranks)
    return [share + ((rank - step * larger) % ranks < larger) for rank in range(ranks)]


def allot(missing: int, spare: Sequence[int]) -> list[int] | None:
    """Return how many of its spare samples each rank gives to fill a step; None if the ranks have too few together.

    The numbers are as even as `spare` allows.
    """
    if sum(spare) < missing:
        return None
    given = [0] * len(spare)
    while missing:
        # Several rounds, because a rank with few spare samples cannot give an even part: the others give the rest.
        able = [rank for rank, more in enumerate(spare) if more > given[rank]]
        each, rest = divmod(missing, len(able))
        for number, rank in enumerate(able):
            part = min(each + (number < rest), spare[rank] - given[rank])
            given[rank] += part
            missing -= part
    return given


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of tokens in a step, as the student's tokenizer and processor make them."""

    prompt: int = 0
    """Text tokens that belong neither to an answer nor to an image."""
    image: int = 0
    answer: int = 0
    padding: int = 0

    @property
    def real(self) -> int:
        """Return the number of tokens without padding."""
        return self.prompt + self.image + self.answer

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(
            self.prompt + other.prompt,
            self.image + other.image,
            self.answer + other.answer,
            self.padding + other.padding,
        )


COLUMNS = (
    "taken",
    "valid",
    "micro_batches",
    "squares",
    "pixels",
    *(each.name for each in fields(TokenCounts)),
    "save",
    "stop",
)
"""Names of the numbers in `Proposal.vector`, in their order."""
TAKEN, STOP = COLUMNS.index("taken"), COLUMNS.index("stop")


@dataclass(frozen=True)
class Proposal:
    """What one rank brings to a step, before the ranks have agreed."""

    taken: int
    """Number of samples of the plan, including those that cannot be trained on."""
    valid: int = 0
    """Number of samples that take part in the loss."""
    micro_batches: int = 0
    squares: int = 0
    """Σ L² over the valid samples, where L is the length in tokens. The FLOPs of attention grow with it."""
    pixels: int = 0
    """Number of values that the vision tower takes as input."""
    tokens: TokenCounts = TokenCounts()
    save: bool = False
    """True if this rank asks for a checkpoint after the step."""
    stop: bool = False
    """True if this rank asks to stop before this step."""

    def vector(self) -> NDArray[np.float64]:
        """Return the proposal as numbers [COLUMNS], for `Gather`."""
        numbers = vars(self) | vars(self.tokens)
        # float64 has every whole number up to 2**53. float32 would round Σ L² above 2**24.
        return np.array([numbers[name] for name in COLUMNS], np.float64)


@dataclass(frozen=True)
class StepCounts:
    """Counts over the global batch of a step. They are equal on every rank."""

    samples: int
    """Number of samples that take part: the denominator of the loss."""
    dropped: int
    """Number of samples that take no part: the teacher gave no answer, or one that is not finite."""
    most_samples: int
    """Number of valid samples on the rank that has most."""
    micro_batches: int
    """Number of micro-batches that every rank runs. A rank that has fewer adds empty ones, whose weight is zero."""
    squares: int
    """Σ L² over the samples, where L is the length in tokens."""
    pixels: int
    tokens: TokenCounts
    save: bool

    @classmethod
    def of(cls, everyone: NDArray[np.float64]) -> "StepCounts":
        """Sum up every rank's `Proposal.vector` [ranks, COLUMNS]."""
        total, most = (
            dict(zip(COLUMNS, map(int, numbers), strict=True))
            for numbers in (everyone.sum(axis=0), everyone.max(axis=0))
        )
        return cls(
            samples=total["valid"],
            dropped=total["taken"] - total["valid"],
            most_samples=most["valid"],
            micro_batches=max(1, most["micro_batches"]),
            squares=total["squares"],
            pixels=total["pixels"],
            tokens=TokenCounts(**{each.name: total[each.name] for each in fields(TokenCounts)}),
            save=bool(most["save"]),
        )


def gather_over(group: dist.ProcessGroup) -> Gather:
    """Return a `Gather` over a gloo process group that only the feeds use.

    In a group shared with the training, collectives of two threads could be matched in different orders on the ranks.
    """

    def gather(mine: NDArray[np.float64]) -> NDArray[np.float64]:
        everyone = [torch.empty(len(mine), dtype=torch.float64) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, torch.from_numpy(mine), group=group)
        return torch.stack(everyone).numpy()

    return gather
