"""What the ranks must know of each other before a step: how many samples, micro-batches and tokens it has.

The ranks' feeds agree here, one step ahead of the training, so that waiting for a teacher or for data holds up no
collective of the training itself. Nothing here depends on how fast anybody is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

Gather = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Collective: this rank's numbers [n] → every rank's [ranks, n]."""


def shares(global_batch: int, ranks: int, step: int) -> list[int]:
    """Return how many samples of a global batch each rank has in a step.

    Shares differ by at most one sample. Which ranks have the larger one rotates, so that over many steps all ranks do
    the same work, and no rank's rows run out before the others'.
    """
    share, larger = divmod(global_batch, ranks)
    return [share + ((rank - step * larger) % ranks < larger) for rank in range(ranks)]


def allot(missing: int, spare: Sequence[int]) -> list[int] | None:
    """Return how many of its spare samples each rank gives to fill a step, as evenly as it goes; None if too few."""
    if sum(spare) < missing:
        return None
    given = [0] * len(spare)
    while missing:
        able = [rank for rank, more in enumerate(spare) if more > given[rank]]
        each, rest = divmod(missing, len(able))
        for number, rank in enumerate(able):
            part = min(each + (number < rest), spare[rank] - given[rank])
            given[rank] += part
            missing -= part
    return given


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of the student's view in a step."""

    prompt: int = 0
    """Text that is neither answer nor image."""
    image: int = 0
    answer: int = 0
    padding: int = 0

    @property
    def real(self) -> int:
        """Return all but the padding."""
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
"""What the numbers of a `Proposal` are, in the order in which they travel."""
TAKEN, STOP = COLUMNS.index("taken"), COLUMNS.index("stop")


@dataclass(frozen=True)
class Proposal:
    """One rank's part of a step, as it stands."""

    taken: int
    """Samples of the plan, those that cannot be trained on included."""
    valid: int = 0
    """Samples that take part in the loss."""
    micro_batches: int = 0
    squares: int = 0
    """Σ L² over the lengths of valid samples, which attention's arithmetic grows with."""
    pixels: int = 0
    """Numbers that the vision tower takes."""
    tokens: TokenCounts = TokenCounts()
    save: bool = False
    """Asks for a checkpoint after the step."""
    stop: bool = False
    """Asks that this step be the first that is not done."""

    def vector(self) -> NDArray[np.float64]:
        """Return the proposal as numbers [COLUMNS], for `Gather`."""
        numbers = vars(self) | vars(self.tokens)
        return np.array([numbers[name] for name in COLUMNS], np.float64)


@dataclass(frozen=True)
class StepCounts:
    """What the global batch of a step holds. Alike on every rank."""

    samples: int
    """Samples that take part: the denominator of the loss."""
    dropped: int
    """Samples that their teacher cannot answer, or not with finite numbers: they take no part."""
    most_samples: int
    """Valid samples of the rank that has most."""
    micro_batches: int
    """Micro-batches that every rank runs; a rank that has fewer adds empty ones, whose weight is zero."""
    squares: int
    """Σ L² over the samples' lengths."""
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
    """Return a `Gather` over a gloo process group of its own: the feeds' collectives meet no others there."""

    def gather(mine: NDArray[np.float64]) -> NDArray[np.float64]:
        everyone = [torch.empty(len(mine), dtype=torch.float64) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, torch.from_numpy(mine), group=group)
        return torch.stack(everyone).numpy()

    return gather
