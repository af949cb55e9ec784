"""What the student workers are fed, from where the newest checkpoint is, and who of them is fed what.

Apart from `job` and `loop`, so that Ray's own actors, which call this, load nothing that trains.
"""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.actor import ActorHandle
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Plan, ids_of
from betakd_ray.data.stream import stream
from betakd_ray.errors import OutputUnreachable, UserError
from betakd_ray.spec import JobSpec
from betakd_ray.train.checkpoint import CheckpointStore
from betakd_ray.train.monitor import give_up

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset


def rows(reader: "ray.ObjectRef", spec: JobSpec, run: str, plan: Plan, monitor: ActorHandle) -> "ray.data.Dataset":
    """Called at every start of the workers: the plan, less what the newest checkpoint has consumed or set aside.

    The monitor is told which checkpoint that was, and the workers resume from that very one: a commit may arrive before
    they start, and a stream older than the ledger would train samples twice. Waits for a store that does not answer:
    an error here would end the job.
    """
    try:
        store = CheckpointStore(run, spec.output.storage)
        name, done = _patience(spec)(_done, store, plan)
    except UserError as error:
        give_up(monitor, error)
        raise
    ray.get(monitor.resuming_from.remote(name))
    return stream(reader, plan, done, spec.cluster.readers, spec.training.workers.max)


class SplitOnce(ray.train.DataConfig):
    """Splits the stream over the ranks so that each row reaches one rank, and none is left out.

    Ray Train's own split gives each rank as many rows, and drops what is over. Here the rank that had the fewest rows
    gets the next block. As blocks come in plan order and do not depend on where they lie, a seed gives each rank the
    same rows. Ranks may end some rows apart.
    """

    def __init__(self) -> None:
        # Ray Train takes no notice of the options in the context that the dataset is made in.
        options = ray.data.ExecutionOptions(preserve_order=True)
        super().__init__(execution_options=options, enable_shard_locality=False)
        self._options = options

    def configure(
        self, datasets: "dict[str, Dataset]", world_size: int, *args: Any, **kwargs: Any
    ) -> "list[dict[str, DataIterator]]":
        """Called by Ray Train at every start of the workers."""
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


def _done(store: CheckpointStore, plan: Plan) -> tuple[str | None, Ledger]:
    """The newest checkpoint's name, and what of the plan it has done with."""
    manifest, done = store.latest(), plan.empty_ledger()
    if manifest is None:
        return None, done
    done.merge(store.ledger(manifest))
    done.include(ids_of(store.quarantined(manifest)))
    return manifest.name, done
