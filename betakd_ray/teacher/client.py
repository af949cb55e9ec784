"""Client of the teacher pool in a student worker: every group gets an answer, even if teachers fail.

A teacher that dies, or that works on one group for longer than `teacher.timeout_s`, is reported to the pool. Its
groups go to other teachers. The student waits and does not restart. Time that a group waits in a teacher's queue does
not count towards the timeout. A group that killed two teachers is suspect: it is examined with an exclusive teacher
until the faulty sample is found, and that sample takes no part in training (`examination`). A group that raised an
error in a teacher without killing it is examined too. Other groups go on meanwhile.
"""

import itertools
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.sample import Rendering
from betakd_ray.errors import TeacherError
from betakd_ray.spec import TeacherSpec
from betakd_ray.teacher.answers import Answer, GroupAnswer
from betakd_ray.teacher.examination import Stack, examine
from betakd_ray.teacher.ports import IN_HAND, Pending, Pool, Teacher, Unanswered

HEARTBEAT_S = 5.0
"""Seconds between two heartbeats to the pool."""
CHECK_S = 5.0
"""Seconds to wait for an answer before a health check of its teacher, and timeout of that check."""
POLL_S = (0.2, 2.0)
"""Seconds between two polls of the pool while no teacher is there: the first pause, and the longest."""
# One death may be chance, for example the loss of a node. A second one of the same group hardly is.
SUSPECT_AFTER = 2
"""Number of teachers that may die of a group before the group is examined."""
_LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class Ticket:
    """A group that was sent to a teacher."""

    teacher: Teacher
    pending: Pending | None = None


@dataclass
class Pulse:
    """Times at which this rank last heard from a teacher and last asked it, on the monotonic clock in seconds."""

    heard: float = field(default_factory=time.monotonic)
    """Last answer or health report of the teacher."""
    asked: float = 0.0
    """Last health check."""


class TeacherClient:
    """Client of one rank. Every method may be called from any thread.

    `score` blocks: for several groups in flight, call it from as many threads.
    """

    def __init__(
        self, pool: Pool, rank: int, ranks: int, spec: TeacherSpec, start_timeout_s: float, stack: Stack
    ) -> None:
        self._pool, self._rank, self._ranks, self._stack = pool, rank, ranks, stack
        self._timeout_s, self._start_timeout_s = spec.timeout_s, start_timeout_s
        self._check_s = min(CHECK_S, spec.timeout_s / 4)
        self._name = os.urandom(8).hex()
        self._lock = threading.Lock()
        self._members: dict[int, Teacher] = {}
        self._version = -1
        self._is_expecting = False
        self._sent: defaultdict[int, list[Ticket]] = defaultdict(list)
        self._turn = 0
        self._suspects: dict[int, list[Ticket]] = {}
        self._pulses: defaultdict[int, Pulse] = defaultdict(Pulse)
        self._examinations = itertools.count()
        self._answers = 0
        self._waited_s = 0.0
        self._failure: Exception | None = None
        self._is_closed = threading.Event()
        # Taken before `_lock`, and never inside of it: its holder waits for an answer of the pool.
        self._refreshing = threading.Lock()
        self._refreshed = 0.0
        self._beating = threading.Thread(target=self._beat, name="teacher-heartbeat", daemon=True)
        self._beating.start()

    @property
    def in_flight(self) -> int:
        """Return the number of groups that are with teachers."""
        with self._lock:
            return sum(map(len, self._sent.values()))

    def score(self, group: Sequence[Rendering]) -> Answer:
        """Return the teacher's answer to a group; blocks until there is one.

        Raises TeacherError if the pool has given up, or if the teacher cannot score any sample.
        """
        failures = 0
        while True:
            ticket = self._send(self._stack(group))
            try:
                answer = Answer.of(self._receive(ticket))
                with self._lock:
                    self._answers += 1
                return answer
            except Unanswered as reason:
                failure = reason
                if failure.is_deadly:
                    failures += self._report(ticket, str(failure))
            finally:
                # After `_report`, which looks for the ticket among the groups that were sent.
                self._settle(ticket)
            if not failure.is_deadly:
                return self._examine(group, self._score)
            if failures >= SUSPECT_AFTER:
                return self._examine(group, self._score_alone)

    def report_waiting(self, seconds: float) -> None:
        """Add seconds that the student waited for answers. The pool grows while students wait."""
        with self._lock:
            self._waited_s += seconds

    def head(self) -> NDArray[Any] | None:
        """Return the weight of the teacher's lm_head, [V_t, H_t], as `parts.to_wire` makes it; fetched from a teacher.

        Returns None if no hidden states are asked for. All ranks ask the same teacher, so that each node gets one copy.
        """
        while True:
            with self._lock:
                teacher = self._members[min(self._members)] if self._members else None
            if teacher is None:
                self._wait_for_members()
                continue
            try:
                return teacher.head(self._timeout_s)
            except (Unanswered, TimeoutError) as failure:
                self._report(Ticket(teacher), str(failure) or f"silent for teacher.timeout_s = {self._timeout_s:g} s")

    def close(self) -> None:
        """End the heartbeat. Threads that still wait for an answer get a TeacherError."""
        self._is_closed.set()
        self._beating.join(timeout=HEARTBEAT_S)

    # ------------------------------------------------------------------------------------- to a teacher and back

    def _send(self, inputs: ModelInputs) -> Ticket:
        while True:
            with self._lock:
                ticket = Ticket(self._choose()) if self._members else None
                if ticket is not None:
                    self._sent[ticket.teacher.number].append(ticket)
            if ticket is not None:
                self._check_open()
                # Outside of the lock: Ray serialises the group here, images included, and other threads need the lock.
                ticket.pending = ticket.teacher.submit(inputs)
                return ticket
            self._wait_for_members()

    def _choose(self) -> Teacher:
        """Return the teacher that has the fewest of this rank's groups.

        Among several such teachers, each rank starts from another place, evenly spread over the teachers, and moves on
        by one for each group. So every teacher gets the same share of the groups, for any number of teachers and ranks
        and after any deaths. With a fixed place for each rank, 64 ranks with four groups each would leave a third of
        216 teachers idle.
        """
        numbers = sorted(self._members)
        count = len(numbers)
        first = self._rank * count // self._ranks + self._turn
        self._turn += 1
        at = min(range(count), key=lambda place: (len(self._sent[numbers[place]]), (place - first) % count))
        return self._members[numbers[at]]

    def _receive(self, ticket: Ticket) -> GroupAnswer:
        """Wait for the answer to a group. Raises Unanswered."""
        assert ticket.pending is not None
        with self._lock:
            pulse = self._pulses[ticket.teacher.number]
        begun = time.monotonic()
        while True:
            try:
                # A short wait, so that the thread soon notices a closed client or a pool that has given up.
                answer = ticket.pending.result(min(self._check_s, 1.0))
                pulse.heard = time.monotonic()
                return answer
            except TimeoutError:
                self._check_open()
                if time.monotonic() - begun < self._check_s:
                    continue
                if reason := self._stalled(ticket.teacher, pulse):
                    raise Unanswered(reason) from None

    def _stalled(self, teacher: Teacher, pulse: Pulse) -> str | None:
        """Return why a teacher that has not answered must count as dead; None if it may still answer."""
        now = time.monotonic()
        with self._lock:
            if teacher.number in self._suspects:
                return "it was reported as dead"
            if now - pulse.asked < self._check_s:
                return None  # one health check per teacher: the thread of another group has just made it
            pulse.asked = now
        try:
            working_s = teacher.health(self._check_s)
        except TimeoutError:
            silent_s = time.monotonic() - pulse.heard
            return f"silent for teacher.timeout_s = {self._timeout_s:g} s" if silent_s > self._timeout_s else None
        except Unanswered as failure:
            return str(failure)
        pulse.heard = time.monotonic()
        # Only computing time counts: a group that waits in a long queue is no sign of a dead teacher.
        if working_s > self._timeout_s:
            return f"no answer to one group within teacher.timeout_s = {self._timeout_s:g} s"
        return None

    def _report(self, ticket: Ticket, reason: str) -> bool:
        """Report a dead teacher to the pool; return whether this group may have killed it.

        A teacher takes groups in the order in which they were sent, and works on `IN_HAND` groups at a time. So only
        the oldest groups of this rank can have killed it. The groups queued behind them go to other teachers.
        """
        number = ticket.teacher.number
        with self._lock:
            is_first = number not in self._suspects
            if is_first:
                # Chosen once, by the first thread that notices the death. As soon as groups are settled, groups that
                # only waited in the queue are the oldest.
                self._suspects[number] = self._sent[number][:IN_HAND]
            self._members.pop(number, None)
        # Outside of the lock: this waits for the pool. Meanwhile the entry in `_suspects` keeps other threads from a
        # second report, and keeps an older roster from bringing the teacher back.
        if is_first and not self._pool.lost(number, reason):
            with self._lock:
                del self._suspects[number]  # the pool had removed it for a lease, after which it may return
        with self._lock:
            return ticket in self._suspects.get(number, ())

    def _settle(self, ticket: Ticket) -> None:
        with self._lock:
            self._sent[ticket.teacher.number].remove(ticket)

    # ------------------------------------------------------------------------------------------------- examination

    def _examine(self, group: Sequence[Rendering], score: Callable[[ModelInputs, str], GroupAnswer]) -> Answer:
        # One name for each search: two searches on one teacher could not tell whose group killed it.
        holder = f"{self._name}/{next(self._examinations)}"
        try:
            return examine(group, self._stack, lambda inputs: score(inputs, holder))
        finally:
            self._pool.end_lease(holder, is_alive=True)

    def _score(self, inputs: ModelInputs, holder: str) -> GroupAnswer:
        """Ask any teacher. For groups that raised an error without killing a teacher. Raises Unanswered."""
        ticket = self._send(inputs)
        try:
            return self._receive(ticket)
        except Unanswered as failure:
            if not failure.is_deadly:
                raise
            self._report(ticket, str(failure))
        finally:
            self._settle(ticket)
        try:
            return self._score_alone(inputs, holder)
        finally:
            # At once: the rest of this examination waits for any teacher, and this one may be the only one.
            self._pool.end_lease(holder, is_alive=True)

    def _score_alone(self, inputs: ModelInputs, holder: str) -> GroupAnswer:
        """Ask an exclusive teacher. If it dies, this group killed it, as it has no other group. Raises Unanswered."""
        teacher = self._lease(holder)
        try:
            return self._receive(Ticket(teacher, teacher.submit(inputs)))
        except Unanswered as failure:
            if failure.is_deadly:
                self._pool.end_lease(holder, is_alive=False)
            raise

    def _lease(self, holder: str) -> Teacher:
        """Wait for an exclusive teacher. There is no timeout: the pool has a teacher, or is starting one, or raises."""
        pause = POLL_S[0]
        while (teacher := self._pool.lease(holder)) is None:
            self._pause(pause)
            pause = min(1.5 * pause, POLL_S[1])
        return teacher

    # ---------------------------------------------------------------------------------------------------- the pool

    def _wait_for_members(self) -> None:
        """Block until there is a teacher.

        There is no timeout while the pool says that teachers are placed, loaded, replaced or leased. A timeout would
        compete with `teacher.timeout_s`, `cluster.start_timeout_s` and the timeouts of the ranks' collectives, and the
        shortest of them would end a job that only has to wait. Raises TeacherError if the pool has given up, or if it
        has no teacher, not even one that starts, for `cluster.start_timeout_s`.
        """
        begun = since = told = time.monotonic()
        pause = POLL_S[0]
        while not self._members:
            self._refresh(pause)
            now = time.monotonic()
            if self._members:
                return
            if self._is_expecting:
                since = now
            elif now - since > self._start_timeout_s:
                raise TeacherError(
                    f"no teacher came back within cluster.start_timeout_s = {self._start_timeout_s:g} s. Check that "
                    "the cluster has a node for one."
                )
            if now - told > 60:
                told = now
                _LOG.warning("no teacher for %.0f s; the pool waits for a node or for the model to load", now - begun)
            self._pause(pause)
            pause = min(1.5 * pause, POLL_S[1])

    def _refresh(self, at_most_every_s: float) -> None:
        """Ask the pool for its members. Of all waiting threads, one asks."""
        with self._refreshing:
            if time.monotonic() - self._refreshed < at_most_every_s:
                return
            self._take(self._pool.roster(self._version))
            self._refreshed = time.monotonic()

    def _take(self, roster: Any) -> None:
        with self._lock:
            # Heartbeat and `_refresh` may bring their rosters in the wrong order. This corrects itself: the older
            # version goes to the pool with the next request, and the pool then sends its members again.
            self._is_expecting = roster.is_expecting
            if roster.members is not None:
                self._version = roster.version
                # A roster sent before our report may still name a teacher that we reported as dead.
                self._members = {
                    number: teacher for number, teacher in roster.members.items() if number not in self._suspects
                }

    def _pause(self, seconds: float) -> None:
        self._is_closed.wait(seconds)
        self._check_open()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_closed.is_set():
            raise TeacherError("the client of the teachers was closed while a teacher had a group of samples")

    def _beat(self) -> None:
        """Send heartbeats to the pool. On a separate thread, so that a slow pool does not delay training."""
        begun = time.monotonic()
        while not self._is_closed.wait(HEARTBEAT_S):
            now = time.monotonic()
            with self._lock:
                # The feed reports a wait when it ends, so it may be longer than the time since the last heartbeat.
                waiting, self._waited_s = min(self._waited_s / (now - begun), 1.0), 0.0
                answers, self._answers = self._answers, 0
            try:
                self._take(self._pool.heartbeat(self._name, waiting, answers, self._version))
            except Exception as error:  # raised again by the thread of a group that waits
                self._failure = error
                return
            begun = now
