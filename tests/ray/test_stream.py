"""The stream in Ray Data: blocks as the reader made them, each row once, to a rank that no timing decides."""

import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
import ray

from betakd_ray.data.ledger import Ledger, SampleIds
from betakd_ray.data.plan import Plan
from betakd_ray.data.shards import Shard
from betakd_ray.on_ray.source import SplitOnce
from betakd_ray.on_ray.stream import stream
from betakd_ray.spec import PoolSpec

SIZES = (40, 37, 3, 25, 40, 11, 30, 1)
PLAN = Plan(tuple(Shard(f"{n}.tar", size, 1, "") for n, size in enumerate(SIZES)), 2, seed=0, shuffle=True)


@dataclass
class FakeReader:
    """Reader that yields blocks of numbers after a delay."""

    pauses: tuple[float, ...]
    row_bytes: int = 1000

    def blocks(self, epoch: int, first: int, last: int, done: Ledger, rows: int, size: int):
        time.sleep(self.pauses[first % len(self.pauses)])
        for shard in PLAN.order(epoch)[first:last].tolist():
            indexes = np.flatnonzero(~done.done(epoch, shard)).astype(np.int32)
            for at in range(0, len(indexes), rows):
                part = indexes[at : at + rows]
                place = {"epoch": np.full_like(part, epoch), "shard": np.full_like(part, shard), "index": part}
                content = pa.array([bytes(self.row_bytes)] * len(part))
                yield pa.table({**{name: pa.array(column) for name, column in place.items()}, "content": content})


@ray.remote(num_cpus=0)
def consume(split) -> list[list[tuple[int, int, int]]]:
    """Return the blocks of one rank, each a list of ids."""
    found = []
    for table in split.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        columns = (table[name].to_pylist() for name in ("epoch", "shard", "index"))
        found.append(list(zip(*columns, strict=True)))
    return found


def ranks(pauses, done=None, world_size=2, row_bytes=1000):
    reader = ray.put(FakeReader(pauses, row_bytes))
    dataset = stream(reader, PLAN, done or PLAN.empty_ledger(), PoolSpec(cpus=1), workers=world_size)
    splits = SplitOnce().configure({"train": dataset}, world_size, None, None)
    return ray.get([consume.remote(split["train"]) for split in splits])


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_row_reaches_one_rank_and_which_one_does_not_depend_on_timing(ray_cluster, world_size):
    found = ranks((0.0,), world_size=world_size)
    again = ranks((0.8, 0.0, 0.3), world_size=world_size)
    assert found == again
    rows = [row for rank in found for block in rank for row in block]
    planned = [(e, s, i) for e in range(2) for s, size in enumerate(SIZES) for i in range(size)]
    assert sorted(rows) == planned
    limit = -(-len(planned) // (8 * world_size))
    assert max(len(block) for rank in found for block in rank) <= limit
    counts = [sum(map(len, rank)) for rank in found]
    assert max(counts) - min(counts) <= limit


def test_what_the_ledger_has_is_not_read(ray_cluster):
    done = PLAN.empty_ledger()
    index = np.arange(40, dtype=np.int32)
    done.add(SampleIds(np.zeros_like(index), np.zeros_like(index), index))
    done.add(SampleIds(*np.array([(1, 1, 36), (1, 7, 0)], np.int32).T))
    rows = [row for rank in ranks((0.0,), done) for block in rank for row in block]
    assert len(rows) == len(set(rows)) == PLAN.samples - 42
    assert not done.holds(SampleIds(*np.array(rows, np.int32).T)).any()


def test_blocks_come_as_the_reader_made_them(ray_cluster):
    """Ray Data would join small blocks and split large ones; see AsTheyCome."""
    for row_bytes in (10, 200_000):
        rank = ranks((0.0,), world_size=1, row_bytes=row_bytes)[0]
        sizes = [size for epoch in range(2) for size in np.array(SIZES)[PLAN.order(epoch)].tolist()]
        rows = -(-PLAN.samples // 8)
        expected = [min(rows, size - at) for size in sizes for at in range(0, size, rows)]
        assert [len(block) for block in rank] == expected
