"""Teachers and their pool as Ray's actors: the thin side of `ports`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.teacher.parts import TeacherFacts
from betakd_ray.teacher.ports import IN_HAND, Roster, Unanswered

SCORE, HEALTH = "score", "health"
CONCURRENCY = {SCORE: IN_HAND, HEALTH: 1}
"""Threads of a teacher: one for each group in hand, and one that answers at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class RemotePending:
    """An actor's answer to come."""

    reference: "ray.ObjectRef"

    def result(self, timeout_s: float) -> Any:
        return _result(lambda: ray.get(self.reference, timeout=timeout_s))


@dataclass(frozen=True)
class RemoteTeacher:
    """A `TeacherScorer` in an actor of its own."""

    number: int
    actor: ActorHandle

    def submit(self, inputs: ModelInputs) -> RemotePending:
        return RemotePending(self.actor.score.options(concurrency_group=SCORE).remote(inputs))

    def health(self, timeout_s: float) -> float:
        return RemotePending(self.actor.health.options(concurrency_group=HEALTH).remote()).result(timeout_s)

    def facts(self) -> TeacherFacts:
        return _result(lambda: cast(TeacherFacts, ray.get(self.actor.facts.remote())))

    def head(self) -> NDArray[Any] | None:
        # Two steps, or it would be another object for each who asks, and no node would share its copy.
        reference = _result(lambda: cast(list[Any], ray.get(self.actor.head_reference.remote())))[0]
        return _result(lambda: cast(NDArray[Any], ray.get(reference)))

    def ready(self) -> RemotePending:
        return RemotePending(self.actor.__ray_ready__.remote())

    def drain(self, quiet_s: float) -> RemotePending:
        return RemotePending(self.actor.drain.remote(quiet_s))

    def kill(self) -> None:
        ray.kill(self.actor)


@dataclass(frozen=True)
class RemotePool:
    """A `TeacherPool` in an actor of its own. Raises RayActorError if it died."""

    actor: ActorHandle

    def roster(self, version: int) -> Roster:
        return unwrapped(self.actor.roster.remote(version))

    def lost(self, number: int, reason: str) -> bool:
        return unwrapped(self.actor.lost.remote(number, reason))

    def lease(self, holder: str) -> RemoteTeacher | None:
        return unwrapped(self.actor.lease.remote(holder))

    def end_lease(self, holder: str, *, is_alive: bool) -> None:
        unwrapped(self.actor.end_lease.remote(holder, is_alive=is_alive))

    def heartbeat(self, client: str, waiting: float, answers: int, version: int) -> Roster:
        return unwrapped(self.actor.heartbeat.remote(client, waiting, answers, version))


def placed(scorer: type, options: dict[str, Any]) -> Any:
    """Return the actor class of a scorer, with its threads and its place."""
    remote: Any = ray.remote  # which Ray types without this option
    return remote(concurrency_groups=CONCURRENCY)(scorer).options(**options)


def unwrapped(answer: "ray.ObjectRef") -> Any:
    """Return what a call returned, or raise the error that it raised, as itself."""
    try:
        return ray.get(answer)
    except RayTaskError as error:
        raise error.cause from error


def _result(get: Callable[[], T]) -> T:
    """Raises TimeoutError and Unanswered in place of Ray's errors."""
    try:
        return get()
    except GetTimeoutError as error:
        raise TimeoutError from error
    except RayTaskError as error:
        raise Unanswered(f"{type(error.cause).__name__}: {error.cause}", is_deadly=False) from error
    except (RayActorError, ObjectLostError) as error:  # the actor, or the node that held its answer
        text = str(error).strip()
        # Ray's text ends with what the actor itself raised, if it did.
        raise Unanswered(f"the teacher died: {text.splitlines()[0]}", detail=text) from error
