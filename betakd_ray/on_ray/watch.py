"""Heartbeats of the ranks. A dead rank is found by its missing heartbeats, not by the timeout of a collective.

A rank that waits for a teacher, for data or for another rank counts as alive while it sends heartbeats. A rank that
sends none for `training.collective_timeout_s` seconds is taken for dead. Its last activity is reported with it. The
other ranks notice and end. A rank that is alone, or hangs together with all others, is noticed by the driver.
"""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import ray
import ray.train
from ray.actor import ActorHandle

BEAT_S = 2.0
"""Seconds between two heartbeats of a rank. The answer to each one has the requests to the job."""
SILENT_RANK = 76
"""Exit code of a process that ends because another rank sends no heartbeats. Ray Train then restarts all of them."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Parameters of one start of the student workers."""

    checkpoint: str | None = None
    """Name of the checkpoint that the stream of rows was made for; None if there was no checkpoint."""
    attempt: str = ""
    """Unique name of the start. It is part of file names, so that two starts never write the same file."""


@dataclass(frozen=True)
class Orders:
    """The monitor's answer to a rank's heartbeat."""

    is_stopping: bool = False
    """True if the driver was asked to stop the job."""
    quarantined: int = 0
    """Number of samples in quarantine so far, from all readers and ranks."""
    silent: str = ""
    """Text that names the rank that is taken for dead, and its last activity; empty if there is none."""


@dataclass
class Roll:
    """Last heartbeat of each rank of the current workers; kept by the monitor."""

    attempt: str = ""
    _heard: dict[int, tuple[float, str]] = field(default_factory=dict)
    _listened: float = 0.0
    _polled: float = 0.0

    def begin(self, attempt: str) -> None:
        """Forget the ranks of an earlier start."""
        self.attempt, self._heard = attempt, {}

    def expect(self, attempt: str, ranks: int, now: float) -> None:
        """Expect heartbeats of all `ranks` from now on: the first of them begins, and the others must too.

        A rank that hangs before its first heartbeat is found like any other.
        """
        if attempt == self.attempt:
            # Every rank calls this. What was heard of the others stays, so that no call gives a silent rank more time.
            self._heard = {rank: (now, "starting") for rank in range(ranks)} | self._heard

    def heard(self, attempt: str, rank: int, activity: str, limit_s: float, now: float) -> None:
        """Note a heartbeat of a rank, and its activity. `now` is in seconds of a monotonic clock.

        If no heartbeat of any rank came for more than half of `limit_s` seconds, the monitor itself was blocked. Then
        all ranks start a new interval, so that no rank is taken for dead because of the monitor.
        """
        if now - self._listened > limit_s / 2:
            self._begin_new_interval(now)
        self._listened = now
        if attempt == self.attempt:
            self._heard[rank] = (now, activity)

    def left(self, attempt: str, rank: int) -> None:
        """Forget a rank that has ended, and so sends no more heartbeats."""
        if attempt == self.attempt:
            self._heard.pop(rank, None)

    def silent(self, limit_s: float, now: float) -> str:
        """Return a text about the first rank without a heartbeat for more than `limit_s` seconds; empty if none."""
        rank = self._first_silent(limit_s, now)
        if rank is None:
            return ""
        when, activity = self._heard[rank]
        doing = f" Its last activity: {activity}." if activity else ""
        return f"rank {rank} has sent nothing for {now - when:.0f} s.{doing}"

    def missed(self, limit_s: float, now: float) -> int | None:
        """Return the rank that is silent for longer than the others need to notice it; None if there is none.

        The driver asks this all the time. It finds a rank that is alone, or whose neighbours hang as well. If the
        driver has not asked for a while, driver or monitor stood still, and heartbeats may wait in the queue: then all
        ranks start a new interval.
        """
        if now - self._polled > limit_s / 2:
            self._begin_new_interval(now)
        self._polled = now
        # Later than the other ranks, which learn it from their next heartbeats and name the silent rank in their logs.
        return self._first_silent(limit_s + 3 * BEAT_S, now)

    def _begin_new_interval(self, now: float) -> None:
        self._heard = {rank: (now, doing) for rank, (_, doing) in self._heard.items()}

    def _first_silent(self, limit_s: float, now: float) -> int | None:
        return next((rank for rank, (when, _) in sorted(self._heard.items()) if now - when > limit_s), None)


class Watch:
    """One rank's heartbeats, sent by a thread of its own, and the requests that come back. It is the feed's `Control`.

    If another rank is taken for dead, the thread ends this process. No exception could: the other threads may wait for
    the dead rank inside a collective.
    """

    def __init__(
        self, monitor: ActorHandle, rank: int, ranks: int, attempt: str, limit_s: float, activity: Callable[[], str]
    ) -> None:
        self._monitor, self._rank, self._attempt = monitor, rank, attempt
        self._limit_s, self._activity = limit_s, activity
        self._orders = Orders()
        self._error: BaseException | None = None
        self._leaving: list[str] = []
        # Counted, not flagged: only this class's thread changes the first, only the caller the second, so that none is
        # lost between a read and a reset.
        self._notices = self._noticed = 0
        self._ended = threading.Event()
        monitor.begins.remote(attempt, rank, ranks, ray.get_runtime_context().current_actor)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @property
    def is_stopping(self) -> bool:
        """Return whether the job was asked to stop. Raises RayActorError if the monitor died."""
        if self._error:
            raise self._error
        return self._orders.is_stopping

    @property
    def quarantined(self) -> int:
        """Return the number of samples in quarantine, over all readers and ranks."""
        return self._orders.quarantined

    def wants_checkpoint(self) -> bool:
        """Return whether a node of the workers got a new preemption notice since the last call."""
        before, self._noticed = self._noticed, self._notices
        return self._noticed > before

    def close(self) -> None:
        """Send no more heartbeats."""
        self._ended.set()
        self._thread.join(timeout=5)
        # Sent after the thread has ended. A heartbeat that comes later would put the rank back on the roll, as silent.
        self._monitor.left.remote(self._attempt, self._rank)

    def _run(self) -> None:
        try:
            self._beat()
        except BaseException as error:  # raised again by `is_stopping`, in the thread that asks
            self._error = error

    def _beat(self) -> None:
        interval = min(BEAT_S, self._limit_s / 4)
        while not self._ended.wait(interval):
            beat = self._monitor.beat.remote(self._attempt, self._rank, self._activity(), self._limit_s)
            # Without a timeout: a monitor that is slow delays this thread only, and a dead one raises.
            self._orders = cast(Orders, ray.get(beat))
            self._look_for_preemption()
            if self._orders.silent:
                _LOG.error(
                    "%s The limit is training.collective_timeout_s = %g. Its process hangs, or its node is cut off. "
                    "This rank ends, so that all ranks start again from the last checkpoint.",
                    self._orders.silent, self._limit_s,
                )  # fmt: skip
                # Not sys.exit: it ends only this thread, and the others may be blocked in a collective.
                os._exit(SILENT_RANK)

    def _look_for_preemption(self) -> None:
        preemption = ray.train.get_preemption_info()
        leaving = list(preemption.preempted_node_ids) if preemption else []
        if leaving and leaving != self._leaving:
            self._notices += 1
        self._leaving = leaving
