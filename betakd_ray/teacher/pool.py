"""Pool of teachers: actors that load the model once per job and keep running when the students restart.

`TeacherPool` is the one process that knows the members. It starts them, replaces dead ones, and leases one to a student
that searches for the sample that kills teachers. Between `min` and `max` it grows while students wait and shrinks
while teachers are idle. Students send groups directly to the members (`TeacherClient`), through Ray's object store.
"""

import time
from collections.abc import Callable
from typing import Any

import ray

from betakd_ray.errors import ClusterError, TeacherError
from betakd_ray.on_ray.cluster import placement
from betakd_ray.on_ray.gauges import Gauges
from betakd_ray.spec import TeacherPoolSpec, TeacherSpec
from betakd_ray.teacher.canary import Differs, KnownAnswer, Proof, answer_canary
from betakd_ray.teacher.parts import Needs, TeacherFacts
from betakd_ray.teacher.ports import Roster, Teacher, Unanswered
from betakd_ray.teacher.remote import RemoteTeacher, placed
from betakd_ray.teacher.scorer import TeacherScorer, engine_of
from betakd_ray.teacher.starting import Lease, Starting

FORGET_AFTER_S = 60.0
"""Seconds without a heartbeat after which a student counts as gone; its workers may have been restarted."""
GROW_ABOVE = 0.10
"""Fraction of its time that a student may wait for teachers before the pool grows."""
SHRINK_BELOW = 0.02
"""Fraction of waiting time up to which all students count as not waiting."""
SHRINK_AFTER_S = 60.0
"""Seconds in which no student waits before the pool shrinks by one teacher."""
QUIET_S = 12.0
"""Seconds without a new group after which a removed teacher is ended or leased.

This is longer than two heartbeats, in which every student learns that the teacher is no longer a member.
"""
NEXT_HOLDER_S = 5.0
"""Seconds since its last request within which a client still counts as waiting for a lease."""
MOST_DIFFERING = 3
"""Number of teachers in a row that may answer the canary differently before the pool gives up."""

Members = dict[int, Teacher]


class TeacherPool:
    """Keeper of the teachers. It runs as an actor without a CPU or GPU.

    It gives up when teachers die as fast as they are replaced. From then on its methods raise TeacherError.
    """

    def __init__(
        self, teacher: TeacherSpec, needs: Needs, pool: TeacherPoolSpec, gpus: float, job: str = "teachers"
    ) -> None:
        self._teacher, self._needs, self._spec, self._gpus = teacher, needs, pool, gpus
        self._gauges = Gauges(job)
        self._actors: Any = None
        self._min, self._max = pool.min, max(pool.min, pool.max or pool.min)
        self._max_deaths = pool.max_restarts * self._max
        # Counted since the last answer of a teacher: on preemptible nodes teachers may die every hour, for days.
        self._deaths = 0
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
        self._canary: KnownAnswer | None = None
        self._differing = 0
        self._tell: Callable[[str], None] = lambda _: None
        self.restarts = 0
        for _ in range(self._min):
            self._add()

    def wait_until_ready(self, timeout_s: float) -> TeacherFacts:
        """Block until `min` teachers are loaded; return the teacher's facts.

        Raises ClusterError after `timeout_s` seconds, and TeacherError if no teacher can load.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            if len(self.members()) >= self._min:
                number, teacher = next(iter(self._members.items()))
                try:
                    return teacher.facts(self._teacher.timeout_s)
                except (Unanswered, TimeoutError) as error:  # it has died, or hangs, since another job used it
                    self.lost(number, str(error) or "silent")
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"cluster.teacher: {len(self._members)} of {self._min} teachers were ready within "
                    f"cluster.start_timeout_s = {timeout_s:g}. The cluster has {ray.cluster_resources()}. Lower "
                    "cluster.teacher.min or cluster.teacher.gpus, or add nodes."
                )
            time.sleep(0.1)

    def require_answer(self, canary: KnownAnswer, checked: int, tell: Callable[[str], None]) -> None:
        """Have every teacher but the `checked` one give the known answer before it is a member, now and later.

        `tell` is called with a text about each that differs. Of several jobs, the first one's canary stays.
        """
        self._tell = tell
        if self._canary is not None:
            return
        self._canary = canary
        for teacher in [*self._members.values(), *(starting.teacher for starting in self._pending.values())]:
            if teacher.number != checked:
                self._members.pop(teacher.number, None)
                self._pending[teacher.number] = self._starting(teacher)
        self._version += 1

    def members(self) -> Members:
        """Return the loaded teachers, after taking in those that became ready and ending those that have left."""
        if self._failure:
            raise self._failure
        # Done here, because the pool has no thread of its own and students call this every few seconds.
        self._end_stale_lease()
        for number, starting in list(self._pending.items()):
            try:
                if not starting.is_ready():
                    continue
                del self._pending[number]
                self._join(starting.teacher)
            except Unanswered as failure:
                del self._pending[number]
                self._replace(starting.teacher, failure)
        for number, starting in list(self._leaving.items()):
            try:
                if not starting.is_ready():
                    continue
            except Unanswered:
                pass  # it has died already
            del self._leaving[number]
            starting.teacher.kill()
        return self._members

    def roster(self, version: int) -> Roster:
        """Return the roster for a client that knows the members of `version`; they are sent only if changed."""
        members = self.members()
        is_expecting = bool(self._pending) or self._lease is not None
        return Roster(self._version, None if version == self._version else dict(members), is_expecting)

    def lost(self, number: int, reason: str) -> bool:
        """Remove a teacher that a student found dead or silent, and start another.

        Returns false if the pool had told it to leave: then its groups are not to blame for its end.
        """
        # Each rank that had groups with the teacher reports it. Only the first report replaces it.
        teacher = self._members.pop(number, None)
        if teacher is not None:
            self._version += 1
            self._replace(teacher, Unanswered(reason))
        return number not in self._left

    def lease(self, holder: str) -> Teacher | None:
        """Return an exclusive teacher for `holder`, without groups of other students; None while there is none.

        Poll this method. One teacher is leased at a time. A lease ends if its holder is silent for `FORGET_AFTER_S`.
        """
        self.members()
        now = time.monotonic()
        self._asking[holder] = now
        if self._lease is None:
            self._lease = Lease(holder, self._teacher_to_lease())
        if self._lease.holder != holder:
            return None
        self._lease.seen = now
        try:
            return self._lease.starting.teacher if self._lease.starting.is_ready() else None
        except Unanswered as failure:
            starting, self._lease = self._lease.starting, None
            self._replace(starting.teacher, failure)
            return None

    def end_lease(self, holder: str, *, is_alive: bool) -> None:
        """End the lease of `holder`, if it has one.

        A live teacher goes to the next client that waits for a lease, or back to the members. A dead one is replaced
        and does not count as a death, because its group is to blame.
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
        # The first is the client that has waited longest: a dict keeps the place of a key whose value changes.
        waiting = [name for name, asked in self._asking.items() if now - asked < NEXT_HOLDER_S]
        if waiting:
            self._lease = Lease(waiting[0], lease.starting)
        else:
            # Not a member at once: a lease may end before its teacher has loaded, or has finished its groups.
            self._pending[lease.starting.teacher.number] = lease.starting

    def _teacher_to_lease(self) -> Starting:
        """Choose a teacher to lease: a member, which first finishes its groups.

        If there is at most one member, prefer a teacher that is starting anyway; start one if there is none at all.
        So with many teachers a search does not wait for a model to load at each of its steps.
        """
        if len(self._members) > 1 or (self._members and not self._pending):
            return self._sent_off(max(self._members))
        if not self._pending:
            self._add()
        return self._pending.pop(min(self._pending))

    def is_leasing(self) -> bool:
        """Return whether a teacher is leased, so that other clients may have to wait for a lease."""
        return self._lease is not None

    def _end_stale_lease(self) -> None:
        if self._lease and time.monotonic() - self._lease.seen > FORGET_AFTER_S:
            # The teacher is ended, because it may still work on the group for which it was leased.
            self.end_lease(self._lease.holder, is_alive=False)

    def heartbeat(self, client: str, waiting: float, answers: int, version: int = -1) -> Roster:
        """Take the report of a student, resize the pool, and return the roster.

        Both numbers are since its last heartbeat: `waiting` is the fraction of its time, 0 to 1, that it waited for
        teachers, and `answers` is the number of answers that it got.
        """
        if answers:
            self._deaths = 0
        self._show()
        now = time.monotonic()
        if self._lease and self._lease.holder.partition("/")[0] == client:
            self._lease.seen = now
        self._reports[client] = (now, waiting)
        self._reports = {name: report for name, report in self._reports.items() if now - report[0] < FORGET_AFTER_S}
        # The longest wait counts, as one slow rank delays the whole step.
        most = max(share for _, share in self._reports.values())
        if most > SHRINK_BELOW:
            self._calm_since = now
        # One at a time: only after a new teacher has loaded do the waits show whether one more is needed.
        # A leased teacher counts: it comes back.
        held = len(self._members) + (self._lease is not None)
        if most > GROW_ABOVE and not self._pending and held < self._max:
            self._add()
        elif now - self._calm_since > SHRINK_AFTER_S and len(self._members) > self._min:
            self._calm_since = now
            leaving = self._sent_off(max(self._members))
            self._leaving[leaving.teacher.number] = leaving
        return self.roster(version)

    def _sent_off(self, number: int) -> Starting:
        """Remove a member. It is ready when it has answered all its groups, so that no group is lost."""
        teacher = self._members.pop(number)
        self._version += 1
        self._left.add(number)
        until = time.monotonic() + self._teacher.timeout_s + QUIET_S
        return Starting(teacher, teacher.drain(QUIET_S), until)

    def _join(self, teacher: Teacher) -> None:
        self._members[teacher.number] = teacher
        self._differing = 0
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
        self._pending[self._next] = self._starting(self._place(self._next))
        self._next += 1

    def _starting(self, teacher: Teacher) -> Starting:
        """Return a teacher that is ready once it has loaded and, if there is a canary, given the known answer."""
        if self._canary is None:
            return Starting(teacher, teacher.ready())
        # Asked at once: the question waits in the teacher until the model is loaded.
        return Starting(teacher, Proof(self._canary, teacher.apply(answer_canary, self._canary.inputs)))

    def _place(self, number: int) -> Teacher:
        """Start a teacher on any node with room for it."""
        if self._actors is None:
            self._actors = placed(self._engine(), placement(self._spec, self._gpus), spares=self._spec.spares)
        return RemoteTeacher(number, self._actors.remote(self._teacher, self._needs))

    def _engine(self) -> type[TeacherScorer]:
        return engine_of(self._teacher)

    def _replace(self, teacher: Teacher, failure: Unanswered) -> None:
        teacher.kill()  # if it only counts as dead, it would keep its place in the cluster
        if isinstance(failure, Differs):
            self._differing += 1
            self._tell(f"{failure} It is ended and replaced.")
            if self._differing >= MOST_DIFFERING:
                self._failure = TeacherError(f"{self._differing} teachers in a row are not the checked one. {failure}")
                raise self._failure
        if self._deaths >= self._max_deaths:
            last = failure.detail.strip().splitlines()[-1]
            self._failure = TeacherError(
                f"teachers died more often in a row than cluster.teacher.max_restarts allows. The last one: {last}"
            )
            raise self._failure
        self._deaths += 1
        self.restarts += 1
        self._add()
