"""A student worker's side of the teacher pool: every batch gets its answer, whatever becomes of the teachers.

A teacher that dies or stays silent for `teacher.timeout_s` is reported, and its batches go to others; the student
waits, and never restarts for it. A batch that two teachers died of is suspect: it is examined, with a teacher of its
own, until the sample at fault is found, which then takes no part in the step (`examination`). So is one that a teacher
cannot score and lives.
"""

import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.data.rows import Batch
from betakd_ray.errors import TeacherError
from betakd_ray.teacher.cache import CacheWriter, joined
from betakd_ray.teacher.examination import Score, Unanswered, examine
from betakd_ray.teacher.pool import Members, unwrapped
from betakd_ray.teacher.signal import Needs, Signal

HEARTBEAT_S = 5.0
SUSPECT_AFTER = 2
"""Teachers that a batch may cost before it is examined."""


@dataclass
class Request:
    """A micro-batch that is with a teacher."""

    inputs: "ray.ObjectRef"
    teacher: int
    answer: "ray.ObjectRef"
    failures: int = 0


@dataclass
class TeacherClient:
    """One for each rank. Answers are to be asked for in the order of `submit`."""

    pool: ActorHandle
    rank: int
    timeout_s: float
    start_timeout_s: float
    waited_s: float = 0.0
    _name: str = field(default_factory=lambda: os.urandom(8).hex())
    _members: Members = field(default_factory=dict)
    _load: dict[int, int] = field(default_factory=dict)
    _failed: set[int] = field(default_factory=set)
    _beat: float = field(default_factory=time.monotonic)
    _waited_at_beat: float = 0.0
    _answers: int = 0

    @property
    def queue_depth(self) -> int:
        """Micro-batches that are with the teachers."""
        return sum(self._load.values())

    def submit(self, inputs: ModelInputs) -> Request:
        """Send a micro-batch; returns at once."""
        reference = ray.put(inputs)
        return Request(reference, *self._send(reference))

    def result(self, request: Request) -> Signal:
        """The teacher's answer. Raises TeacherError if there are no teachers, or none can answer."""
        start = time.monotonic()
        try:
            return self._result(request)
        finally:
            self._answers += 1
            self.waited_s += time.monotonic() - start
            self._maybe_beat()

    def _result(self, request: Request) -> Signal:
        while True:
            try:
                return _answer(request.answer, self.timeout_s)
            except Unanswered as reason:
                failure = reason
            finally:
                self._load[request.teacher] -= 1
            if not failure.is_deadly:
                return self._examine(request, self._score)
            self._blame(request, str(failure))
            if request.failures >= SUSPECT_AFTER:
                return self._examine(request, self._score_alone)
            request.teacher, request.answer = self._send(request.inputs)

    def _blame(self, request: Request, reason: str) -> None:
        """Only the first of the batches that a teacher had can be what it died of; the others just go elsewhere."""
        request.failures += request.teacher not in self._failed
        self._failed.add(request.teacher)
        unwrapped(self.pool.lost.remote(request.teacher, reason))
        self._members = {}

    def _examine(self, request: Request, score: Score) -> Signal:
        try:
            return examine(ray.get(request.inputs), score)
        finally:
            unwrapped(self.pool.end_lease.remote(self._name, is_alive=True))

    def _score(self, inputs: ModelInputs) -> Signal:
        """By any teacher: it raises, and lives. Raises Unanswered."""
        number, answer = self._send(ray.put(inputs))
        try:
            return _answer(answer, self.timeout_s)
        except Unanswered as failure:
            if not failure.is_deadly:
                raise
            unwrapped(self.pool.lost.remote(number, str(failure)))
            self._members = {}
        finally:
            self._load[number] -= 1
        return self._score_alone(inputs)

    def _score_alone(self, inputs: ModelInputs) -> Signal:
        """By a teacher that nobody else can have sent anything to. Raises Unanswered."""
        teacher = self._lease()
        try:
            return _answer(teacher.score.remote(inputs), self.timeout_s)
        except Unanswered as failure:
            if failure.is_deadly:
                unwrapped(self.pool.end_lease.remote(self._name, is_alive=False))
            raise

    def _lease(self) -> ActorHandle:
        patience = Patience(self.start_timeout_s)
        while (lease := unwrapped(self.pool.lease.remote(self._name))) is None:
            patience.wait()
        return lease[1]

    def _send(self, inputs: "ray.ObjectRef") -> tuple[int, "ray.ObjectRef"]:
        patience = Patience(self.start_timeout_s)
        while not self._members:
            self._members = unwrapped(self.pool.members.remote())
            if not self._members:
                patience.wait(begin_anew=unwrapped(self.pool.is_lent.remote()))
        number = min(self._members, key=lambda each: (self._load.get(each, 0), (each - self.rank) % 64))
        self._load[number] = self._load.get(number, 0) + 1
        return number, self._members[number].score.remote(inputs)

    def _maybe_beat(self) -> None:
        elapsed = time.monotonic() - self._beat
        if elapsed < HEARTBEAT_S:
            return
        waiting = (self.waited_s - self._waited_at_beat) / elapsed
        self._members = unwrapped(self.pool.heartbeat.remote(self._name, waiting, self._answers))
        self._beat, self._waited_at_beat, self._answers = time.monotonic(), self.waited_s, 0


class Patience:
    """Waiting for a teacher, for so long and no longer."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._since = time.monotonic()

    def wait(self, *, begin_anew: bool = False) -> None:
        """A moment. Raises TeacherError when the time is over; `begin_anew` says that it is known what is going on."""
        if begin_anew:
            self._since = time.monotonic()
        if time.monotonic() - self._since > self._timeout_s:
            raise TeacherError(
                f"no teacher came back within cluster.start_timeout_s = {self._timeout_s:g} s; is there still a node "
                "for one?"
            )
        time.sleep(0.2)


def _answer(answer: "ray.ObjectRef", timeout_s: float) -> Signal:
    """Raises Unanswered with the reason."""
    try:
        return ray.get(answer, timeout=timeout_s)
    except RayTaskError as error:
        raise Unanswered(f"{type(error.cause).__name__}: {error.cause}", is_deadly=False) from error
    except (RayActorError, ObjectLostError) as error:  # the actor, or the node that held its answer
        raise Unanswered(f"the teacher died: {str(error).strip().splitlines()[0]}") from error
    except GetTimeoutError as error:
        raise Unanswered(f"no answer within teacher.timeout_s = {timeout_s:g} s") from error


def scored(
    batches: Iterator[Batch], client: TeacherClient, window: int, needs: Needs, cache: CacheWriter | None = None
) -> Iterator[tuple[Batch, Signal]]:
    """Each batch with the teacher's answer, in order, keeping `window` batches ahead with the teacher.

    A batch that carries its signals, or whose signals the `cache` has at hand, is not sent; the answers to others go
    there.
    """
    ahead: deque[tuple[Batch, Request | list[bytes]]] = deque()

    def first() -> tuple[Batch, Signal]:
        batch, request = ahead.popleft()
        if isinstance(request, list):
            return batch, joined(request, batch.teacher, needs)
        signal = client.result(request)
        if cache:
            cache.add(batch.ids, batch.teacher, signal)
        return batch, signal

    for batch in batches:
        known = batch.signals or (cache.known(batch.ids) if cache else None)
        ahead.append((batch, known or client.submit(batch.teacher)))
        if len(ahead) > window:
            yield first()
    while ahead:
        yield first()
