"""The function that Ray Train runs on every rank."""

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from betakd_ray import errors
from betakd_ray.leftovers import remove_temporary
from betakd_ray.on_ray.monitor import give_up
from betakd_ray.train.config import WorkerConfig


def train_worker(config: dict[str, WorkerConfig]) -> dict[str, Any]:
    """Train to the end of the plan and export the student. Rank 0's return value is the job's outcome."""
    from betakd_ray.train.loop import Worker  # imported here, because Ray Train's controller does not need it

    worker = config["worker"]
    remove_temporary()  # here too, because only this process is on this node
    # Ray Train restarts the workers after every error, without a limit. An end without an error stops that.
    if ray.get(worker.monitor.failure.remote()):
        return {}
    try:
        return Worker(worker).run()
    except (errors.OutputUnreachable, errors.DataUnreachable, errors.CheckpointDamaged):
        raise  # not given up: after Ray Train's restart the store may answer again, and an earlier checkpoint is used
    except (errors.UserError, errors.TrainingError) as error:
        give_up(worker.monitor, error)
        raise
    except RayActorError as error:
        # It may be the monitor that died. Then nobody can be told, and the driver starts the whole job again.
        if worker.pool is not None and _has_died(worker.pool):
            give_up(worker.monitor, errors.TeacherError(f"the teachers' pool died: {error}"))
        raise


def _has_died(actor: ActorHandle) -> bool:
    try:
        ray.get(actor.__ray_ready__.remote())
    except RayActorError:
        return True
    return False
