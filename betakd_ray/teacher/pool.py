"""The teacher as a service: actors that load once a job and outlive every restart of the students.

`TeacherPool` is the one process that knows the members: it starts them, replaces the dead, lends one out to find the
sample that kills them, and between `min` and `max` grows while students wait and shrinks while teachers idle. Students
talk to the members directly (`TeacherClient`): one hop through the object store.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from betakd_ray.cluster import placement
from betakd_ray.errors import ClusterError, TeacherError
from betakd_ray.metrics import Gauges
from betakd_ray.spec import TeacherPoolSpec, TeacherSpec
from betakd_ray.teacher.scorer import TeacherScorer
from betakd_ray.teacher.signal import Needs, TeacherFacts

FORGET_AFTER_S = 60.0
GROW_ABOVE = 0.10
"""Share of their time that students may wait for teachers before the pool grows."""
SHRINK_BELOW = 0.02
SHRINK_AFTER_S = 60.0

Members = dict[int, ActorHandle]


@dataclass(frozen=True)
class Starting:
    """A teacher that is being placed or loads its model."""

    number: int
    actor: ActorHandle
    ready: "ray.ObjectRef"


@dataclass
class Lease:
    """A teacher that one student has to itself."""

    holder: str
    teacher: Starting
    seen: float = field(default_factory=time.monotonic)
    """When its holder was last heard of."""


class TeacherPool:
    """Keeps the teachers alive. Runs as an actor without CPU or GPU of its own."""

    _scorer: type[TeacherScorer] = TeacherScorer

    def __init__(
        self, teacher: TeacherSpec, needs: Needs, pool: TeacherPoolSpec, gpus: float, job: str = "teachers"
    ) -> None:
        self._gauges = Gauges(job)
        self._min, self._max = pool.min, max(pool.min, pool.max or pool.min)
        self._max_deaths = pool.max_restarts * self._max
        self._deaths = 0  # since a teacher last answered: on preemptible nodes they may die every hour, for days
        self._start = ray.remote(self._scorer).options(**placement(pool, gpus))
        self._arguments = (teacher, needs)
        self._lease_timeout_s = 2 * teacher.timeout_s
        self._pending: dict[int, Starting] = {}
        self._members: Members = {}
        self._lease: Lease | None = None
        self._calm_since = time.monotonic()
        self._reports: dict[str, tuple[float, float]] = {}
        self._next = 0
        self.restarts = 0
        for _ in range(self._min):
            self._add()

    def wait_until_ready(self, timeout_s: float) -> TeacherFacts:
        """Block until `min` teachers are loaded.

        Raises ClusterError after `timeout_s`, TeacherError if none can load.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            if len(self.members()) >= self._min:
                number, teacher = next(iter(self._members.items()))
                try:
                    return cast(TeacherFacts, ray.get(teacher.facts.remote()))  # Ray does not type a handle's methods
                except RayActorError as error:  # it was well when another job ended
                    self.lost(number, str(error))
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"cluster.teacher: {len(self._members)} of {self._min} teachers were ready within "
                    f"cluster.start_timeout_s = {timeout_s:g}. The cluster has {ray.cluster_resources()}; lower "
                    "cluster.teacher.min or its gpus, or add nodes."
                )
            ray.wait([starting.ready for starting in self._pending.values()], timeout=1.0)

    def members(self) -> Members:
        """Teachers that are loaded. Raises TeacherError when they die as fast as they are replaced."""
        self._end_stale_lease()
        for number, starting in list(self._pending.items()):
            if not ray.wait([starting.ready], timeout=0)[0]:
                continue
            del self._pending[number]
            try:
                ray.get(starting.ready)
                self._members[number] = starting.actor
            except RayActorError as error:
                self._replace(error)
        return self._members

    def lost(self, number: int, reason: str) -> None:
        """A student found a teacher dead or silent: take it out and start another."""
        actor = self._members.pop(number, None)
        if actor is None:
            return
        ray.kill(actor)
        self._replace(TeacherError(reason))

    def lease(self, holder: str) -> tuple[int, ActorHandle] | None:
        """A teacher for `holder` alone, which nobody else can have sent anything to; None while there is none.

        To be asked for again and again. One is lent at a time, and taken back from a holder that falls silent.
        """
        self._end_stale_lease()
        if self._lease is None:
            self._lease = Lease(holder, self._lendable())
        if self._lease.holder != holder:
            return None
        self._lease.seen = time.monotonic()
        if not ray.wait([self._lease.teacher.ready], timeout=0)[0]:
            return None
        try:
            ray.get(self._lease.teacher.ready)
        except RayActorError as error:
            self._lease = None
            self._replace(error)
            return None
        return self._lease.teacher.number, self._lease.teacher.actor

    def end_lease(self, holder: str, *, is_alive: bool) -> None:
        """Given back, if there is one: a teacher that is well joins the others; a dead one is replaced, uncounted: its
        batch is to blame."""
        if self._lease is None or self._lease.holder != holder:
            return
        lease, self._lease = self._lease, None
        if is_alive:
            self._pending[lease.teacher.number] = lease.teacher
        else:
            ray.kill(lease.teacher.actor)
            self.restarts += 1
            self._add()

    def _lendable(self) -> Starting:
        """A teacher that is starting anyway, or a new one in the place of a member, which first ends what it has."""
        if not self._pending:
            if self._members:
                self._members.popitem()[1].__ray_terminate__.remote()
            self._add()
        return self._pending.pop(min(self._pending))

    def is_lent(self) -> bool:
        """Whether one is, so that others may have to wait for theirs."""
        return self._lease is not None

    def _end_stale_lease(self) -> None:
        if self._lease and time.monotonic() - self._lease.seen > self._lease_timeout_s:
            self.end_lease(self._lease.holder, is_alive=False)

    def heartbeat(self, client: str, waiting: float, answers: int) -> Members:
        """A student reports the share of its time spent waiting for teachers, and how many answers it got; the pool
        resizes and says who is in."""
        if answers:
            self._deaths = 0
        self._show()
        now = time.monotonic()
        self._reports[client] = (now, waiting)
        # A student that is silent may be gone, with the workers it was one of.
        self._reports = {name: report for name, report in self._reports.items() if now - report[0] < FORGET_AFTER_S}
        most = max(share for _, share in self._reports.values())
        if most > SHRINK_BELOW:
            self._calm_since = now
        if most > GROW_ABOVE and not self._pending and len(self._members) < self._max:
            self._add()
        elif now - self._calm_since > SHRINK_AFTER_S and len(self._members) > self._min:
            self._calm_since = now
            # Queued behind the requests it still holds, so none is lost.
            self._members.popitem()[1].__ray_terminate__.remote()
        return self.members()

    def _show(self) -> None:
        alive = len(self._members)
        self._gauges.set(
            {
                "betakd_teachers_wanted": alive + len(self._pending) + (self._lease is not None),
                "betakd_teachers_alive": alive,
                "betakd_teachers_restarted": self.restarts,
            }
        )

    def _add(self) -> None:
        actor = cast(ActorHandle, self._start.remote(*self._arguments))  # typed as a handle or the class
        self._pending[self._next] = Starting(self._next, actor, actor.__ray_ready__.remote())
        self._next += 1

    def _replace(self, reason: Exception) -> None:
        if self._deaths >= self._max_deaths:
            # Ray's text ends with what the actor itself raised, if it did.
            last = str(reason).strip().splitlines()[-1]
            raise TeacherError(f"teachers keep dying (cluster.teacher.max_restarts is used up). The last one: {last}")
        self._deaths += 1
        self.restarts += 1
        self._add()


def here() -> NodeAffinitySchedulingStrategy:
    """With the driver, whose loss ends the job anyway: no other node's loss shall."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def start_pool(teacher: TeacherSpec, needs: Needs, pool: TeacherPoolSpec, gpus: float, job: str) -> ActorHandle:
    """The pool as an actor, owned by the caller: it lives as long as the job's driver does."""
    manager = ray.remote(TeacherPool).options(num_cpus=0, max_concurrency=1, scheduling_strategy=here())
    return cast(ActorHandle, manager.remote(teacher, needs, pool, gpus, job))


class Teachers:
    """The pools of several jobs, one after the other or side by side: a job finds loaded what another has asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected: dict[tuple[str, tuple[int, ...]], Needs] = {}
        self._loaned: list[Loan] = []

    def __enter__(self) -> "Teachers":
        return self

    def __exit__(self, *_: object) -> None:
        for loan in self._loaned:
            ray.kill(loan.pool)
        self._loaned = []

    def expect(self, teacher: TeacherSpec, needs: Needs) -> None:
        """A job to come will ask for this: let the teacher answer everyone's questions whenever it answers one."""
        key = _question(teacher, needs)
        self._expected[key] = self._expected.get(key, needs) | needs

    @contextmanager
    def lent(
        self, teacher: TeacherSpec, needs: Needs, pool: TeacherPoolSpec, gpus: float, job: str
    ) -> Iterator[tuple[ActorHandle, Needs]]:
        """A pool, as of `start_pool`, and what it answers. One that saw a job fail is not lent again, and one that
        nobody uses makes room for another."""
        needs = self._expected.get(_question(teacher, needs), needs)
        with self._lock:
            wish = (teacher, needs, pool, gpus)
            loan = next((loan for loan in self._loaned if loan.wish == wish and not loan.is_doubtful), None)
            if loan is None:
                self._end_unused()
                loan = Loan(wish, start_pool(*wish, job))
                self._loaned.append(loan)
            loan.users += 1
        try:
            yield loan.pool, needs
        except BaseException:
            loan.is_doubtful = True
            raise
        finally:
            with self._lock:
                loan.users -= 1
                if loan.is_doubtful:
                    self._end_unused()

    def _end_unused(self) -> None:
        for loan in [loan for loan in self._loaned if not loan.users]:
            ray.kill(loan.pool)  # and its teachers with it
            self._loaned.remove(loan)


@dataclass
class Loan:
    """A pool that jobs use."""

    wish: tuple[TeacherSpec, Needs, TeacherPoolSpec, float]
    pool: ActorHandle
    users: int = 0
    is_doubtful: bool = False


def _question(teacher: TeacherSpec, needs: Needs) -> tuple[str, tuple[int, ...]]:
    """Alike for jobs whose needs can be joined."""
    return teacher.model_dump_json(), needs.choices


def unwrapped(answer: "ray.ObjectRef") -> Any:
    """What a call returned, or the error that it raised, as itself."""
    try:
        return ray.get(answer)
    except RayTaskError as error:
        raise error.cause from error
