"""Stream of rows for the student workers: where it starts after a checkpoint, and how it is split over the ranks.

It is not in `job` or `loop`, so that Ray's own actors, which call this code, do not load the training code.
"""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.actor import ActorHandle
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Plan, Quarantined
from betakd_ray.errors import OutputUnreachable, UserError
from betakd_ray.on_ray.monitor import give_up
from betakd_ray.on_ray.stream import stream
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.plan import settled_samples
from betakd_ray.spec import JobSpec

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset


def rows(reader: "ray.ObjectRef", spec: JobSpec, run: str, plan: Plan, monitor: ActorHandle) -> "ray.data.Dataset":
    """Return the rows of the plan without the samples that the newest checkpoint has consumed or put into quarantine.

    Ray Train calls this at every start of the workers. The monitor is told which checkpoint it was, and the workers
    resume from exactly that one: another commit may arrive before they start, and the rows in this stream that it had
    consumed would be trained on twice. If the store does not answer, this waits, because an error here would end the
    job.
    """
    try:
        store = CheckpointStore(run, spec.output.storage)
        name, done, quarantined, loss = _patience(spec)(_done, store, plan)
        if loss:
            ray.get(monitor.warn.remote(loss))
    except UserError as error:
        give_up(monitor, error)
        raise
    # A driver that was replaced may have committed this checkpoint after the monitor began. The stream leaves out what
    # is in quarantine there, so the next checkpoint must have it too.
    ray.get(monitor.quarantine.remote(quarantined))
    # Waited for: Ray Train runs `train_worker` only after this function, and it asks the monitor for this name.
    ray.get(monitor.resuming_from.remote(name))
    return stream(reader, plan, done, spec.cluster.readers, spec.training.workers.max)


class SplitOnce(ray.train.DataConfig):
    """Split of the stream over the ranks: each row goes to exactly one rank.

    Ray Train's own split gives each rank the same number of rows, and drops the rest. Here the rank with the fewest
    rows so far gets the next block. The order of the blocks is the plan's, and does not depend on the nodes that hold
    them. So with the same seed each rank gets the same rows. At the end, ranks may have different numbers of rows.
    """

    def __init__(self) -> None:
        # Given here, because Ray Train ignores the options of the context in which the dataset is made.
        options = ray.data.ExecutionOptions(preserve_order=True)
        super().__init__(execution_options=options, enable_shard_locality=False)
        self._options = options

    def configure(
        self, datasets: "dict[str, Dataset]", world_size: int, *args: Any, **kwargs: Any
    ) -> "list[dict[str, DataIterator]]":
        """Return each rank's datasets. Ray Train calls this at every start of the workers."""
        splits: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset.set_name(dataset.name or name)
            ordered = dataset.copy(dataset)
            ordered.context.execution_options = deepcopy(self._options)
            for rank, split in enumerate(ordered.streaming_split(world_size, equal=False)):
                splits[rank][name] = split
        return splits


def _patience(spec: JobSpec, **options: Any) -> Retrying:
    return Retrying(
        retry=retry_if_exception_type(OutputUnreachable),
        stop=stop_after_delay(spec.cluster.start_timeout_s),
        wait=wait_fixed(1),
        reraise=True,
        **options,
    )


def _done(store: CheckpointStore, plan: Plan) -> tuple[str | None, Ledger, list[Quarantined], str]:
    """Return the newest checkpoint's name, the samples that it has consumed or put into quarantine, and the latter.

    The last value is a text about newer checkpoints that are damaged, empty if there are none. A checkpoint whose
    record of these is damaged is rejected, and the one before it is taken.
    """
    survey, found = store.surveyed_with(lambda last: (store.ledger(last, plan), store.quarantined(last, plan)))
    if found is None:
        return None, plan.empty_ledger(), [], ""
    manifest, (ledger, quarantined) = found
    return manifest.name, settled_samples(plan, ledger, quarantined), quarantined, survey.loss()
