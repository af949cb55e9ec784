"""Teachers and their pool as actors in simulated time. The pool is the real one; an answer names its sample."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import RayActorError

from benchmarks.fakes import FACTS, NEEDS, answered
from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.sample import Rendering
from betakd_ray.errors import BetaKDError
from betakd_ray.spec import TeacherPoolSpec, TeacherSpec
from betakd_ray.teacher.parts import TeacherFacts
from betakd_ray.teacher.pool import TeacherPool
from betakd_ray.teacher.ports import IN_HAND, Roster, Teacher, Unanswered
from betakd_ray.teacher.scorer import QUIET_POLL_S
from tests.simulation.cluster import Event
from tests.simulation.scheduler import Scheduler, Violation

SPEC = TeacherSpec(path="org/none", timeout_s=60.0)
LATENCIES_S = (0.001, 0.005, 0.05)
"""Seconds that a message takes."""
LATE_S = (7.0, 40.0, 200.0)
"""Seconds that a message takes which is late."""
LOAD_S, GROUP_S = (1.0, 10.0, 60.0), (0.05, 0.3, 2.0)
"""Seconds that a teacher takes to load, and for a group."""
FIRST_TOKEN = 2
"""Lowest token of a sample: 0 and 1 pad, and stand for an image."""
STALLS_S = (20.0, 300.0, 1e7)
"""Seconds for which a teacher stands still; the last is for ever."""
FAULTS = ("death", "death at start", "stall", "hang", "lost answer", "late answer", "kill is lost")
POOL_FAULTS = ("pool's answer lost", "pool's answer late", "death of the pool", "death of a rank")
"""Kinds of faults. In a schedule, each operation may meet those that belong to it."""


@dataclass
class World:
    """What the actors of one schedule share."""

    scheduler: Scheduler
    deadly: set[int] = field(default_factory=set)
    """Tokens of the samples that kill a teacher."""
    refused: set[int] = field(default_factory=set)
    """Tokens of the samples at which a teacher raises an error."""
    unlucky: set[int] = field(default_factory=set)
    """Tokens that a leased teacher had when a fault befell it: the fault looks like theirs."""
    has_blanked: bool = False
    """Whether a fault befell a leased teacher that had a blank sample."""
    deaths: int = 0
    """Number of teachers that died, or that the pool believes dead."""

    def fault(self, *kinds: str) -> str:
        """Return which of these faults the present operation meets; empty for none."""
        faults, random = self.scheduler.faults, self.scheduler.random
        if not faults.left or random.random() > faults.rate:
            return ""
        able = [kind for kind in kinds if kind in faults.kinds]
        if not able:
            return ""
        faults.left -= 1
        fault = random.choice(able)
        self.scheduler.note(f"fault: {fault}")
        return fault

    def latency(self, fault: str = "") -> float:
        return self.scheduler.random.choice(LATE_S if "late" in fault else LATENCIES_S)

    def has(self, inputs: ModelInputs, tokens: set[int]) -> bool:
        return not tokens.isdisjoint(inputs.input_ids[:, 0].tolist())


class Call:
    """A request to an actor, and later its answer: a `ports.Pending`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._is_answered = Event(scheduler)
        self._answer: Callable[[], Any] = lambda: None

    def answer(self, value: Any) -> None:
        if not self._is_answered.is_made:
            self._answer = lambda: value
            self._is_answered.set()

    def fail(self, error: Exception) -> None:
        def fail() -> None:
            raise error

        if not self._is_answered.is_made:
            self._answer = fail
            self._is_answered.set()

    @property
    def is_answered(self) -> bool:
        return self._is_answered.is_made

    def result(self, timeout_s: float = inf) -> Any:
        if not self._is_answered.is_made and (timeout_s <= 0 or not self._is_answered.wait(timeout_s)):
            raise TimeoutError
        return self._answer()


class SimulatedTeacher:
    """A `ports.Teacher` that answers one group after the other."""

    def __init__(self, number: int, world: World, is_leased: Callable[[int], bool]) -> None:
        self._number, self._world, self._scheduler, self._is_leased = number, world, world.scheduler, is_leased
        self.process = world.scheduler.process(f"teacher {number}", "")
        self._network = world.scheduler.process("the network", "")
        self._calls: list[Call] = []
        self._inbox: list[tuple[ModelInputs, Call]] = []
        self._has_work = Event(world.scheduler)
        self._last_arrival = 0.0
        self._since = inf
        self.is_ended = False
        self._loaded = self._call()
        self._scheduler.start(self.process, self.process.name, self._serve)

    @property
    def number(self) -> int:
        return self._number

    def submit(self, inputs: ModelInputs) -> Call:
        call = self._call()

        def arrive() -> None:
            self._inbox.append((inputs, call))
            self._has_work.set()

        # Calls of one process arrive in their order.
        self._last_arrival = max(self._last_arrival, self._scheduler.now + self._world.latency())
        self._later(arrive, self._last_arrival - self._scheduler.now)
        return call

    def apply(self, function: Callable[..., Any], *arguments: Any) -> Call:
        return self._ask(lambda: function(self, *arguments))

    def health(self, timeout_s: float) -> float:
        return self._ask(lambda: max(0.0, self._scheduler.now - self._since)).result(timeout_s)

    def facts(self, timeout_s: float) -> TeacherFacts:
        return self._ask(lambda: FACTS).result(timeout_s)

    def head(self, timeout_s: float) -> NDArray[Any]:
        return self._ask(lambda: np.full((4, 2), self.number, np.float32)).result(timeout_s)

    def ready(self) -> Call:
        return self._loaded

    def drain(self, quiet_s: float) -> Call:
        call = self._call()

        def run() -> None:
            since = self._scheduler.now
            while self._scheduler.now - since < quiet_s:
                if self._inbox:
                    since = self._scheduler.now
                # As often as a real one looks while it has groups, less often at rest, which nobody can tell.
                self._scheduler.pause(QUIET_POLL_S * 20)
            call.answer(None)

        self._later(run)
        return call

    def kill(self) -> None:
        if self.is_ended:
            return
        if self._world.fault("kill is lost"):
            self._world.deaths += 1
        else:
            self.die("is told to end")

    def die(self, how: str) -> None:
        """End the process. Whoever waits for an answer learns it a little later."""
        self._scheduler.note(f"{self.process.name} {how}")
        self.is_ended = True
        self._world.deaths += 1
        for call in self._calls:
            reason = Unanswered("the teacher died", detail="the teacher died")
            if not call.is_answered:
                self._scheduler.start(self._network, "the network", partial(call.fail, reason), self._world.latency())
        self._calls.clear()
        self._scheduler.kill(self.process)

    def _call(self) -> Call:
        call = Call(self._scheduler)
        self._calls.append(call)
        if self.is_ended:
            self._scheduler.start(
                self._network, "the network", partial(call.fail, Unanswered("the teacher died")), 0.01
            )
        return call

    def _ask(self, make: Callable[[], Any]) -> Call:
        call = self._call()
        self._later(lambda: call.answer(make()))
        return call

    def _later(self, run: Callable[[], None], delay_s: float = 0.01) -> None:
        self._scheduler.start(self.process, f"{self.process.name}'s call", run, delay_s)

    # ------------------------------------------------------------------------------------------- the process

    def _serve(self) -> None:
        random = self._scheduler.random
        self._scheduler.pause(random.choice(LOAD_S))
        if self._world.fault("death at start"):
            self.die("dies while it loads")
        self._loaded.answer(None)
        while True:
            while not self._inbox:
                self._has_work.clear()
                self._has_work.wait()
            self._score()

    def _score(self) -> None:
        """Answer the group that has waited longest."""
        world, scheduler = self._world, self._scheduler
        # A group may kill the teacher already when it is copied, behind others.
        place = scheduler.random.randrange(IN_HAND)
        if any(world.has(inputs, world.deadly) for inputs, _ in self._inbox[: place + 1]):
            self.die("dies of a sample")
        inputs, call = self._inbox[0]
        self._since = scheduler.now
        fault = self._befall()
        scheduler.pause(scheduler.random.choice(GROUP_S))
        busy_s, self._since = scheduler.now - self._since, inf
        self._inbox.pop(0)
        self._calls.remove(call)
        if fault == "lost answer":
            answer = partial(call.fail, Unanswered("the teacher cannot be reached"))
        elif world.has(inputs, world.refused):
            answer = partial(call.fail, Unanswered("IndexError: no such token", is_deadly=False))
        else:
            answer = partial(call.answer, answered(inputs, busy_s))
        scheduler.start(self._network, "the network", answer, world.latency(fault))

    def _befall(self) -> str:
        """Return the fault that this group meets; carry it out if it is one of the process."""
        fault = self._world.fault("death", "stall", "hang", "lost answer", "late answer")
        if fault and self._is_leased(self.number):
            tokens = {token for inputs, _ in self._inbox for token in inputs.input_ids[:, 0].tolist()}
            self._world.unlucky |= tokens
            self._world.has_blanked |= min(tokens) < FIRST_TOKEN
        if fault == "death":
            self.die("dies")
        elif fault == "hang":
            self._scheduler.block()  # and if it is asked for its health, it has worked for ever longer
        elif fault == "stall":
            self.process.stalled_until = self._scheduler.now + self._scheduler.random.choice(STALLS_S)
        return fault


class SimulatedPool(TeacherPool):
    """The real pool, whose teachers are simulated."""

    def __init__(self, world: World, spec: TeacherPoolSpec) -> None:
        self.world = world
        self.placed: list[SimulatedTeacher] = []
        super().__init__(SPEC, NEEDS, spec, 0.0)

    def _place(self, number: int) -> Teacher:
        self.placed.append(SimulatedTeacher(number, self.world, self.is_leased_now))
        return self.placed[-1]

    def _show(self) -> None: ...

    def is_leased_now(self, number: int) -> bool:
        return self._lease is not None and self._lease.starting.teacher.number == number

    def check(self) -> None:
        """Raise Violation unless the pool's numbers hold."""
        leased = {self._lease.starting.teacher.number} if self._lease else set()
        places = [*self._members, *self._pending, *self._leaving, *leased]
        if len(set(places)) < len(places):
            raise Violation(f"a teacher is in two places of the pool: {sorted(places)}")
        if len(self._members) > self._max:
            raise Violation(f"the pool has {len(self._members)} members, and cluster.teacher.max is {self._max}")
        if self.restarts > self.world.deaths:
            raise Violation(f"{self.restarts} teachers were replaced, but only {self.world.deaths} have died")
        if self._deaths > self._max_deaths:
            raise Violation(f"{self._deaths} deaths in a row, and at most {self._max_deaths} are allowed")


class PoolActor:
    """The pool in a process of its own, and the handle of it: a `ports.Pool`."""

    def __init__(self, world: World, spec: TeacherPoolSpec) -> None:
        self._world, self._scheduler, self._spec = world, world.scheduler, spec
        self.process = world.scheduler.process("pool", "")
        self.pool: Any = None
        self._inbox: list[tuple[Callable[[], Any], Call]] = []
        self._calls: list[Call] = []
        self._has_work = Event(world.scheduler)
        world.scheduler.start(self.process, "pool", self._serve)

    def wait_until_ready(self, timeout_s: float) -> TeacherFacts:
        return self._call("wait_until_ready", timeout_s)

    def roster(self, version: int) -> Roster:
        return self._call("roster", version)

    def lost(self, number: int, reason: str) -> bool:
        return self._call("lost", number, reason)

    def lease(self, holder: str) -> Teacher | None:
        return self._call("lease", holder)

    def end_lease(self, holder: str, *, is_alive: bool) -> None:
        self._call("end_lease", holder, is_alive=is_alive)

    def heartbeat(self, client: str, waiting: float, answers: int, version: int) -> Roster:
        return self._call("heartbeat", client, waiting, answers, version)

    def end(self) -> None:
        """End the pool, and with it the teachers that it has started."""
        for call in self._calls:
            call.fail(RayActorError())
        for teacher in self.pool.placed if self.pool else ():
            if not teacher.is_ended:
                teacher.die("ends with its pool")
        if not self.process.is_dead:
            self._scheduler.kill(self.process)

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        if self.process.is_dead:
            raise RayActorError
        call = Call(self._scheduler)
        self._calls.append(call)

        def arrive() -> None:
            self._inbox.append((lambda: getattr(self.pool, method)(*args, **options), call))
            self._has_work.set()

        self._scheduler.start(self.process, f"pool's {method}", arrive, self._world.latency())
        return call.result()

    def _serve(self) -> None:
        self.pool = SimulatedPool(self._world, self._spec)
        while True:
            while not self._inbox:
                self._has_work.clear()
                self._has_work.wait()
            run, call = self._inbox.pop(0)
            fault = self._world.fault("pool's answer lost", "pool's answer late", "death of the pool")
            if fault == "death of the pool":
                self.end()
            try:
                answer = partial(call.answer, run())
            except BetaKDError as error:
                answer = partial(call.fail, error)
            self.pool.check()
            if "lost" in fault:
                answer = partial(call.fail, RayActorError())
            self._calls.remove(call)
            network = self._scheduler.process("the network", "")
            self._scheduler.start(network, "the network", answer, self._world.latency(fault))


def numbered(token: int, number: int, length: int) -> Rendering:
    """Return a sample of text: its token, and in the answer its number, both of which the answer of a teacher names."""
    is_answer = np.arange(length) >= length // 2
    return Rendering(np.where(is_answer, number, token).astype(np.int32), is_answer)
