"""What the code under test finds instead of Ray, torch.distributed, threads and the clock."""

import threading
from collections.abc import Callable
from math import inf
from types import SimpleNamespace
from typing import Any

import ray

from tests.actors import Local
from tests.simulation.scheduler import Scheduler, Thread, Violation

REFERENCE = ray.ObjectRef.from_random()
"""Reference to the data's reader, which no code of the simulation resolves."""


class Clock:
    """The module `time`, for the thread that runs."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.monotonic = self.time = self.perf_counter = scheduler.clock
        self.sleep = scheduler.pause


class Event(threading.Event):
    """A threading.Event between simulated threads."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.is_made = False
        self.waiting: list[Thread] = []

    def set(self) -> None:
        self.is_made = True
        for thread in self.waiting:
            self.scheduler.wake(thread)
        self.waiting.clear()

    def wait(self, timeout: float | None = None) -> bool:
        if not self.is_made:
            thread = self.scheduler.thread
            self.waiting.append(thread)
            self.scheduler.block(inf if timeout is None else timeout)
            if thread in self.waiting:  # the time is over
                self.waiting.remove(thread)
        return self.is_made

    def is_set(self) -> bool:
        return self.is_made

    def clear(self) -> None:
        self.is_made = False


class Lock:
    """A threading.Lock between the simulated threads of a process."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._is_held = False
        self._waiting: list[Thread] = []

    def __enter__(self) -> "Lock":
        while self._is_held:
            self._waiting.append(self._scheduler.thread)
            self._scheduler.block()
        self._is_held = True
        return self

    def __exit__(self, *_: Any) -> None:
        self._is_held = False
        if self._waiting:
            self._scheduler.wake(self._waiting.pop(0))


class Spawned:
    """A threading.Thread of the process that starts it."""

    def __init__(self, scheduler: Scheduler, target: Callable[..., Any], args: tuple[Any, ...], name: str) -> None:
        self._scheduler, self._run, self._name = scheduler, lambda: target(*args), name
        self._ended = Event(scheduler)

    def start(self) -> None:
        process = self._scheduler.thread.process

        def run() -> None:
            self._run()
            self._ended.set()

        self._scheduler.start(process, f"{process.name}'s {self._name}", run)

    def join(self, timeout: float | None = None) -> None:
        self._ended.wait(timeout)


def threading_of(scheduler: Scheduler) -> SimpleNamespace:
    """Return the module `threading`, as far as the code under test uses it."""

    def thread(target: Any, name: str, daemon: bool, args: Any = ()) -> Spawned:
        return Spawned(scheduler, target, args, name)

    return SimpleNamespace(Event=lambda: Event(scheduler), Lock=lambda: Lock(scheduler), Thread=thread)


class Background:
    """The future result of a call in a thread of its own, of the process that makes the call."""

    def __init__(self, scheduler: Scheduler, call: Callable[[], Any], name: str) -> None:
        self._call = call
        self._ended = Event(scheduler)
        self._value: Any = None
        self._error: Exception | None = None
        Spawned(scheduler, self._run, (), name).start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except Exception as error:
            self._error = error
        self._ended.set()

    def done(self) -> bool:
        return self._ended.is_made

    def result(self) -> Any:
        self._ended.wait()
        if self._error:
            raise self._error
        return self._value


class OneAtATime:
    """A pool of threads that has one, which is the caller."""

    def __init__(self, threads: int) -> None:
        pass

    def __enter__(self) -> "OneAtATime":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def map(self, work: Callable[[Any], Any], items: Any) -> list[Any]:
        return [work(item) for item in items]


class Group:
    """A process group over the ranks of one start: a collective ends when every rank has called it."""

    def __init__(self, scheduler: Scheduler, ranks: int) -> None:
        self.ranks = ranks
        self.attempt: Any = None
        """The start to which the ranks belong."""
        self._scheduler = scheduler
        self._values: dict[int, Any] = {}
        self._waiting: list[Thread] = []

    def exchange(self, value: Any) -> list[Any]:
        """Return every rank's value. If a rank is dead, this never returns."""
        thread = self._scheduler.thread
        if thread.process.rank in self._values:
            raise Violation(
                f"{thread.name} calls a collective of a group while its rank waits in another of that group"
            )
        values = self._values
        values[thread.process.rank] = value
        if len(values) < self.ranks:
            self._waiting.append(thread)
            self._scheduler.block()
        else:
            waiting, self._waiting, self._values = self._waiting, [], {}
            for each in waiting:
                self._scheduler.wake(each)
        return [values[rank] for rank in range(self.ranks)]


class Distributed:
    """The module torch.distributed, for the rank that runs."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def _group(self, group: Group | None = None) -> Group:
        return group or self._scheduler.thread.process.group

    def get_rank(self) -> int:
        return self._scheduler.thread.process.rank

    def get_world_size(self) -> int:
        return self._group().ranks

    def barrier(self, group: Any = None) -> None:
        self._group(group).exchange(None)

    def all_gather_object(self, everyone: list[Any], value: Any, group: Any = None) -> None:
        everyone[:] = self._group(group).exchange(value)

    def gather_object(self, value: Any, everyone: list[Any] | None, dst: int, group: Any = None) -> None:
        values = self._group(group).exchange(value)
        if everyone is not None:
            everyone[:] = values

    def broadcast_object_list(self, values: list[Any], src: int, group: Any = None) -> None:
        values[:] = self._group(group).exchange(list(values))[src]


class Remote:
    """What `ray.remote` returns: its actors are objects of this process."""

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def options(self, **_: Any) -> "Remote":
        return self

    def remote(self, *args: Any) -> Local:
        return Local(self._kind(*args))


RAY = SimpleNamespace(
    remote=Remote,
    get=lambda value: value,
    put=lambda value: REFERENCE,
    kill=lambda actor: None,
    ObjectRef=ray.ObjectRef,
)
"""The module ray, as far as the code under test uses it."""
