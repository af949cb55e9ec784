"""Stream of a job: Ray Data reads the groups of the plan with `reader`.

One execution of Ray Data covers all epochs. When the stream starts, it leaves out the samples that the ledger has as
done. So a restart with any number of workers repeats no sample and loses none.
"""

import time
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Plan
from betakd_ray.spec import PoolSpec

PAUSE_S = 0.02
"""Seconds of sleep in each iteration of Ray Data's scheduling loop."""
BLOCK_BYTES = 16 << 20
"""Size in bytes at which a block ends. Not less, because each block costs Ray Data's executor some milliseconds."""
BLOCK_ROWS = 256
"""Largest number of rows in a block. One rank gets a whole block, so a block must be a small part of its data."""
BLOCKS_A_WORKER = 8
"""Smallest number of blocks per worker that the rest of a job is divided into, so that ranks get equal shares."""


class PlanSource(Datasource):
    """Datasource of the groups of the plan that are not done: one read task per group, in plan order."""

    def __init__(self, reader: ray.ObjectRef, plan: Plan, ledger: Ledger, workers: int) -> None:
        super().__init__()
        self._reader = reader
        # One object for all tasks: with hundreds of begun shards the ledger is large.
        self._ledger = ray.put(ledger)
        self._groups = _groups(plan, ledger)
        rows = int(self._groups[:, 3].sum())
        self._block_rows = min(BLOCK_ROWS, max(1, -(-rows // (BLOCKS_A_WORKER * workers))))

    def __len__(self) -> int:
        """Return the number of read tasks."""
        return len(self._groups)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """Return one task for each group, the unit that is retried. Ray Data calls this several times."""
        return [self._task(*group) for group in self._groups.tolist()]

    def _task(self, epoch: int, first: int, last: int, rows: int) -> ReadTask:
        metadata = BlockMetadata(num_rows=rows, size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(partial(_read, self._reader, self._ledger, epoch, first, last, self._block_rows), metadata)


def _groups(plan: Plan, ledger: Ledger) -> NDArray[np.int64]:
    """Return [groups, 4] epoch, first, last and samples left, for every group with samples left."""
    bounds = plan.bounds()
    begins, ends = bounds[:-1], bounds[1:]
    left = plan.sizes - ledger.counts(plan.epochs)
    found = [np.zeros((0, 4), np.int64)]
    for epoch in range(plan.epochs):
        open_samples = np.add.reduceat(left[epoch][plan.order(epoch)], begins)
        groups = np.stack([np.full_like(begins, epoch), begins, ends, open_samples], axis=-1)
        found.append(groups[open_samples > 0])
    return np.concatenate(found)


def _read(
    reader: ray.ObjectRef, ledger: ray.ObjectRef, epoch: int, first: int, last: int, block_rows: int
) -> Iterator[pa.Table]:
    """Yield the blocks of one group. Ray Data runs this in a reading process."""
    yield from _fetched(reader).blocks(epoch, first, last, _fetched(ledger), block_rows, BLOCK_BYTES)


@lru_cache(maxsize=8)
def _fetched(content: ray.ObjectRef) -> Any:
    """Return the value of a reference, fetched once per process, because a tokenizer takes up to a second to unpickle.

    Several values are kept: concurrent jobs share processes, and each job has a reader and a ledger.
    """
    return ray.get(content)


class AsTheyCome(int):
    """Limit of block sizes in Ray Data with which every block is passed on as the reader made it.

    Ray Data joins blocks of a task until they exceed the limit, and splits blocks of more than one and a half times the
    limit. Joined blocks would be few and large, and a small job's rows would all go to one rank. Every size above zero
    compares as greater than this limit, so nothing is joined. For splitting and memory estimates it is a normal int.
    """

    def __lt__(self, size: int) -> bool:
        return size > 0  # Python calls this for `size > limit`, because a subclass of int has precedence


class ExecutorThrottle(ExecutionCallback):
    """Sleep in each iteration of Ray Data's scheduling loop: under back-pressure it busy-waits and uses half a core."""

    def on_execution_step(self, executor: object) -> None:
        """Sleep. Ray Data calls this in each iteration."""
        time.sleep(PAUSE_S)


def stream(reader: ray.ObjectRef, plan: Plan, ledger: Ledger, pool: PoolSpec, workers: int) -> "ray.data.Dataset":
    """Return the rows that are not done, in plan order, in blocks of `rows.block_of`.

    `workers` is the largest number of workers that may share them.
    """
    context = ray.data.DataContext.get_current()
    # A long pause of the consumer (a checkpoint, an evaluation) is not a hang.
    context.execution_no_progress_timeout_s = -1
    context.enable_progress_bars = False
    context.target_max_block_size = AsTheyCome(2 * BLOCK_BYTES)
    # The context belongs to the process, which may make streams for several jobs and starts.
    if ExecutorThrottle not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(ExecutorThrottle)
    source = PlanSource(reader, plan, ledger, workers)
    return ray.data.read_datasource(
        source,
        # One block for each task. Ray Data's own number may be larger, and it would then split what a task yields.
        override_num_blocks=max(1, len(source)),
        num_cpus=pool.cpus,
        resources=pool.resources or None,
        label_selector=pool.labels or None,
    )
