"""The function that Ray Train runs on every rank, and its configuration."""

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from betakd_ray import errors
from betakd_ray.data.plan import Plan
from betakd_ray.on_ray.monitor import give_up
from betakd_ray.spec import JobSpec
from betakd_ray.teacher.cache import SignalCache
from betakd_ray.teacher.parts import Needs, TeacherFacts

STOPPED = "stopped_at"
"""Key of the step number in the outcome of a job that was asked to stop."""


@dataclass(frozen=True)
class WorkerConfig:
    """Configuration that the job sends to every worker."""

    spec: JobSpec
    run: str
    plan: Plan
    monitor: ActorHandle
    image_token_id: int
    """Id of the student's image token."""
    teacher_image_token_id: int
    pad_token_id: int
    total_steps: int
    pool: ActorHandle | None = None
    facts: TeacherFacts | None = None
    """Facts about the teacher; None without a teacher."""
    needs: Needs = field(default_factory=Needs)
    cache: SignalCache | None = None


def train_worker(config: dict[str, WorkerConfig]) -> dict[str, Any]:
    """Train to the end of the plan and export the student. Rank 0's return value is the job's outcome."""
    from betakd_ray.train.loop import Worker  # imported here, because Ray Train's controller does not need it

    worker = config["worker"]
    if ray.get(worker.monitor.failure.remote()):
        return {}
    try:
        return Worker(worker).run()
    except (errors.OutputUnreachable, errors.DataUnreachable):
        raise  # not given up: the store may answer again after Ray Train's restart
    except (errors.UserError, errors.TrainingError) as error:
        give_up(worker.monitor, error)
        raise
    except RayActorError as error:
        if worker.pool is not None and _has_died(worker.pool):
            give_up(worker.monitor, errors.TeacherError(f"the teachers' pool died: {error}"))
        raise


def _has_died(actor: ActorHandle) -> bool:
    try:
        ray.get(actor.__ray_ready__.remote())
    except RayActorError:
        return True
    return False
