"""Implementation of `ports` with Ray actors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.on_ray.spares import importing, keep_spare
from betakd_ray.teacher.parts import TeacherFacts
from betakd_ray.teacher.ports import IN_HAND, Roster, Unanswered

SCORE, HEALTH = "score", "health"
CONCURRENCY = {SCORE: IN_HAND, HEALTH: 1}
"""Threads of a teacher actor by concurrency group: one for each group in hand, and one for health checks.

The health check has its own thread so that it is answered while groups are computed.
"""

T = TypeVar("T")


@dataclass(frozen=True)
class RemotePending:
    """Answer that an actor has not given yet."""

    reference: "ray.ObjectRef"

    def result(self, timeout_s: float) -> Any:
        return _result(lambda: ray.get(self.reference, timeout=timeout_s))


@dataclass(frozen=True)
class RemoteTeacher:
    """A `TeacherScorer` in its own actor."""

    number: int
    actor: ActorHandle

    def submit(self, inputs: ModelInputs) -> RemotePending:
        return RemotePending(self.actor.score.options(concurrency_group=SCORE).remote(inputs))

    def apply(self, function: Callable[..., Any], *arguments: Any) -> RemotePending:
        # Not in SCORE's threads: a check takes seconds, and calls `score` itself.
        return RemotePending(self.actor.apply.remote(function, *arguments))

    def health(self, timeout_s: float) -> float:
        return RemotePending(self.actor.health.options(concurrency_group=HEALTH).remote()).result(timeout_s)

    def facts(self, timeout_s: float) -> TeacherFacts:
        return RemotePending(self.actor.facts.remote()).result(timeout_s)

    def head(self, timeout_s: float) -> NDArray[Any] | None:
        # Fetch a reference first: a returned array would be a new object per call, which no node could share.
        (reference,) = RemotePending(self.actor.head_reference.remote()).result(timeout_s)
        return RemotePending(reference).result(timeout_s)

    def ready(self) -> RemotePending:
        return RemotePending(self.actor.__ray_ready__.remote())

    def drain(self, quiet_s: float) -> RemotePending:
        # Not in SCORE's threads: it would take one of them from the groups that it waits for.
        return RemotePending(self.actor.drain.remote(quiet_s))

    def kill(self) -> None:
        ray.kill(self.actor)


@dataclass(frozen=True)
class RemotePool:
    """A `TeacherPool` in its own actor. Its methods raise RayActorError if the actor has died."""

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


class Spared:
    """Part of a teacher in its own actor: once at work, it has its node keep a spare process for its successor."""

    def score(self, inputs: ModelInputs) -> Any:
        answer = super().score(inputs)  # pyright: ignore[reportAttributeAccessIssue]  # of the scorer, in `placed`
        keep_spare()
        return answer


def placed(scorer: type, options: dict[str, Any], *, spares: bool) -> Any:
    """Return the actor class of a scorer, with its concurrency groups and placement options."""
    remote: Any = ray.remote  # Any, because its type stub lacks concurrency_groups
    if spares:
        options = options | {"runtime_env": {"env_vars": importing(scorer.__module__)}}
        scorer = type(scorer.__name__, (Spared, scorer), {})
    return remote(concurrency_groups=CONCURRENCY)(scorer).options(**options)


def unwrapped(answer: "ray.ObjectRef") -> Any:
    """Return the result of a remote call, or raise the original error of the call instead of RayTaskError."""
    try:
        return ray.get(answer)
    except RayTaskError as error:
        raise error.cause from error


def _result(get: Callable[[], T]) -> T:
    """Return what `get` returns. Raises TimeoutError and Unanswered instead of Ray's errors."""
    try:
        return get()
    except GetTimeoutError as error:
        raise TimeoutError from error
    except RayTaskError as error:
        raise Unanswered(f"{type(error.cause).__name__}: {error.cause}", is_deadly=False) from error
    except (RayActorError, ObjectLostError) as error:  # the actor died, or the node that stored its answer
        text = str(error).strip()
        # If the actor itself raised an error, Ray's text ends with that error.
        raise Unanswered(f"the teacher died: {text.splitlines()[0]}", detail=text) from error
