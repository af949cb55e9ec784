"""Ranks that are gone are noticed by what each says every few seconds, never by a collective that runs out of time.

A rank that waits for a teacher, for data or for another rank is well for as long as it says so. One that says nothing
for `training.collective_timeout_s` is taken for dead, with what it last did as the cause.
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
"""How often a rank says that it is well, and hears what is asked of the job."""
SILENT_RANK = 76
"""Exit code of a process that ends because another rank fell silent: Ray Train then starts all of them anew."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What one start of the student workers goes by."""

    checkpoint: str | None = None
    """Name of the checkpoint that the stream of rows was made for; None at the beginning."""
    attempt: str = ""
    """A name of its own for each start, so that what it writes never meets the remains of another."""


@dataclass(frozen=True)
class Orders:
    """What the monitor answers to a rank's beat."""

    is_stopping: bool = False
    """The driver was asked to end."""
    quarantined: int = 0
    """Samples that are set aside so far, by all readers and ranks."""
    silent: str = ""
    """Which rank is taken for dead, and what it last did; empty if none is."""


@dataclass
class Roll:
    """When each rank of the present workers last said that it is well; kept by the monitor."""

    attempt: str = ""
    _heard: dict[int, tuple[float, str]] = field(default_factory=dict)
    _listened: float = 0.0

    def begin(self, attempt: str) -> None:
        """Forget the ranks of an earlier start."""
        self.attempt, self._heard = attempt, {}

    def heard(self, attempt: str, rank: int, activity: str, limit_s: float, now: float) -> None:
        """Note that a rank is well at `now`, in seconds of a monotonic clock, and what it does.

        Where nothing at all was heard for long, it was the monitor that stood still: no rank is to blame for that.
        """
        if now - self._listened > limit_s / 2:
            self._heard = {each: (now, doing) for each, (_, doing) in self._heard.items()}
        self._listened = now
        if attempt == self.attempt:
            self._heard[rank] = (now, activity)

    def silent(self, limit_s: float, now: float) -> str:
        """Return which rank said nothing for longer than `limit_s`, in words; empty if none."""
        for rank, (when, activity) in sorted(self._heard.items()):
            if now - when > limit_s:
                doing = f" It last was at: {activity}." if activity else ""
                return f"rank {rank} has said nothing for {now - when:.0f} s.{doing}"
        return ""


class Watch:
    """One rank's side, in a thread of its own: says that the rank is well and hears what is asked of it.

    It is the feed's `Control`. Where another rank is silent for too long, it ends this process: nothing else could, as
    its threads may wait for that rank in code of others.
    """

    def __init__(
        self, monitor: ActorHandle, rank: int, attempt: str, limit_s: float, activity: Callable[[], str]
    ) -> None:
        self._monitor, self._rank, self._attempt = monitor, rank, attempt
        self._limit_s, self._activity = limit_s, activity
        self._orders = Orders()
        self._error: BaseException | None = None
        self._leaving: list[str] = []
        self._wants_checkpoint = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @property
    def is_stopping(self) -> bool:
        """Return whether the job was asked to stop. Raises RayActorError where the monitor died."""
        if self._error:
            raise self._error
        return self._orders.is_stopping

    @property
    def quarantined(self) -> int:
        """Return how many samples are set aside in all."""
        return self._orders.quarantined

    def wants_checkpoint(self) -> bool:
        """Return whether a node of the workers was newly told to go."""
        wants, self._wants_checkpoint = self._wants_checkpoint, False
        return wants

    def close(self) -> None:
        """Say nothing more."""
        self._ended.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            self._beat()
        except BaseException as error:  # raised again where it is asked for orders
            self._error = error

    def _beat(self) -> None:
        interval = min(BEAT_S, self._limit_s / 4)
        while not self._ended.wait(interval):
            beat = self._monitor.beat.remote(self._attempt, self._rank, self._activity(), self._limit_s)
            self._orders = cast(Orders, ray.get(beat))
            self._look_for_preemption()
            if self._orders.silent:
                _LOG.error(
                    "%s The limit is training.collective_timeout_s = %g. Its process hangs, or its node is cut off; "
                    "this rank ends, so that all start again from the last checkpoint.",
                    self._orders.silent, self._limit_s,
                )  # fmt: skip
                os._exit(SILENT_RANK)

    def _look_for_preemption(self) -> None:
        preemption = ray.train.get_preemption_info()
        leaving = list(preemption.preempted_node_ids) if preemption else []
        if leaving and leaving != self._leaving:
            self._wants_checkpoint = True
        self._leaving = leaving
