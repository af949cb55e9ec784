"""Teachers without a model and without Ray: they take their time, in order, and can die, hang or refuse a group.

They need no threads of their own: when a group will be answered is known when it is sent, and whoever asks for the
answer sleeps until then. The pool is the real one, around such teachers.
"""

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.packing import stack
from betakd_ray.batch.sample import Rendering
from betakd_ray.spec import TeacherPoolSpec, TeacherSpec
from betakd_ray.teacher.client import TeacherClient
from betakd_ray.teacher.parts import GroupAnswer, Needs, TeacherFacts
from betakd_ray.teacher.pool import TeacherPool
from betakd_ray.teacher.ports import Roster, Teacher, Unanswered

NEEDS = Needs(frozenset({"hidden"}))
FACTS = TeacherFacts(width=2, heads=1, dtype="float32")
PAD, IMAGE = 0, 1


def rendering(token: int, length: int = 8) -> Rendering:
    """Return a text-only sample of one token throughout, whose last half is the answer."""
    answer = np.arange(length) >= length // 2
    return Rendering(np.full(length, token, np.int32), answer)


def stacked(group: Sequence[Rendering]) -> ModelInputs:
    """Return the samples as a teacher takes them."""
    return stack(list(group), PAD, IMAGE)


def answered(inputs: ModelInputs, busy_s: float = 0.0) -> GroupAnswer:
    """Return an answer that shows which sample it is of: its first token and its row's target."""
    first = inputs.input_ids[inputs.row_sample, 0]
    hidden = np.stack([first, inputs.targets], axis=1).astype(np.float32)
    is_finite = np.ones(inputs.size, dtype=bool)
    return GroupAnswer({"hidden": hidden}, inputs.rows_per_sample, inputs.visual_per_sample, is_finite, busy_s)


@dataclass(frozen=True)
class Behaviour:
    """How teachers are."""

    seconds: Callable[[ModelInputs], float] = lambda _: 0.0
    """What a group takes; infinity for one that a teacher hangs at."""
    is_deadly: Callable[[ModelInputs], bool] = lambda _: False
    is_refused: Callable[[ModelInputs], bool] = lambda _: False
    """Whether the teacher raises an error, and lives."""
    load_s: float = 0.0


class FakeTeacher:
    """A `ports.Teacher`."""

    def __init__(self, number: int, behaviour: Behaviour) -> None:
        self._number, self._behaviour = number, behaviour
        self.changed = threading.Condition()
        self.loaded_at = self._free_at = time.monotonic() + behaviour.load_s
        self.dies_at = math.inf
        self.is_silent = False
        self.work: list[tuple[float, float]] = []
        """When it began each group, and when it was done."""

    @property
    def number(self) -> int:
        return self._number

    def submit(self, inputs: ModelInputs) -> "FakePending":
        with self.changed:
            start = max(time.monotonic(), self._free_at)
            done = start + self._behaviour.seconds(inputs)
            self.work.append((start, done))
            self._free_at = done
            if self._behaviour.is_deadly(inputs):
                self.dies_at = min(self.dies_at, start)
        if self._behaviour.is_refused(inputs):
            return FakePending(self, done, partial(_refuse, "IndexError: no such token"))
        return FakePending(self, done, partial(answered, inputs, done - start))

    def health(self, timeout_s: float) -> float:
        if self.is_silent:
            time.sleep(timeout_s)
            raise TimeoutError
        self.require_alive()
        now = time.monotonic()
        return next((now - start for start, done in self.work if start <= now < done), 0.0)

    def facts(self) -> TeacherFacts:
        self.require_alive()
        return FACTS

    def head(self) -> NDArray[Any]:
        self.require_alive()
        return np.full((4, 2), self.number, np.float32)

    def ready(self) -> "FakePending":
        return FakePending(self, self.loaded_at, lambda: None)

    def drain(self, quiet_s: float) -> "FakePending":
        return FakePending(self, max(self._free_at, time.monotonic()) + quiet_s, lambda: None)

    def kill(self) -> None:
        with self.changed:
            self.dies_at = min(self.dies_at, time.monotonic())
            self.changed.notify_all()

    def require_alive(self) -> None:
        """Raises Unanswered."""
        if time.monotonic() >= self.dies_at:
            raise Unanswered("the teacher died")

    def busy_s(self, begin: float, end: float) -> float:
        """Return the seconds that it worked within an interval."""
        last = min(end, self.dies_at)
        return sum(max(0.0, min(done, last) - max(start, begin)) for start, done in list(self.work))


def _refuse(reason: str) -> None:
    raise Unanswered(reason, is_deadly=False)


@dataclass(frozen=True)
class FakePending:
    """A `ports.Pending`: there at a time that is known."""

    teacher: FakeTeacher
    done_at: float
    answer: Callable[[], Any]

    def result(self, timeout_s: float) -> Any:
        teacher = self.teacher
        deadline = time.monotonic() + timeout_s
        with teacher.changed:
            while True:
                now = time.monotonic()
                done_at = math.inf if teacher.is_silent else self.done_at
                if now >= done_at and done_at <= teacher.dies_at:
                    break
                if now >= teacher.dies_at:
                    raise Unanswered("the teacher died")
                if now >= deadline:
                    raise TimeoutError
                teacher.changed.wait(min(done_at, teacher.dies_at, deadline) - now)
        return self.answer()


class _Pool(TeacherPool):
    """The real pool around such teachers."""

    def __init__(self, behaviour: Behaviour, spec: TeacherPoolSpec) -> None:
        self.behaviour = behaviour
        self.placed: list[FakeTeacher] = []
        super().__init__(TeacherSpec(path="org/none"), NEEDS, spec, 0.0)

    def _place(self, number: int) -> Teacher:
        self.placed.append(FakeTeacher(number, self.behaviour))
        return self.placed[-1]

    def _show(self) -> None:
        pass


@dataclass
class FakePool:
    """A `ports.Pool`: one call at a time, as with an actor."""

    behaviour: Behaviour
    spec: TeacherPoolSpec
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.pool = _Pool(self.behaviour, self.spec)

    @property
    def teachers(self) -> list[FakeTeacher]:
        """All that were ever placed."""
        return self.pool.placed

    def members(self) -> list[FakeTeacher]:
        with self.lock:
            numbers = set(self.pool.members())
        return [teacher for teacher in self.pool.placed if teacher.number in numbers]

    def roster(self, version: int) -> Roster:
        with self.lock:
            return self.pool.roster(version)

    def lost(self, number: int, reason: str) -> bool:
        with self.lock:
            return self.pool.lost(number, reason)

    def lease(self, holder: str) -> Teacher | None:
        with self.lock:
            return self.pool.lease(holder)

    def end_lease(self, holder: str, *, is_alive: bool) -> None:
        with self.lock:
            self.pool.end_lease(holder, is_alive=is_alive)

    def heartbeat(self, client: str, waiting: float, answers: int, version: int) -> Roster:
        with self.lock:
            return self.pool.heartbeat(client, waiting, answers, version)


def clients(pool: FakePool, ranks: int, timeout_s: float = 600.0, start_timeout_s: float = 60.0) -> list[TeacherClient]:
    """Return a client for each of so many ranks."""
    spec = TeacherSpec(path="org/none", timeout_s=timeout_s)
    return [TeacherClient(pool, rank, ranks, spec, start_timeout_s, stacked) for rank in range(ranks)]


def renderings(count: int, length: int = 8) -> list[Rendering]:
    """Return samples that differ in their token."""
    return [rendering(token, length) for token in itertools.islice(itertools.count(2), count)]
