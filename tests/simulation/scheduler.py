"""A scheduler that runs processes of a simulated cluster one at a time, in an order and with faults that a seed gives.

Each thread of a process is a greenlet. Where it would wait (for the store, a clock or another thread) it comes back to
the scheduler, which moves the time to the next wake-up of any greenlet. So no real time passes, nothing runs at the
same time, and a seed always gives the same run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from random import Random
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

STALL_S = 3600.0
"""Seconds for which a stalled process does nothing."""
MAX_SWITCHES = 40_000
"""Number of turns after which a schedule counts as one that never ends. The longest have a few thousand."""


class Violation(BaseException):
    """An invariant does not hold. Not an Exception, so that no code under test can catch it."""


@dataclass(eq=False)
class Process:
    """A process on a machine: it may be killed, or stand still with all its threads."""

    name: str
    machine: str
    number: int
    rank: int = 0
    group: Any = None
    """The ranks with which it has collectives; None for a driver."""
    token: int = 0
    """Token of the driver that started this rank."""
    monitor: Any = None
    """The monitor of that driver."""
    start: Any = None
    """The start of the workers to which this rank belongs."""
    job: Any = None
    """The job, if this is a driver."""
    is_dead: bool = False
    has_finished: bool = False
    stalled_until: float = 0.0

    @property
    def token_held(self) -> int:
        """Return the token of the driver, or of the driver that started this rank."""
        return self.job._permit.token if self.job else self.token


@dataclass(eq=False)
class Thread:
    """A thread of a process."""

    name: str
    process: Process
    greenlet: Any = None
    wake: float = inf
    """Time at which it goes on; infinite while it waits for another thread."""
    is_done: bool = False
    is_told: bool = False
    """Whether it found that its driver or its start was replaced when it last looked at the leases."""


@dataclass
class Faults:
    """How many faults a schedule has, and how likely each operation is to have one."""

    left: int = 0
    rate: float = 0.0
    kinds: tuple[str, ...] = ()


@dataclass
class Scheduler:
    """The time, the processes and the faults of one schedule."""

    seed: int
    now: float = 0.0
    trace: list[str] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)
    processes: list[Process] = field(default_factory=list)
    clocks: dict[str, float] = field(default_factory=dict)
    """Machine → seconds by which its clock is ahead."""
    switches: int = 0

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.is_over = False
        self.threads: list[Thread] = []
        self._queue: list[tuple[float, int, Thread]] = []
        self._pushed = 0
        self._current: Thread | None = None
        self._hub = getcurrent()

    # ------------------------------------------------------------------------------------- for the simulated code

    @property
    def thread(self) -> Thread:
        """Return the thread that runs."""
        assert self._current is not None, "only a simulated thread may wait"
        return self._current

    @property
    def is_in_thread(self) -> bool:
        """Return whether a simulated thread runs, and not the scheduler or a check."""
        return self._current is not None

    @contextmanager
    def standing_still(self) -> Iterator[Thread | None]:
        """Let no time pass and no other thread run in the block, whatever it calls; yield the thread that runs."""
        thread, self._current = self._current, None
        try:
            yield thread
        finally:
            self._current = thread

    def clock(self) -> float:
        """Return the seconds of the clock of the machine on which this runs."""
        ahead = self.clocks.get(self._current.process.machine, 0.0) if self._current else 0.0
        return self.now + ahead

    def pause(self, seconds: float) -> None:
        """Let other threads run for some seconds."""
        self._wake_at(self.thread, self.now + seconds)
        self._switch()

    def block(self, timeout_s: float = inf) -> None:
        """Let other threads run until `wake` is called for this one, or for `timeout_s` seconds."""
        if timeout_s == inf:
            self.thread.wake = inf
        else:
            self._wake_at(self.thread, self.now + timeout_s)
        self._switch()

    def wake(self, thread: Thread) -> None:
        """Let a thread that waits go on now."""
        if not thread.is_done and not thread.process.is_dead:
            self._wake_at(thread, self.now)

    def note(self, text: str) -> None:
        """Add a line to the trace."""
        who = self._current.name if self._current else "-"
        self.trace.append(f"{self.now:10.3f} {who}: {text}")

    # ---------------------------------------------------------------------------------------------- processes

    def process(self, name: str, machine: str, rank: int = 0, group: Any = None) -> Process:
        """Make a process."""
        made = Process(name, machine, len(self.processes), rank, group)
        self.processes.append(made)
        return made

    def start(self, process: Process, name: str, run: Callable[[], Any], delay_s: float = 0.0) -> Thread:
        """Start a thread of a process."""
        thread = Thread(name, process)

        def whole() -> None:
            try:
                run()
            finally:
                thread.is_done = True

        thread.greenlet = greenlet(whole, self._hub)
        self.threads.append(thread)
        self._wake_at(thread, self.now + delay_s)
        return thread

    def kill(self, process: Process) -> None:
        """End a process: none of its threads runs again. If it is the caller's, this does not return."""
        self.note(f"{process.name} is killed")
        process.is_dead = True
        if self._current and self._current.process is process:
            self._switch()

    # ---------------------------------------------------------------------------------------------- the run

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Run all threads until none has anything to do, or `until` returns true."""
        while self._queue and not until():
            time, _, thread = heappop(self._queue)
            if thread.is_done or thread.process.is_dead or thread.wake != time:
                continue
            if thread.process.stalled_until > time:
                self._wake_at(thread, thread.process.stalled_until)
                continue
            self.switches += 1
            if self.switches > MAX_SWITCHES:
                raise Violation(f"the schedule has not ended after {MAX_SWITCHES} turns, at {self.now:.0f} s")
            self.now, thread.wake, self._current = max(self.now, time), inf, thread
            try:
                thread.greenlet.switch()
            finally:
                self._current = None

    def close(self) -> None:
        """Unwind every thread that has not ended, without any effect on the store."""
        self.is_over = True
        for thread in self.threads:
            while thread.greenlet and not thread.greenlet.dead:
                self._current = thread
                thread.greenlet.throw(GreenletExit)
        self._current = None
        self.threads.clear()

    def _wake_at(self, thread: Thread, time: float) -> None:
        thread.wake = time
        # Threads that wake at the same time run in an order that the seed gives.
        self._pushed += 1
        heappush(self._queue, (time, self.random.getrandbits(32) << 24 | self._pushed, thread))

    def _switch(self) -> None:
        if self.is_over:
            raise GreenletExit
        self._hub.switch()
        if self.is_over:
            raise GreenletExit
