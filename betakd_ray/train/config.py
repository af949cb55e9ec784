"""What the job sends to every student worker, and the key of what it may get back."""

from dataclasses import dataclass, field

import ray
from ray.actor import ActorHandle

from betakd_ray.data.plan import Plan
from betakd_ray.run.lease import Permit
from betakd_ray.spec import JobSpec
from betakd_ray.teacher.cache import SignalCache
from betakd_ray.teacher.canary import KnownAnswer
from betakd_ray.teacher.parts import Needs, TeacherFacts

STOPPED = "stopped_at"
"""Key of the step number in the outcome of a job that was asked to stop."""


@dataclass(frozen=True)
class WorkerConfig:
    """Configuration that the job sends to every worker."""

    spec: JobSpec
    permit: Permit
    """Permission to write to the run, which ends when another driver takes it over."""
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
    canary: KnownAnswer | None = None
    """Checked sample that is asked again while the job runs; None if the teacher is not checked."""
    origins: dict[str, str] = field(default_factory=dict)
    """What the run is made from, for the manifests of its checkpoints."""

    held_out: "ray.ObjectRef | None" = None
    """Object of the `HeldOutData` on which the student is evaluated while it trains; None if it is not.

    A reference, because Ray's own actors load this configuration, and need no transformers for it.
    """

    @property
    def run(self) -> str:
        """Return the folder of the run."""
        return self.permit.run
