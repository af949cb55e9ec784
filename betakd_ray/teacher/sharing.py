"""Pools of teachers that several jobs share: the cells of a sweep, or jobs one after the other."""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import ray
from ray.actor import ActorHandle

from betakd_ray.on_ray.cluster import on_driver_node
from betakd_ray.sigterm import StopRequest
from betakd_ray.spec import TeacherPoolSpec, TeacherSpec
from betakd_ray.teacher.parts import Needs
from betakd_ray.teacher.pool import TeacherPool

T = TypeVar("T")


def start_pool(teacher: TeacherSpec, needs: Needs, pool: TeacherPoolSpec, gpus: float, job: str) -> ActorHandle:
    """Start the pool as an actor that the caller owns, so that it ends with the job's driver."""
    # One call at a time, so the state of TeacherPool needs no lock. Without a CPU, so that it takes no place of a
    # worker.
    manager = ray.remote(TeacherPool).options(num_cpus=0, max_concurrency=1, scheduling_strategy=on_driver_node())
    return cast(ActorHandle, manager.remote(teacher, needs, pool, gpus, job))


class Teachers:
    """Pools of several jobs that run one after the other or concurrently. Jobs with the same teacher share its pool."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected: dict[tuple[str, tuple[int, ...]], Needs] = {}
        self._shared: list[SharedPool] = []
        self._finding = threading.Lock()
        self._found: dict[Hashable, Any] = {}

    def __enter__(self) -> "Teachers":
        return self

    def __exit__(self, *_: object) -> None:
        for shared in self._shared:
            ray.kill(shared.pool)
        self._shared = []

    def expect(self, teacher: TeacherSpec, needs: Needs) -> None:
        """Announce the needs of a later job, so that a teacher's answer has what all jobs with this teacher need."""
        key = _question(teacher, needs)
        self._expected[key] = self._expected.get(key, needs) | needs

    @contextmanager
    def share(
        self, teacher: TeacherSpec, needs: Needs, pool: TeacherPoolSpec, gpus: float, job: str
    ) -> Iterator[tuple[ActorHandle, Needs]]:
        """Yield a pool, started or shared, and the needs that it answers.

        A pool whose job failed is not shared again. A pool without users is ended before another one is started.
        """
        needs = self._expected.get(_question(teacher, needs), needs)
        with self._lock:
            asked = (teacher, needs, pool, gpus)
            shared = next((shared for shared in self._shared if shared.asked == asked and not shared.is_doubtful), None)
            if shared is None:
                self._end_unused()
                shared = SharedPool(asked, start_pool(*asked, job))
                self._shared.append(shared)
            shared.users += 1
        try:
            yield shared.pool, needs
        except BaseException:
            shared.is_doubtful = True
            raise
        finally:
            with self._lock:
                shared.users -= 1
                if shared.is_doubtful:
                    self._end_unused()

    def once(self, key: Hashable, find: Callable[[], T], stop: StopRequest) -> tuple[T, bool]:
        """Return what `find` has returned for an earlier job with this key, or call it; and whether it was called.

        Other jobs wait meanwhile, so that jobs that run side by side do not find the same. Raises Interrupted if this
        job is stopped while it waits.
        """
        stop.wait_until(lambda timeout_s: self._finding.acquire(timeout=timeout_s))
        try:
            if is_new := key not in self._found:
                self._found[key] = find()
            return self._found[key], is_new
        finally:
            self._finding.release()

    def _end_unused(self) -> None:
        for shared in [shared for shared in self._shared if not shared.users]:
            ray.kill(shared.pool)  # this ends its teachers too
            self._shared.remove(shared)


@dataclass
class SharedPool:
    """A pool, and the number of jobs that use it."""

    asked: tuple[TeacherSpec, Needs, TeacherPoolSpec, float]
    pool: ActorHandle
    users: int = 0
    is_doubtful: bool = False


def _question(teacher: TeacherSpec, needs: Needs) -> tuple[str, tuple[int, ...]]:
    """Return a key that is equal for jobs whose needs can be joined."""
    return teacher.model_dump_json(), needs.choices
