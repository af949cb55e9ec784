"""A student worker's side of the teacher pool: every group gets its answer, whatever becomes of the teachers.

A teacher that dies, or works on one group for longer than `teacher.timeout_s`, is reported, and its groups go to
others; the student waits, and never restarts for it. How long a group waits for its turn in a teacher's queue is no
reason to take the teacher for dead. A group that two teachers died of is suspect: it is examined, with a teacher of its
own, until the sample at fault is found, which then takes no part in training (`examination`). So is one that a teacher
cannot score and lives. Other groups go on meanwhile.
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
from betakd_ray.teacher.examination import Stack, examine
from betakd_ray.teacher.parts import Answer, GroupAnswer
from betakd_ray.teacher.ports import IN_HAND, Pending, Pool, Teacher, Unanswered

HEARTBEAT_S = 5.0
CHECK_S = 5.0
"""How long an answer is waited for before its teacher is asked how it is, and how long that may take."""
POLL_S = (0.2, 2.0)
"""Between two questions to the pool about teachers that are to come: at first, and in the end."""
SUSPECT_AFTER = 2
"""Teachers that a group may cost before it is examined."""
_LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class Ticket:
    """A group that is with a teacher."""

    teacher: Teacher
    pending: Pending | None = None


@dataclass
class Pulse:
    """What was last heard of a teacher."""

    heard: float = field(default_factory=time.monotonic)
    asked: float = 0.0


class TeacherClient:
    """One for each rank. Every method may be called from any thread; `score` is called from one thread for each group
    that is to be with the teachers at a time."""

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
        self._refreshing = threading.Lock()
        self._refreshed = 0.0
        self._beating = threading.Thread(target=self._beat, name="teacher-heartbeat", daemon=True)
        self._beating.start()

    @property
    def in_flight(self) -> int:
        """Return the groups that are with teachers."""
        with self._lock:
            return sum(map(len, self._sent.values()))

    def score(self, group: Sequence[Rendering]) -> Answer:
        """Return what the teacher says of each sample, once it is known.

        Raises TeacherError if the pool has given up, or the teacher cannot answer anything.
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
                self._settle(ticket)
            if not failure.is_deadly:
                return self._examine(group, self._score)
            if failures >= SUSPECT_AFTER:
                return self._examine(group, self._score_alone)

    def report_waiting(self, seconds: float) -> None:
        """Add time that the student waited for answers: the pool grows while students wait."""
        with self._lock:
            self._waited_s += seconds

    def head(self) -> NDArray[Any] | None:
        """Return the weight of the teacher's lm_head as it travels (see `parts.to_tensor`), straight from a teacher.

        None where no hidden states are asked for. All ranks ask the same teacher, so that it comes to a node once.
        """
        while True:
            with self._lock:
                teacher = self._members[min(self._members)] if self._members else None
            if teacher is None:
                self._wait_for_members()
                continue
            try:
                return teacher.head()
            except Unanswered as failure:
                self._report(Ticket(teacher), str(failure))

    def close(self) -> None:
        """End the heartbeat; whoever waits for an answer gets a TeacherError."""
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
                ticket.pending = ticket.teacher.submit(inputs)
                return ticket
            self._wait_for_members()

    def _choose(self) -> Teacher:
        """Return the teacher that has the fewest of this rank's groups.

        Ranks begin at places that are evenly spread over the teachers, and each goes on by one for each group. So every
        teacher gets the same share of the groups, however many teachers and ranks there are and whoever has died: with
        a fixed place for each rank, 64 ranks of four groups each would leave a third of 216 teachers without any.
        """
        numbers = sorted(self._members)
        count = len(numbers)
        first = self._rank * count // self._ranks + self._turn
        self._turn += 1
        at = min(range(count), key=lambda place: (len(self._sent[numbers[place]]), (place - first) % count))
        return self._members[numbers[at]]

    def _receive(self, ticket: Ticket) -> GroupAnswer:
        """Raises Unanswered."""
        assert ticket.pending is not None
        with self._lock:
            pulse = self._pulses[ticket.teacher.number]
        begun = time.monotonic()
        while True:
            try:
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
        """Return why a teacher that has not answered yet must be taken for dead, if it must."""
        now = time.monotonic()
        with self._lock:
            if teacher.number in self._suspects:
                return "it was reported as dead"
            if now - pulse.asked < self._check_s:
                return None  # another group's thread asks
            pulse.asked = now
        try:
            working_s = teacher.health(self._check_s)
        except TimeoutError:
            silent_s = time.monotonic() - pulse.heard
            return f"silent for teacher.timeout_s = {self._timeout_s:g} s" if silent_s > self._timeout_s else None
        except Unanswered as failure:
            return str(failure)
        pulse.heard = time.monotonic()
        if working_s > self._timeout_s:
            return f"no answer to one group within teacher.timeout_s = {self._timeout_s:g} s"
        return None

    def _report(self, ticket: Ticket, reason: str) -> bool:
        """Tell the pool of a dead teacher; returns whether it may have died of this group.

        A teacher takes groups in the order in which it was asked, and has a few in hand: only the oldest of this rank's
        can be what it died of. Those that were queued behind them just go elsewhere.
        """
        number = ticket.teacher.number
        with self._lock:
            is_first = number not in self._suspects
            if is_first:
                self._suspects[number] = self._sent[number][:IN_HAND]
            self._members.pop(number, None)
        if is_first and not self._pool.lost(number, reason):
            with self._lock:
                del self._suspects[number]  # it was told to leave, and may come back from a lease
        with self._lock:
            return ticket in self._suspects.get(number, ())

    def _settle(self, ticket: Ticket) -> None:
        with self._lock:
            self._sent[ticket.teacher.number].remove(ticket)

    # ------------------------------------------------------------------------------------------------- examination

    def _examine(self, group: Sequence[Rendering], score: Callable[[ModelInputs, str], GroupAnswer]) -> Answer:
        holder = f"{self._name}/{next(self._examinations)}"
        try:
            return examine(group, self._stack, lambda inputs: score(inputs, holder))
        finally:
            self._pool.end_lease(holder, is_alive=True)

    def _score(self, inputs: ModelInputs, holder: str) -> GroupAnswer:
        """Ask any teacher: for groups that raised an error without killing one. Raises Unanswered."""
        ticket = self._send(inputs)
        try:
            return self._receive(ticket)
        except Unanswered as failure:
            if not failure.is_deadly:
                raise
            self._report(ticket, str(failure))
        finally:
            self._settle(ticket)
        return self._score_alone(inputs, holder)

    def _score_alone(self, inputs: ModelInputs, holder: str) -> GroupAnswer:
        """Ask a teacher that nobody else can have sent anything to. Raises Unanswered."""
        teacher = self._lease(holder)
        try:
            return self._receive(Ticket(teacher, teacher.submit(inputs)))
        except Unanswered as failure:
            if failure.is_deadly:
                self._pool.end_lease(holder, is_alive=False)
            raise

    def _lease(self, holder: str) -> Teacher:
        """Wait for a teacher of one's own. There is no deadline: the pool has one, or is getting one, or raises."""
        pause = POLL_S[0]
        while (teacher := self._pool.lease(holder)) is None:
            self._pause(pause)
            pause = min(1.5 * pause, POLL_S[1])
        return teacher

    # ---------------------------------------------------------------------------------------------------- the pool

    def _wait_for_members(self) -> None:
        """Return once there is a teacher.

        As long as the pool says that teachers are placed, loaded, replaced or lent, there is no deadline: a limit here
        would be another one beside `teacher.timeout_s`, `cluster.start_timeout_s` and those of the ranks' collectives,
        and whichever is shortest would end a job that only had to wait. Raises TeacherError where the pool has given
        up, or knows of no teacher at all for `cluster.start_timeout_s`.
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
                    f"no teacher came back within cluster.start_timeout_s = {self._start_timeout_s:g} s; is there a "
                    "node for one?"
                )
            if now - told > 60:
                told = now
                _LOG.warning("no teacher for %.0f s; the pool waits for a node or for the model to load", now - begun)
            self._pause(pause)
            pause = min(1.5 * pause, POLL_S[1])

    def _refresh(self, at_most_every_s: float) -> None:
        """Ask the pool who is in: one thread for all that wait."""
        with self._refreshing:
            if time.monotonic() - self._refreshed < at_most_every_s:
                return
            self._take(self._pool.roster(self._version))
            self._refreshed = time.monotonic()

    def _take(self, roster: Any) -> None:
        with self._lock:
            self._is_expecting = roster.is_expecting
            if roster.members is not None:
                self._version = roster.version
                # One that was reported may still be in a roster that was on its way.
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
            raise TeacherError("the client of the teachers was closed while a group was with them")

    def _beat(self) -> None:
        """Report to the pool every few seconds. Apart from all that trains, as the pool may take its time to answer."""
        begun = time.monotonic()
        while not self._is_closed.wait(HEARTBEAT_S):
            now = time.monotonic()
            with self._lock:
                # The feed reports a wait when it is over, which may be longer than the time since the last beat.
                waiting, self._waited_s = min(self._waited_s / (now - begun), 1.0), 0.0
                answers, self._answers = self._answers, 0
            try:
                self._take(self._pool.heartbeat(self._name, waiting, answers, self._version))
            except Exception as error:  # raised again where a group waits
                self._failure = error
                return
            begun = now
