"""Shards that an epoch reads, and how often: entries of `data.train` with weights → passes over shards."""

import math
from collections.abc import Iterator

from betakd_ray.data.manifest import find_shards
from betakd_ray.data.plan import Pass
from betakd_ray.data.shards import Shard
from betakd_ray.errors import DataError
from betakd_ray.spec import DataSpec


def find_passes(data: DataSpec) -> list[Pass]:
    """Return the passes of an epoch, in the order in which they are read without shuffling.

    Without weights, every shard is read once, sorted by URL. With weights, the entries follow one another: first the
    whole passes of an entry, then the fraction of its weight as a part of each shard.

    Raises DataError as `find_shards` does, and if there are weights and two entries name the same shard.
    """
    if all(entry.weight == 1 for entry in data.train):
        # One call for all entries, so that a shard that two of them name is read only once.
        return [Pass(shard, shard.samples) for shard in find_shards(data.paths, data.storage, data.manifest)]
    found = [find_shards([entry.path], data.storage, data.manifest) for entry in data.train]
    _require_disjoint(found)
    return [one for entry, shards in zip(data.train, found, strict=True) for one in passes_of(shards, entry.weight)]


def passes_of(shards: list[Shard], weight: float) -> Iterator[Pass]:
    """Yield passes that read the shards `weight` times per epoch.

    A part has at least one sample, so that every shard is used.
    """
    whole = math.floor(weight)
    for _ in range(whole):
        yield from (Pass(shard, shard.samples) for shard in shards)
    if part := weight - whole:
        yield from (Pass(shard, max(1, math.floor(part * shard.samples + 0.5))) for shard in shards)


def _require_disjoint(found: list[list[Shard]]) -> None:
    """Raise DataError if a shard belongs to two entries, because it would have two weights."""
    entry_of: dict[str, int] = {}
    for entry, shards in enumerate(found):
        for shard in shards:
            if (other := entry_of.setdefault(shard.url, entry)) != entry:
                raise DataError(
                    f"data.train.{entry}: {shard.url} is also in data.train.{other}. If an entry has a weight, name "
                    "each shard in only one entry; to read it more often, give that entry a larger weight."
                )
