"""The job's one stream: a seeded plan of (epoch, shard) pairs, which Ray Data has read (`reader`).

One execution covers every epoch; what the ledger says is done is subtracted when the stream starts, so a restart with
any number of workers replays nothing and loses nothing.
"""

import time
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Plan
from betakd_ray.spec import PoolSpec

PAUSE_S = 0.02
"""A block takes longer to read, and several are ready before the students ask for them."""


class PlanSource(Datasource):
    """The plan, less what is done, as read tasks in plan order."""

    def __init__(self, reader: ray.ObjectRef, plan: Plan, ledger: Ledger) -> None:
        super().__init__()
        self._reader = reader
        self._ledger = ledger
        self._todo = [place for place in plan.places() if not ledger.is_complete(*place)]

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """One task for each (epoch, shard): a shard is the unit that is retried."""
        return [self._task(*place) for place in self._todo]

    def _task(self, epoch: int, shard: int) -> ReadTask:
        done = self._ledger.done(epoch, shard)
        size = len(done)
        metadata = BlockMetadata(num_rows=int(size - done.sum()), size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(partial(_read, self._reader, epoch, shard, np.packbits(done), size), metadata)


def _read(reader: ray.ObjectRef, epoch: int, shard: int, done: np.ndarray, size: int) -> Iterator[pa.Table]:
    """One (epoch, shard), where Ray Data runs it; `done` is packed, eight samples a byte."""
    yield from _fetched(reader).blocks(epoch, shard, np.unpackbits(done, count=size).astype(bool))


@lru_cache(maxsize=4)
def _fetched(reader: ray.ObjectRef) -> Any:
    """Once a process: a tokenizer takes up to a second to unpickle. Jobs that run side by side share processes."""
    return ray.get(reader)


class Pace(ExecutionCallback):
    """A rest in each turn of Ray Data's executor. While the students are slower than the readers, it looks without one
    whether they still are, which costs the driver's node half a core."""

    def on_execution_step(self, executor: object) -> None:
        """Called by Ray Data."""
        time.sleep(PAUSE_S)


def stream(reader: ray.ObjectRef, plan: Plan, ledger: Ledger, pool: PoolSpec) -> "ray.data.Dataset":
    """The rows that are still to be done, in plan order. Columns: epoch, shard, index, key, signal, and those of
    `to_arrow`."""
    context = ray.data.DataContext.get_current()
    # A long pause of the consumer (a checkpoint, an evaluation) is not a hang.
    context.execution_no_progress_timeout_s = -1
    context.enable_progress_bars = False
    if Pace not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(Pace)
    source = PlanSource(reader, plan, ledger)
    return ray.data.read_datasource(
        source,
        override_num_blocks=max(1, len(source._todo)),
        num_cpus=pool.cpus,
        resources=pool.resources or None,
        label_selector=pool.labels or None,
    )
