"""Fake teachers without a model and without Ray: they answer in order after a set time, and can die, hang or refuse.

They need no threads of their own. The time of an answer is known when its group is sent, and the caller sleeps until
then. The pool is the real one, with such teachers in it.
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
from betakd_ray.teacher.answers import GroupAnswer
from betakd_ray.teacher.client import TeacherClient
from betakd_ray.teacher.parts import Needs, TeacherFacts
from betakd_ray.teacher.pool import TeacherPool
from betakd_ray.teacher.ports import Roster, Teacher, Unanswered

NEEDS = Needs(frozenset({"hidden"}))
FACTS = TeacherFacts(width=2, heads=1, dtype="float32")
PAD, IMAGE = 0, 1


def rendering(token: int, length: int = 8) -> Rendering:
    """Return a text-only sample that repeats one token; its second half is the answer."""
    answer = np.arange(length) >= length // 2
    return Rendering(np.full(length, token, np.int32), answer)


def stacked(group: Sequence[Rendering]) -> ModelInputs:
    """Return the samples as one batch, as a teacher takes them."""
    return stack(list(group), PAD, IMAGE)


def answered(inputs: ModelInputs, busy_s: float = 0.0) -> GroupAnswer:
    """Return an answer that identifies its sample: hidden states [rows, 2] of the first token and the row's target."""
    first = inputs.input_ids[inputs.row_sample, 0]
    hidden = np.stack([first, inputs.targets], axis=1).astype(np.float32)
    is_finite = np.ones(inputs.size, dtype=bool)
    return GroupAnswer({"hidden": hidden}, inputs.rows_per_sample, inputs.visual_per_sample, is_finite, busy_s)


@dataclass(frozen=True)
class Behaviour:
    """Behaviour of fake teachers."""

    seconds: Callable[[ModelInputs], float] = lambda _: 0.0
    """Function that returns the seconds for a group; infinity if the teacher hangs at it."""
    is_deadly: Callable[[ModelInputs], bool] = lambda _: False
    """Function that says whether a group kills the teacher."""
    is_refused: Callable[[ModelInputs], bool] = lambda _: False
    """Function that says whether the teacher raises an error at a group, and stays alive."""
    load_s: float = 0.0
    """Seconds that a teacher takes to load."""
    answer: Callable[[int, ModelInputs], GroupAnswer] = lambda _, inputs: answered(inputs)
    """Function of a teacher's number that answers what its own process asks."""


class FakeTeacher:
    """Fake `ports.Teacher`."""

    def __init__(self, number: int, behaviour: Behaviour) -> None:
        self._number, self._behaviour = number, behaviour
        self.changed = threading.Condition()
        self.loaded_at = self._free_at = time.monotonic() + behaviour.load_s
        self.dies_at = math.inf
        self.is_silent = False
        self.device = "cpu"
        self.work: list[tuple[float, float]] = []
        """Start and end of each group, in seconds of `time.monotonic`."""

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

    def apply(self, function: Callable[..., Any], *arguments: Any) -> "FakePending":
        return FakePending(self, max(self.loaded_at, time.monotonic()), partial(function, self, *arguments))

    def health(self, timeout_s: float) -> float:
        self.require_alive(timeout_s)
        now = time.monotonic()
        return next((now - start for start, done in self.work if start <= now < done), 0.0)

    def score(self, inputs: ModelInputs) -> GroupAnswer:
        """Answer at once, as `TeacherScorer.score` does in the teacher's process."""
        return self._behaviour.answer(self._number, inputs)

    def facts(self, timeout_s: float) -> TeacherFacts:
        self.require_alive(timeout_s)
        return FACTS

    def head(self, timeout_s: float) -> NDArray[Any]:
        self.require_alive(timeout_s)
        return np.full((4, 2), self.number, np.float32)

    def ready(self) -> "FakePending":
        return FakePending(self, self.loaded_at, lambda: None)

    def drain(self, quiet_s: float) -> "FakePending":
        return FakePending(self, max(self._free_at, time.monotonic()) + quiet_s, lambda: None)

    def kill(self) -> None:
        with self.changed:
            self.dies_at = min(self.dies_at, time.monotonic())
            self.changed.notify_all()

    def require_alive(self, timeout_s: float) -> None:
        """Raise Unanswered if the teacher is dead, and TimeoutError if it is silent, after that time."""
        if self.is_silent:
            time.sleep(timeout_s)
            raise TimeoutError
        if time.monotonic() >= self.dies_at:
            raise Unanswered("the teacher died")

    def busy_s(self, begin: float, end: float) -> float:
        """Return the seconds that it worked within an interval of `time.monotonic`."""
        last = min(end, self.dies_at)
        return sum(max(0.0, min(done, last) - max(start, begin)) for start, done in list(self.work))


def _refuse(reason: str) -> None:
    raise Unanswered(reason, is_deadly=False)


@dataclass(frozen=True)
class FakePending:
    """Fake `ports.Pending`, whose answer comes at a known time."""

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
    """The real pool with fake teachers."""

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
    """Fake `ports.Pool` that runs one call at a time, like an actor."""

    behaviour: Behaviour
    spec: TeacherPoolSpec
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.pool = _Pool(self.behaviour, self.spec)

    @property
    def teachers(self) -> list[FakeTeacher]:
        """Return all teachers that were ever placed, dead ones too."""
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
    """Return a client for each of `ranks` ranks."""
    spec = TeacherSpec(path="org/none", timeout_s=timeout_s)
    return [TeacherClient(pool, rank, ranks, spec, start_timeout_s, stacked) for rank in range(ranks)]


def renderings(count: int, length: int = 8) -> list[Rendering]:
    """Return `count` samples, each with a different token."""
    return [rendering(token, length) for token in itertools.islice(itertools.count(2), count)]
