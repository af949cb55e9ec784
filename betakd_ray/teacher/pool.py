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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from betakd_ray.cluster import placement
from betakd_ray.errors import ClusterError, TeacherError
from betakd_ray.metrics import Gauges
from betakd_ray.spec import TeacherPoolSpec, TeacherSpec
from betakd_ray.teacher.parts import Needs, TeacherFacts
from betakd_ray.teacher.ports import Pending, Roster, Teacher, Unanswered
from betakd_ray.teacher.remote import RemoteTeacher, placed
from betakd_ray.teacher.scorer import TeacherScorer

FORGET_AFTER_S = 60.0
"""A student that is silent for so long may be gone, with the workers it was one of."""
GROW_ABOVE = 0.10
"""Share of their time that students may wait for teachers before the pool grows."""
SHRINK_BELOW = 0.02
SHRINK_AFTER_S = 60.0
QUIET_S = 12.0
"""A teacher that leaves is ended, or lent, when it was asked nothing for so long: longer than two heartbeats, by which
every student has heard of it."""
NEXT_HOLDER_S = 5.0
"""Who asked for a lease so lately still waits for it."""

Members = dict[int, Teacher]


@dataclass(frozen=True)
class Starting:
    """A teacher that is not a member yet, and what is waited for: its model, or the end of what it has in hand."""

    teacher: Teacher
    ready: Pending

    def is_ready(self) -> bool:
        """Raises Unanswered if it died meanwhile."""
        try:
            self.ready.result(timeout_s=0.0)
        except TimeoutError:
            return False
        return True


@dataclass
class Lease:
    """A teacher that one student has to itself."""

    holder: str
    starting: Starting
    seen: float = field(default_factory=time.monotonic)
    """When its holder was last heard of."""


class TeacherPool:
    """Keeps the teachers alive. Runs as an actor without CPU or GPU of its own.

    Once it has given up, as teachers die as fast as they are replaced, every method raises that TeacherError.
    """

    _scorer: type[TeacherScorer] = TeacherScorer

    def __init__(
        self, teacher: TeacherSpec, needs: Needs, pool: TeacherPoolSpec, gpus: float, job: str = "teachers"
    ) -> None:
        self._teacher, self._needs, self._spec, self._gpus = teacher, needs, pool, gpus
        self._gauges = Gauges(job)
        self._actors: Any = None
        self._min, self._max = pool.min, max(pool.min, pool.max or pool.min)
        self._max_deaths = pool.max_restarts * self._max
        self._deaths = 0  # since a teacher last answered: on preemptible nodes they may die every hour, for days
        self._pending: dict[int, Starting] = {}
        self._members: Members = {}
        self._version = 0
        self._leaving: dict[int, Starting] = {}
        self._left: set[int] = set()
        self._lease: Lease | None = None
        self._asking: dict[str, float] = {}
        self._calm_since = time.monotonic()
        self._reports: dict[str, tuple[float, float]] = {}
        self._next = 0
        self._failure: TeacherError | None = None
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
                    return teacher.facts()
                except Unanswered as error:  # it was well when another job ended
                    self.lost(number, str(error))
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"cluster.teacher: {len(self._members)} of {self._min} teachers were ready within "
                    f"cluster.start_timeout_s = {timeout_s:g}. The cluster has {ray.cluster_resources()}; lower "
                    "cluster.teacher.min or its gpus, or add nodes."
                )
            time.sleep(0.1)

    def members(self) -> Members:
        """Return the teachers that are loaded."""
        if self._failure:
            raise self._failure
        self._end_stale_lease()
        for number, starting in list(self._pending.items()):
            try:
                if not starting.is_ready():
                    continue
                del self._pending[number]
                self._join(starting.teacher)
            except Unanswered as failure:
                del self._pending[number]
                self._replace(failure)
        for number, starting in list(self._leaving.items()):
            try:
                if not starting.is_ready():
                    continue
            except Unanswered:
                pass  # it is gone already
            del self._leaving[number]
            starting.teacher.kill()
        return self._members

    def roster(self, version: int) -> Roster:
        """Return who is in, to one that knows the members of `version`. Handles are many, and sent only if new."""
        members = self.members()
        is_expecting = bool(self._pending) or self._lease is not None
        return Roster(self._version, None if version == self._version else dict(members), is_expecting)

    def lost(self, number: int, reason: str) -> bool:
        """Take out a teacher that a student found dead or silent, and start another.

        Returns false if it had been told to leave: its end says nothing of the groups that it had.
        """
        teacher = self._members.pop(number, None)
        if teacher is not None:
            self._version += 1
            teacher.kill()
            self._replace(Unanswered(reason))
        return number not in self._left

    def lease(self, holder: str) -> Teacher | None:
        """Return a teacher for `holder` alone, to whom nobody else can have sent anything; None while there is none.

        To be asked for again and again. One is lent at a time, and taken back from a holder that falls silent.
        """
        self.members()
        now = time.monotonic()
        self._asking[holder] = now
        if self._lease is None:
            self._lease = Lease(holder, self._lendable())
        if self._lease.holder != holder:
            return None
        self._lease.seen = now
        try:
            return self._lease.starting.teacher if self._lease.starting.is_ready() else None
        except Unanswered as failure:
            self._lease = None
            self._replace(failure)
            return None

    def end_lease(self, holder: str, *, is_alive: bool) -> None:
        """Take back what `holder` has, if it has something.

        A teacher that is well goes to the next who asks for one, or joins the others. A dead one is replaced and not
        counted: the group it had is to blame.
        """
        self._asking.pop(holder, None)
        if self._lease is None or self._lease.holder != holder:
            return
        lease, self._lease = self._lease, None
        if not is_alive:
            lease.starting.teacher.kill()
            self.restarts += 1
            self._add()
            return
        now = time.monotonic()
        waiting = [name for name, asked in self._asking.items() if now - asked < NEXT_HOLDER_S]
        if waiting:
            self._lease = Lease(waiting[0], lease.starting)
        else:
            self._pending[lease.starting.teacher.number] = lease.starting

    def _lendable(self) -> Starting:
        """Choose a teacher to lend: a member, which first ends what it has; if it is the only one, one that is starting
        anyway. So a search among many teachers does not wait for a model to load at each of its steps."""
        if len(self._members) > 1 or (self._members and not self._pending):
            return self._sent_off(max(self._members))
        if not self._pending:
            self._add()
        return self._pending.pop(min(self._pending))

    def is_lent(self) -> bool:
        """Return whether one is, so that others may have to wait for theirs."""
        return self._lease is not None

    def _end_stale_lease(self) -> None:
        if self._lease and time.monotonic() - self._lease.seen > FORGET_AFTER_S:
            self.end_lease(self._lease.holder, is_alive=False)

    def heartbeat(self, client: str, waiting: float, answers: int, version: int = -1) -> Roster:
        """Take a student's report of the share of its time spent waiting for teachers, and of how many answers it got;
        resize, and say who is in."""
        if answers:
            self._deaths = 0
        self._show()
        now = time.monotonic()
        if self._lease and self._lease.holder.partition("/")[0] == client:
            self._lease.seen = now
        self._reports[client] = (now, waiting)
        self._reports = {name: report for name, report in self._reports.items() if now - report[0] < FORGET_AFTER_S}
        most = max(share for _, share in self._reports.values())
        if most > SHRINK_BELOW:
            self._calm_since = now
        if most > GROW_ABOVE and not self._pending and len(self._members) < self._max:
            self._add()
        elif now - self._calm_since > SHRINK_AFTER_S and len(self._members) > self._min:
            self._calm_since = now
            leaving = self._sent_off(max(self._members))
            self._leaving[leaving.teacher.number] = leaving
        return self.roster(version)

    def _sent_off(self, number: int) -> Starting:
        """Take a member out; it is ready when it has answered all that it was asked, so none of it is lost."""
        teacher = self._members.pop(number)
        self._version += 1
        self._left.add(number)
        return Starting(teacher, teacher.drain(QUIET_S))

    def _join(self, teacher: Teacher) -> None:
        self._members[teacher.number] = teacher
        self._left.discard(teacher.number)
        self._version += 1

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
        teacher = self._place(self._next)
        self._pending[self._next] = Starting(teacher, teacher.ready())
        self._next += 1

    def _place(self, number: int) -> Teacher:
        """Start a teacher, wherever there is a place for one."""
        if self._actors is None:
            self._actors = placed(self._scorer, placement(self._spec, self._gpus))
        return RemoteTeacher(number, self._actors.remote(self._teacher, self._needs))

    def _replace(self, failure: Unanswered) -> None:
        if self._deaths >= self._max_deaths:
            last = failure.detail.strip().splitlines()[-1]
            self._failure = TeacherError(
                f"teachers keep dying (cluster.teacher.max_restarts is used up). The last one: {last}"
            )
            raise self._failure
        self._deaths += 1
        self.restarts += 1
        self._add()


def on_driver_node() -> NodeAffinitySchedulingStrategy:
    """Place an actor on the driver's node.

    If that node fails the job ends anyway; the failure of another node must not end it.
    """
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def start_pool(teacher: TeacherSpec, needs: Needs, pool: TeacherPoolSpec, gpus: float, job: str) -> ActorHandle:
    """The pool as an actor, owned by the caller: it lives as long as the job's driver does."""
    manager = ray.remote(TeacherPool).options(num_cpus=0, max_concurrency=1, scheduling_strategy=on_driver_node())
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
