"""Blocks per second through Ray Data's executor: `python -m benchmarks.stream_rate`, one minute on two cores.

The stream and its split are the real ones. Readers make blocks of zeros, whose only cost is the copy into the object
store; ranks read and drop them. So the measured limit is the executor, which is one process for the whole job.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
from ray.actor import ActorHandle

from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Plan
from betakd_ray.data.shards import Shard
from betakd_ray.on_ray.source import SplitOnce
from betakd_ray.on_ray.stream import stream
from betakd_ray.spec import PoolSpec

ROWS = 256


@dataclass
class Zeros:
    """Fake reader whose blocks are zeros."""

    plan: Plan
    block_bytes: int

    def blocks(self, epoch: int, first: int, last: int, done: Ledger, rows: int, size: int) -> Iterator[pa.Table]:
        """Yield blocks of `ROWS` rows, whatever size is asked for."""
        content = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(self.block_bytes // ROWS), ROWS, [None, pa.py_buffer(bytes(self.block_bytes))]
        )
        for shard in self.plan.order(epoch)[first:last].tolist():
            for _ in range(self.plan.shards[shard].samples // ROWS):
                yield pa.table({"shard": pa.array(np.full(ROWS, shard, np.int32)), "content": content})


@dataclass
class Rate:
    """Measurement of the executor's rate."""

    block_mb: float
    pause_ms: float
    blocks: int
    seconds: float
    executor_cpu: float
    """Number of cores that the executor's process used in that time."""

    @property
    def blocks_per_second(self) -> float:
        return self.blocks / self.seconds


@ray.remote(num_cpus=0)
class Rank:
    """Fake student that drops what it reads."""

    def read(self, split: Any) -> tuple[int, float, float]:
        """Return the number of blocks after the first, and the times of the first and the last block in seconds."""
        times = [time.time() for _ in split.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)]
        return len(times) - 1, times[0], times[-1]


def measure(block_bytes: int, pause_s: float, blocks: int = 640, ranks: int = 2, shards: int = 32) -> Rate:
    """Measure the rate at which blocks reach the ranks, from the first block to the last. Needs a running Ray."""
    of_each = blocks // shards * ROWS
    plan = Plan(tuple(Shard(f"{n}.tar", of_each, 1, "") for n in range(shards)), 1, seed=0, shuffle=True)
    reader = ray.put(Zeros(plan, block_bytes))
    dataset = stream(reader, plan, plan.empty_ledger(), PoolSpec(cpus=1), ranks)
    dataset.context.custom_execution_callback_classes = [throttle(pause_s)]
    splits: list[Any] = [split["train"] for split in SplitOnce().configure({"train": dataset}, ranks, None, None)]
    readers = [cast(ActorHandle, Rank.remote()) for _ in splits]
    coordinator = splits[0]._coord_actor
    process: Any = ray.get(coordinator.__ray_call__.remote(lambda _: os.getpid()))
    begun = _cpu_s(process)
    found = ray.get([rank.read.remote(split) for rank, split in zip(readers, splits, strict=True)])
    spent = _cpu_s(process) - begun
    for actor in (*readers, coordinator):
        ray.kill(actor)
    seconds = max(last for *_, last in found) - min(first for _, first, _ in found)
    return Rate(block_bytes / 1e6, 1000 * pause_s, sum(count for count, *_ in found), seconds, spent / seconds)


def throttle(pause_s: float) -> type:
    """Return an ExecutorThrottle with another pause, in seconds.

    The class is local, so that it is pickled by value: it runs in another process.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Throttle(ExecutionCallback):
        def on_execution_step(self, executor: object) -> None:
            time.sleep(pause_s)

    return Throttle


def _cpu_s(process: int) -> float:
    """Return the CPU seconds that a process has used."""
    with open(f"/proc/{process}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=640)
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    for block_bytes, pause_s in ((1 << 20, 0.02), (4 << 20, 0.02), (16 << 20, 0.02), (4 << 20, 0.005), (4 << 20, 0.0)):
        rate = measure(block_bytes, pause_s, arguments.blocks)
        print(json.dumps(asdict(rate) | {"blocks_per_second": rate.blocks_per_second}), flush=True)
