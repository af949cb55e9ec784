"""Plan of a job: which samples it reads, in which order, and which are quarantined. Independent of how they are read.

An epoch is a list of passes over shards; each epoch has its own order. Neighbours in that order form a group. One read
task interleaves the shards of a group, so that a step mixes shards. The plan takes a few bytes for each (epoch, shard).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import starmap
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from betakd_ray.batch.sample import Sample
from betakd_ray.data.ledger import MAX_PLACES, MAX_SAMPLES, MAX_SHARDS, Ledger, SampleIds
from betakd_ray.data.shards import Shard
from betakd_ray.errors import DataError, TooManyBadSamples
from betakd_ray.spec import DataSpec

MIXED_SHARDS = 8
"""Number of shards in a group, and of shards that a read task has open at a time."""
MIN_GROUPS = 4
"""Number of groups that an epoch of a small set is divided into, so that several processes read it."""
MAX_TASKS = 4000
"""Largest number of groups over all epochs.

A read task costs the driver some kilobytes and half a millisecond, before the first row and again at each restart.
"""
MAX_PLANNED = 1 << 53
"""Largest number of samples over all epochs: sums of them are int64."""
MAX_REASON = 1000
"""Largest number of characters of the reason why a sample is in quarantine."""
_ORDER, _WINDOW, _MIX = range(3)
"""Tags of the random streams that are drawn from one seed."""


class Pass(NamedTuple):
    """One reading of a shard in every epoch: of the whole shard or of a part."""

    shard: Shard
    samples: int
    """Number of samples per epoch; fewer than the shard has if an epoch takes only a part of it."""


@dataclass(frozen=True)
class Plan:
    """Every pass over a shard of every epoch, and the order in which they are read.

    A sample is identified by (epoch, shard, index): `shard` is the number of the pass in `shards`, and `index` runs
    from 0 to the pass's samples - 1 in every epoch. `members` gives its number in the shard's file, its *member*.
    """

    shards: tuple[Shard, ...]
    """One entry for each pass over a shard: a shard that is read twice per epoch is here twice."""
    epochs: int
    seed: int
    shuffle: bool
    parts: tuple[tuple[int, int], ...] = ()
    """Pairs (number of the pass, samples per epoch) for the passes that take only a part of their shard."""

    @classmethod
    def of(cls, passes: Iterable[Pass], epochs: int, seed: int, shuffle: bool) -> "Plan":
        """Make the plan whose epochs consist of these passes. Raises DataError if they cannot be planned."""
        passes = tuple(passes)
        parts = [(at, one.samples) for at, one in enumerate(passes) if one.samples != one.shard.samples]
        plan = cls(tuple(one.shard for one in passes), epochs, seed, shuffle, tuple(parts))
        try:
            plan.require_sound()
        except ValueError as error:
            raise DataError(f"data.train: {error}. Correct the data, their weights or training.epochs.") from error
        return plan

    def require_sound(self) -> None:
        """Raise ValueError for numbers that are impossible, or so large that arrays of them fill the memory."""
        passes = len(self.shards)
        if passes > MAX_SHARDS or self.epochs * passes > MAX_PLACES:
            raise ValueError(
                f"{passes} passes over shards in each of {self.epochs} epochs, but at most {MAX_SHARDS} in an epoch "
                f"and {MAX_PLACES} in all can be planned"
            )
        for shard in self.shards:
            if not 1 <= shard.samples <= MAX_SAMPLES:
                raise ValueError(f"{shard.url}: {shard.samples} samples, not 1 to {MAX_SAMPLES}")
            shard.url.encode()  # a name that is not UTF-8 could be written to plan.json, but not read
        before = -1
        for number, samples in self.parts:
            if not before < number < passes or not 1 <= samples < self.shards[number].samples:
                raise ValueError(f"parts: {samples} samples of shard {number} are no part of it, or stand twice")
            before = number
        if self.samples > MAX_PLANNED:
            raise ValueError(f"{self.samples} samples, but at most {MAX_PLANNED} can be planned")

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Return [passes] the number of samples of each pass per epoch."""
        sizes = np.fromiter((shard.samples for shard in self.shards), np.int64, len(self.shards))
        for number, samples in self.parts:
            sizes[number] = samples
        return sizes

    @property
    def samples(self) -> int:
        """Return the number of planned samples over all epochs."""
        return self.epochs * int(self.sizes.sum())

    @cached_property
    def distinct(self) -> tuple[Shard, ...]:
        """Return the shards, each once."""
        return tuple(dict.fromkeys(self.shards))

    @cached_property
    def repeats(self) -> NDArray[np.int32]:
        """Return [passes] 1 for the first pass over a shard, 2 for its second, and so on."""
        seen: dict[Shard, int] = {}
        counts = np.ones(len(self.shards), np.int32)
        for number, shard in enumerate(self.shards):
            counts[number] = seen[shard] = seen.get(shard, 0) + 1
        return counts

    def has(self, epoch: int, shard: int, index: int) -> bool:
        """Return whether a sample is planned."""
        return 0 <= epoch < self.epochs and 0 <= shard < len(self.shards) and 0 <= index < int(self.sizes[shard])

    def empty_ledger(self) -> Ledger:
        """Make a ledger in which nothing is done."""
        return Ledger(self.sizes)

    # ------------------------------------------------------------------------------------------- the order

    @property
    def groups(self) -> int:
        """Return the number of groups of an epoch. It depends only on the plan, so a seed gives one order.

        A group has MIXED_SHARDS shards. It has fewer for small sets, which would otherwise have too few groups to be
        read in parallel, and more if there would be more than MAX_TASKS groups over all epochs.
        """
        shards = len(self.shards)
        size = min(MIXED_SHARDS, max(2, shards // MIN_GROUPS))
        size = max(size, -(-shards * self.epochs // MAX_TASKS))
        return max(1, shards // size)

    def bounds(self) -> NDArray[np.int64]:
        """Return [groups + 1] where each group begins in an epoch's order; it ends where the next begins."""
        return np.arange(self.groups + 1, dtype=np.int64) * len(self.shards) // self.groups

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return [passes] the numbers of the passes in the order of this epoch."""
        order = np.arange(len(self.shards))
        if self.shuffle:
            self._random(_ORDER, epoch).shuffle(order)
        return order

    def mixing(self, epoch: int, first: int) -> np.random.Generator:
        """Return the random generator that interleaves the group that begins at `first`."""
        return self._random(_MIX, epoch, first)

    def members(self, epoch: int, shard: int) -> NDArray[np.int64]:
        """Return [samples of the pass] the members that this epoch takes: numbers in the shard's file, ascending.

        A pass over a part of a shard moves a window over one permutation of the shard. With a part of 1/n of the shard,
        n epochs take each sample once.
        """
        samples, planned = self.shards[shard].samples, int(self.sizes[shard])
        if planned == samples:
            return np.arange(samples)
        window = (epoch * planned + np.arange(planned)) % samples
        # Sorted, because a shard is read from front to back.
        return np.sort(self._random(_WINDOW, shard).permutation(samples)[window])

    def member(self, epoch: int, shard: int, index: int) -> int:
        """Return the number in the shard's file of one planned sample, its member."""
        return int(self.members(epoch, shard)[index])

    def _random(self, *tags: int) -> np.random.Generator:
        # A spawn key instead of a longer seed: numpy treats the seeds (seed, epoch) and (seed, epoch, 0) as the same.
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=tags))

    # -------------------------------------------------------------------------------------------- transport

    def __reduce__(self) -> tuple[Any, ...]:
        # Column by column: pickling 200,000 dataclasses takes seconds, in every process that gets the plan.
        place = {shard: at for at, shard in enumerate(self.distinct)}
        which = np.fromiter((place[shard] for shard in self.shards), np.int32, len(self.shards))
        columns = tuple(
            [getattr(shard, name) for shard in self.distinct] for name in ("url", "samples", "bytes", "checksum")
        )
        return _unpickled, (columns, which, self.epochs, self.seed, self.shuffle, self.parts)


def _unpickled(columns: tuple[list[Any], ...], which: NDArray[np.int32], *rest: Any) -> Plan:
    distinct = list(starmap(Shard, zip(*columns, strict=True)))
    return Plan(tuple(distinct[at] for at in which.tolist()), *rest)


@dataclass(frozen=True)
class Quarantined:
    """A sample that takes no part in training, and why."""

    epoch: int
    shard: int
    index: int
    key: str
    reason: str

    def __post_init__(self) -> None:
        # It may quote a sample's content, of any length; the monitor and every checkpoint hold all reasons.
        if len(self.reason) > MAX_REASON:
            object.__setattr__(self, "reason", f"{self.reason[: MAX_REASON - 1]}…")


def require_few(fraction: float, data: DataSpec, plan: Plan, last: Quarantined) -> None:
    """Raise TooManyBadSamples if the quarantined fraction of the plan is above the limit."""
    if fraction > data.max_bad_fraction:
        raise TooManyBadSamples(
            f"{fraction:.2%} of the planned samples are quarantined, above data.max_bad_fraction "
            f"{data.max_bad_fraction:.2%}; the last: {last.key} of {plan.shards[last.shard].url}: {last.reason}. "
            "Repair the data, or raise the limit."
        )


def ids_of(samples: Sequence[Quarantined | Sample]) -> SampleIds:
    """Return the ids of samples, as the ledger takes them."""
    places = np.array([(each.epoch, each.shard, each.index) for each in samples], np.int32).reshape(-1, 3)
    return SampleIds(*places.T)
