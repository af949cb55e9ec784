"""The job's one stream: the groups of the plan, which Ray Data has read (`reader`).

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
from numpy.typing import NDArray
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Plan
from betakd_ray.spec import PoolSpec

PAUSE_S = 0.02
"""Pause of each turn of Ray Data's scheduling loop."""
BLOCK_BYTES = 16 << 20
"""A block costs Ray Data's executor milliseconds, whatever is in it: make it worth that."""
BLOCK_ROWS = 256
"""Rows of a block at the most. One rank gets all of a block, so it is to be little of what a rank reads."""
BLOCKS_A_WORKER = 8
"""Blocks at the least that each worker gets of what is left of a job, so that small jobs are spread evenly."""


class PlanSource(Datasource):
    """The groups of the plan that are not done, as read tasks in plan order."""

    def __init__(self, reader: ray.ObjectRef, plan: Plan, ledger: Ledger, workers: int) -> None:
        super().__init__()
        self._reader = reader
        # Once for all tasks: hundreds of shards may be begun and not finished.
        self._ledger = ray.put(ledger)
        self._groups = _groups(plan, ledger)
        rows = int(self._groups[:, 3].sum())
        self._block_rows = min(BLOCK_ROWS, max(1, -(-rows // (BLOCKS_A_WORKER * workers))))

    def __len__(self) -> int:
        """Count the read tasks."""
        return len(self._groups)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """One task for each group: a group is the unit that is retried. Ray Data asks several times."""
        return [self._task(*group) for group in self._groups.tolist()]

    def _task(self, epoch: int, first: int, last: int, rows: int) -> ReadTask:
        metadata = BlockMetadata(num_rows=rows, size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(partial(_read, self._reader, self._ledger, epoch, first, last, self._block_rows), metadata)


def _groups(plan: Plan, ledger: Ledger) -> NDArray[np.int64]:
    """[groups, 4] epoch, first, last and open samples of every group that has any."""
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
    """Read one group, where Ray Data runs it."""
    yield from _fetched(reader).blocks(epoch, first, last, _fetched(ledger), block_rows, BLOCK_BYTES)


@lru_cache(maxsize=8)
def _fetched(content: ray.ObjectRef) -> Any:
    """Get an object, once a process: a tokenizer takes up to a second to unpickle.

    Several are kept, as jobs that run side by side share processes, and each has a reader and a ledger.
    """
    return ray.get(content)


class AsTheyCome(int):
    """A limit of block sizes in Ray Data that has every block passed on as the reader made it.

    Ray Data joins blocks of a task until they are more than the limit, and cuts those of one and a half times the
    limit. Joined blocks would be few and large, and a small job's rows would all go to one rank. Whatever has a size is
    more than this limit; in all else (the cut, estimates of memory) it is its number.
    """

    def __lt__(self, size: int) -> bool:
        return size > 0  # Python asks this for `size > limit`, as the limit's class is the narrower one


class ExecutorThrottle(ExecutionCallback):
    """Sleep in each turn of Ray Data's scheduling loop: under back-pressure it busy-waits and uses half a core."""

    def on_execution_step(self, executor: object) -> None:
        """Called by Ray Data."""
        time.sleep(PAUSE_S)


def stream(reader: ray.ObjectRef, plan: Plan, ledger: Ledger, pool: PoolSpec, workers: int) -> "ray.data.Dataset":
    """Return the rows that are still to be done, in plan order, in the blocks of `rows.block_of`.

    `workers` is the most that may share them.
    """
    context = ray.data.DataContext.get_current()
    # A long pause of the consumer (a checkpoint, an evaluation) is not a hang.
    context.execution_no_progress_timeout_s = -1
    context.enable_progress_bars = False
    context.target_max_block_size = AsTheyCome(2 * BLOCK_BYTES)
    if ExecutorThrottle not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(ExecutorThrottle)
    source = PlanSource(reader, plan, ledger, workers)
    return ray.data.read_datasource(
        source,
        override_num_blocks=max(1, len(source)),
        num_cpus=pool.cpus,
        resources=pool.resources or None,
        label_selector=pool.labels or None,
    )
