"""What a job reads, in which order, and what of it takes no part. Knows nothing of how a sample is read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from betakd_ray.data.ledger import Ledger, SampleIds
from betakd_ray.data.shards import Shard
from betakd_ray.errors import TooManyBadSamples
from betakd_ray.spec import DataSpec


@dataclass(frozen=True)
class Plan:
    """Every (epoch, shard) of a job, in the order in which it is read."""

    shards: tuple[Shard, ...]
    epochs: int
    seed: int
    shuffle: bool

    @property
    def samples(self) -> int:
        """Samples over all epochs."""
        return self.epochs * sum(shard.samples for shard in self.shards)

    def places(self) -> Iterator[tuple[int, int]]:
        """(epoch, shard) pairs; each epoch is a permutation of its own."""
        for epoch in range(self.epochs):
            order = np.arange(len(self.shards))
            if self.shuffle:
                np.random.default_rng((self.seed, epoch)).shuffle(order)
            for shard in order:
                yield epoch, int(shard)

    def empty_ledger(self) -> Ledger:
        return Ledger([shard.samples for shard in self.shards])


@dataclass(frozen=True)
class Quarantined:
    """A sample that takes no part in training, and why."""

    epoch: int
    shard: int
    index: int
    key: str
    reason: str


def require_few(fraction: float, data: DataSpec, plan: Plan, last: Quarantined) -> None:
    """Raises TooManyBadSamples if the quarantined share of the plan is above the limit."""
    if fraction > data.max_bad_fraction:
        raise TooManyBadSamples(
            f"{fraction:.2%} of the planned samples are quarantined, above data.max_bad_fraction "
            f"{data.max_bad_fraction:.2%}; the last: {last.key} of {plan.shards[last.shard].url}: {last.reason}. Mend "
            "the data, or raise the limit."
        )


def ids_of(quarantined: Sequence[Quarantined]) -> SampleIds:
    """Their places, as the ledger takes them."""
    places = np.array([(bad.epoch, bad.shard, bad.index) for bad in quarantined], np.int32).reshape(-1, 3)
    return SampleIds(*places.T)
