"""What the job sends to every student worker, and the key of what it may get back."""

from dataclasses import dataclass, field

from ray.actor import ActorHandle

from betakd_ray.data.plan import Plan
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
