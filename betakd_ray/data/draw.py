"""Some samples of a plan's data, for checks before it is read: always the same ones, and outside of its accounts."""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice, zip_longest

import numpy as np
from numpy.typing import NDArray

from betakd_ray.data.plan import Plan
from betakd_ray.data.samples import RawSample
from betakd_ray.data.shards import Shard, read_shard_with_retry
from betakd_ray.spec import DataSpec, StorageSpec

SHARDS = 8
"""Number of shards from which samples are drawn; more if the data are in more folders."""
DEPTH = 4
"""Samples of the beginning of a shard per sample that is drawn from it, so that no large shard is read to its end."""
SEED = 0
"""Seed of the draw. It is fixed, so that a resumed run and another run of the same data ask the same samples."""


def draw_samples(plan: Plan, data: DataSpec, count: int) -> list[RawSample]:
    """Return about `count` usable samples of the plan's data, spread over its folders and shards.

    Three of four have images, as far as there are some. The ledger is not touched: a drawn sample is read again when
    its turn comes. Raises DataError as the plan's reader does.
    """
    random = np.random.default_rng(SEED)
    shards = _spread(plan, random)
    each = -(-count // len(shards))
    wanted = [_places(shard, each, random) for shard in shards]
    with ThreadPoolExecutor(SHARDS, thread_name_prefix="draw") as readers:
        by_shard = list(readers.map(partial(_read, data.storage), shards, wanted))
    # By turns, so that the first ones are from all shards too: a check may need only a few.
    found = [sample for turn in zip_longest(*by_shard) for sample in turn if sample is not None]
    return _mixed(found)[:count]


def _spread(plan: Plan, random: np.random.Generator) -> list[Shard]:
    """Choose shards by turns from all folders: the parts of a mixture are usually in folders of their own."""
    folders: dict[str, list[Shard]] = defaultdict(list)
    for at in random.permutation(len(plan.distinct)).tolist():
        shard = plan.distinct[at]
        folders[shard.url.rpartition("/")[0]].append(shard)
    by_turns = chain.from_iterable(zip_longest(*(folders[name] for name in sorted(folders))))
    return list(islice(filter(None, by_turns), max(SHARDS, len(folders))))


def _places(shard: Shard, count: int, random: np.random.Generator) -> NDArray[np.bool_]:
    """Return [samples] whether a sample of the shard is drawn."""
    depth = min(shard.samples, DEPTH * count)
    drawn = np.zeros(shard.samples, dtype=bool)
    drawn[random.permutation(depth)[:count]] = True
    return drawn


def _read(storage: StorageSpec, shard: Shard, drawn: NDArray[np.bool_]) -> list[RawSample]:
    # Ends after the last drawn sample: the rest of the file is not read, and so not compared with its checksum.
    samples = islice(read_shard_with_retry(shard, storage, skip=~drawn), int(drawn.sum()))
    return [sample for sample in samples if isinstance(sample, RawSample)]


def _mixed(samples: list[RawSample]) -> list[RawSample]:
    """Order samples so that every fourth is without an image: groups of both kinds are where padding goes wrong."""
    seen, ranks = {True: 0, False: 0}, list[float]()
    for sample in samples:
        has_image = bool(sample.images)
        ranks.append(seen[has_image] if has_image else 3 * seen[has_image] + 2.5)
        seen[has_image] += 1
    return [samples[at] for at in np.argsort(ranks, kind="stable").tolist()]
