"""What the student workers are fed, from where the newest checkpoint is.

Apart from `job` and `loop`, so that Ray's own actors, which call this, load nothing that trains.
"""

from typing import Any

import ray
from ray.actor import ActorHandle
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Plan, ids_of
from betakd_ray.data.stream import stream
from betakd_ray.errors import OutputUnreachable, UserError
from betakd_ray.spec import JobSpec
from betakd_ray.train.checkpoint import CheckpointStore
from betakd_ray.train.monitor import give_up


def rows(reader: "ray.ObjectRef", spec: JobSpec, run: str, plan: Plan, monitor: ActorHandle) -> "ray.data.Dataset":
    """Called at every start of the workers: the plan, less what the newest checkpoint has consumed or set aside.

    Waits for a store that does not answer: an error here would end the job.
    """
    try:
        store = CheckpointStore(run, spec.output.storage)
        done = _patience(spec)(_done, store, plan)
    except UserError as error:
        give_up(monitor, error)
        raise
    return stream(reader, plan, done, spec.cluster.readers)


def _patience(spec: JobSpec, **options: Any) -> Retrying:
    return Retrying(
        retry=retry_if_exception_type(OutputUnreachable),
        stop=stop_after_delay(spec.cluster.start_timeout_s),
        wait=wait_fixed(1),
        reraise=True,
        **options,
    )


def _done(store: CheckpointStore, plan: Plan) -> Ledger:
    manifest = store.latest()
    done = plan.empty_ledger()
    if manifest:
        done.merge(store.ledger(manifest))
        done.add(ids_of(store.quarantined(manifest)))
    return done
