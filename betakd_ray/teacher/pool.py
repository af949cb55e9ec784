"""The teacher as a service: actors that load once a job and outlive every restart of the students.

`TeacherPool` is the one process that knows the members: it starts them, replaces the dead, and between `min` and `max`
grows while students wait and shrinks while teachers idle. Students talk to the members directly (`TeacherClient`): one
hop through the object store.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from betakd_ray.data.collate import Batch
from betakd_ray.errors import ClusterError, TeacherError
from betakd_ray.models.inputs import ModelInputs
from betakd_ray.spec import TeacherPoolSpec, TeacherSpec
from betakd_ray.teacher.cache import CacheWriter, joined
from betakd_ray.teacher.scorer import TeacherScorer
from betakd_ray.teacher.signal import Needs, Signal, TeacherFacts

HEARTBEAT_S = 5.0
FORGET_AFTER_S = 12 * HEARTBEAT_S
GROW_ABOVE = 0.10
"""Share of their time that students may wait for teachers before the pool grows."""
SHRINK_BELOW = 0.02
SHRINK_AFTER_S = 60.0

Members = dict[int, ActorHandle]


class TeacherPool:
    """Keeps the teachers alive. Runs as an actor without CPU or GPU of its own."""

    def __init__(self, teacher: TeacherSpec, needs: Needs, pool: TeacherPoolSpec, gpus: float) -> None:
        self._min, self._max = pool.min, max(pool.min, pool.max or pool.min)
        self._restarts_left = pool.max_restarts * self._max
        self._start = ray.remote(TeacherScorer).options(
            num_cpus=pool.cpus, num_gpus=gpus, resources=pool.resources or None, label_selector=pool.labels or None
        )
        self._arguments = (teacher, needs)
        self._pending: dict[int, tuple[ActorHandle, Any]] = {}
        self._members: Members = {}
        self._calm_since = time.monotonic()
        self._reports: dict[int, tuple[float, float]] = {}
        self._next = 0
        self.restarts = 0
        for _ in range(self._min):
            self._add()

    def wait_until_ready(self, timeout_s: float) -> TeacherFacts:
        """Block until `min` teachers are loaded.

        Raises ClusterError after `timeout_s`, TeacherError if none can load.
        """
        deadline = time.monotonic() + timeout_s
        while len(self.members()) < self._min:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"cluster.teacher: {len(self._members)} of {self._min} teachers were ready within "
                    f"cluster.start_timeout_s = {timeout_s:g}. The cluster has {ray.cluster_resources()}; lower "
                    "cluster.teacher.min or its gpus, or add nodes."
                )
            ray.wait([ready for _, ready in self._pending.values()], timeout=1.0)
        teacher = next(iter(self._members.values()))
        return cast(TeacherFacts, ray.get(teacher.facts.remote()))  # Ray does not type a handle's methods

    def members(self) -> Members:
        """Teachers that are loaded. Raises TeacherError when they die as fast as they are replaced."""
        for number, (actor, ready) in list(self._pending.items()):
            if not ray.wait([ready], timeout=0)[0]:
                continue
            del self._pending[number]
            try:
                ray.get(ready)
                self._members[number] = actor
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

    def heartbeat(self, client: int, waiting: float) -> Members:
        """A student reports the share of its time spent waiting for teachers; the pool resizes and says who is in."""
        now = time.monotonic()
        self._reports[client] = (now, waiting)
        # A student that is silent may be gone, with the workers it was one of.
        most = max(share for since, share in self._reports.values() if now - since < FORGET_AFTER_S)
        if most > SHRINK_BELOW:
            self._calm_since = now
        if most > GROW_ABOVE and not self._pending and len(self._members) < self._max:
            self._add()
        elif now - self._calm_since > SHRINK_AFTER_S and len(self._members) > self._min:
            self._calm_since = now
            # Queued behind the requests it still holds, so none is lost.
            self._members.popitem()[1].__ray_terminate__.remote()
        return self.members()

    def _add(self) -> None:
        actor = cast(ActorHandle, self._start.remote(*self._arguments))  # typed as a handle or the class
        self._pending[self._next] = (actor, actor.__ray_ready__.remote())
        self._next += 1

    def _replace(self, reason: Exception) -> None:
        if self._restarts_left <= 0:
            # Ray's text ends with what the actor itself raised, if it did.
            last = str(reason).strip().splitlines()[-1]
            raise TeacherError(f"teachers keep dying (cluster.teacher.max_restarts is used up). The last one: {last}")
        self._restarts_left -= 1
        self.restarts += 1
        self._add()


def here() -> NodeAffinitySchedulingStrategy:
    """With the driver, whose loss ends the job anyway: no other node's loss shall."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def start_pool(teacher: TeacherSpec, needs: Needs, pool: TeacherPoolSpec, gpus: float) -> ActorHandle:
    """The pool as an actor, owned by the caller: it lives as long as the job's driver does."""
    manager = ray.remote(TeacherPool).options(num_cpus=0, max_concurrency=1, scheduling_strategy=here())
    return cast(ActorHandle, manager.remote(teacher, needs, pool, gpus))


@dataclass
class Request:
    """A micro-batch that is with a teacher."""

    inputs: "ray.ObjectRef"
    teacher: int
    answer: "ray.ObjectRef"
    tries: int = 1


@dataclass
class TeacherClient:
    """A student worker's side: sends micro-batches to the least loaded teacher and waits for the answers.

    A teacher that dies or stays silent for `timeout_s` is reported and the batch goes to another; the student never
    restarts for it.
    """

    pool: ActorHandle
    rank: int
    timeout_s: float
    start_timeout_s: float
    max_tries: int = 3
    waited_s: float = 0.0
    _members: Members = field(default_factory=dict)
    _load: dict[int, int] = field(default_factory=dict)
    _beat: float = field(default_factory=time.monotonic)
    _waited_at_beat: float = 0.0

    def submit(self, inputs: ModelInputs) -> Request:
        """Send a micro-batch; returns at once."""
        reference = ray.put(inputs)
        return Request(reference, *self._send(reference))

    def result(self, request: Request) -> Signal:
        """The teacher's answer. Raises TeacherError if the batch fails `max_tries` times."""
        start = time.monotonic()
        try:
            return self._result(request)
        finally:
            self._load[request.teacher] -= 1
            self.waited_s += time.monotonic() - start
            self._maybe_beat()

    def _result(self, request: Request) -> Signal:
        while True:
            try:
                return ray.get(request.answer, timeout=self.timeout_s)
            except RayTaskError as error:
                raise TeacherError(f"the teacher cannot score a batch: {error.cause}") from error
            except (RayActorError, ObjectLostError) as error:  # the actor, or the node that held its answer
                reason = str(error)
            except GetTimeoutError:
                reason = f"no answer within teacher.timeout_s = {self.timeout_s:g} s"
            if request.tries >= self.max_tries:
                raise TeacherError(f"a batch was sent to {request.tries} teachers and none answered: {reason}")
            self._load[request.teacher] -= 1
            self._members = unwrapped(self.pool.lost.remote(request.teacher, reason)) or {}
            request.teacher, request.answer = self._send(request.inputs)
            request.tries += 1

    def _send(self, inputs: "ray.ObjectRef") -> tuple[int, "ray.ObjectRef"]:
        deadline = time.monotonic() + self.start_timeout_s
        while not self._members:
            self._members = unwrapped(self.pool.members.remote())
            if time.monotonic() > deadline:
                raise TeacherError(
                    f"no teacher came back within cluster.start_timeout_s = {self.start_timeout_s:g} s; is there still "
                    "a node for one?"
                )
            if not self._members:
                time.sleep(0.2)
        number = min(self._members, key=lambda each: (self._load.get(each, 0), (each - self.rank) % 64))
        self._load[number] = self._load.get(number, 0) + 1
        return number, self._members[number].score.remote(inputs)

    def _maybe_beat(self) -> None:
        elapsed = time.monotonic() - self._beat
        if elapsed < HEARTBEAT_S:
            return
        self._members = unwrapped(
            self.pool.heartbeat.remote(self.rank, (self.waited_s - self._waited_at_beat) / elapsed)
        )
        self._beat, self._waited_at_beat = time.monotonic(), self.waited_s


def unwrapped(answer: "ray.ObjectRef") -> Any:
    """What a call returned, or the error that it raised, as itself."""
    try:
        return ray.get(answer)
    except RayTaskError as error:
        raise error.cause from error


def scored(
    batches: Iterator[Batch], client: TeacherClient, window: int, needs: Needs, cache: CacheWriter | None = None
) -> Iterator[tuple[Batch, Signal]]:
    """Each batch with the teacher's answer, in order, keeping `window` batches ahead with the teacher.

    A batch that carries its signals is not sent; the answers to others go to the `cache`, if there is one.
    """
    ahead: deque[tuple[Batch, Request | None]] = deque()

    def first() -> tuple[Batch, Signal]:
        batch, request = ahead.popleft()
        if request is None:
            return batch, joined(batch.signals or [], batch.teacher, needs)
        signal = client.result(request)
        if cache:
            cache.add(batch.ids, batch.teacher, signal)
        return batch, signal

    for batch in batches:
        ahead.append((batch, None if batch.signals else client.submit(batch.teacher)))
        if len(ahead) > window:
            yield first()
    while ahead:
        yield first()
