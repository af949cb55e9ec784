"""The monitor: one small actor that survives restarts of the students, and knows progress, quarantine and failures."""

import logging
import os
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.actor import ActorHandle

from betakd_ray.data.plan import Quarantined
from betakd_ray.errors import BetaKDError, TrainingError, WorkersReplaced, kind
from betakd_ray.on_ray.watch import Orders, Roll, Start

MAX_RECORDS = 1000
"""Largest number of records that wait for the driver."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """The monitor's answer to the driver."""

    latest: dict[str, Any]
    """Newest metrics, or {}."""
    warnings: tuple[str, ...] = ()
    """What the user is to know, and the driver has not been told yet."""
    controller: ActorHandle | None = None
    """Ray Train's controller, once it has started."""
    has_begun: bool = False
    """True if workers have begun, so that they hear a request to stop and save."""
    records: tuple[dict[str, Any], ...] = ()
    """Metrics that came since the last report, the newest `MAX_RECORDS` of them."""
    committed: int | None = None
    """Step of a checkpoint that was committed since the last report; None if there is none."""


class Monitor:
    """State of the job. Readers report bad samples, ranks send heartbeats, rank 0 sends metrics, the driver reads them.

    It holds no training data.
    """

    def __init__(self, planned_samples: int, quarantined: list[Quarantined], max_failures: int) -> None:
        self._planned = planned_samples
        self._max_failures = max_failures
        self._failures = 0
        self._quarantined: dict[tuple[int, int, int], Quarantined] = {}
        self.quarantine(quarantined)
        self._latest: dict[str, Any] = {}
        self._records: deque[dict[str, Any]] = deque(maxlen=MAX_RECORDS)
        self._committed: int | None = None
        self._failure: tuple[str, str] | None = None
        self._is_stopping = False
        self._warnings: list[str] = []
        self._controller: ActorHandle | None = None
        self._roll = Roll()
        self._actors: dict[int, ActorHandle] = {}
        self._start = Start()

    def resuming_from(self, checkpoint: str | None) -> None:
        """Note the checkpoint that a new start of the workers resumes from: the one that its rows were made for."""
        self._start = Start(checkpoint, os.urandom(4).hex())
        self._roll.begin(self._start.attempt)
        self._actors = {}

    def starts_from(self) -> Start:
        """Return the checkpoint and the attempt of the newest start of the workers."""
        return self._start

    def begins(self, attempt: str, rank: int, ranks: int, actor: ActorHandle) -> None:
        """Note that a rank of a start, which has `ranks` of them, runs in `actor`."""
        self._roll.expect(attempt, ranks, time.monotonic())
        # A late call from an earlier start must not take the place of the actor that would have to be killed.
        if attempt == self._roll.attempt:
            self._actors[rank] = actor

    def left(self, attempt: str, rank: int) -> None:
        """Note that a rank has ended, and so sends no more heartbeats."""
        self._roll.left(attempt, rank)

    def beat(self, attempt: str, rank: int, activity: str, limit_s: float) -> Orders:
        """Note a heartbeat of a student worker; return the requests to the job.

        A rank without a heartbeat for more than `limit_s` seconds is taken for dead.
        """
        now = time.monotonic()
        self._roll.heard(attempt, rank, activity, limit_s, now)
        return Orders(self._is_stopping, len(self._quarantined), self._roll.silent(limit_s, now))

    def quarantine(self, records: list[Quarantined]) -> float:
        """Note bad samples, each once even if its shard is read twice; return the share of the plan that is bad."""
        self._quarantined.update({(record.epoch, record.shard, record.index): record for record in records})
        return len(self._quarantined) / self._planned

    def quarantined(self) -> list[Quarantined]:
        """Return every bad sample so far, sorted by (epoch, shard, index)."""
        return [self._quarantined[place] for place in sorted(self._quarantined)]

    def controlled_by(self, controller: ActorHandle) -> None:
        """Note Ray Train's controller, which the driver ends if the job is to stop before workers have begun."""
        self._controller = controller

    def warn(self, text: str) -> None:
        """Keep a text for the user until the driver asks; the logs of other processes reach no terminal."""
        self._warnings.append(text)

    def log(self, record: dict[str, Any]) -> None:
        """Keep the newest metrics."""
        self._latest = record
        self._records.append(record)

    def fail(self, kind: str, message: str) -> None:
        """Note an error that a restart cannot repair. Only the first one is kept."""
        self._failure = self._failure or (kind, message)

    def failure(self) -> tuple[str, str] | None:
        """Return (class name in `errors`, message) of that error; None if there is none."""
        return self._failure

    def committed(self, step: int | None = None) -> None:
        """Note a new checkpoint: reset the number of failures, because the job has made progress."""
        self._failures = 0
        self._committed = step

    def workers_died(self, reason: str) -> None:
        """Count a failure of the workers; fail the job after more than `max_failures` without a new checkpoint.

        Called once per restart. Failures are counted since the last checkpoint, because preemptible nodes may fail
        every hour for days. That is acceptable as long as the job makes progress.
        """
        self._failures += 1
        if self._failures > self._max_failures:
            self.fail(
                TrainingError.__name__,
                f"the student workers died {self._failures} times with no new checkpoint in between (the limit is "
                f"training.max_failures; training.checkpoint_every may be too large). The last time: {reason}",
            )

    def stop(self) -> None:
        """Ask the workers to save and return."""
        self._is_stopping = True

    def poll(self, limit_s: float) -> Report:
        """Return what the driver shows; kill a rank that the others should have noticed to be silent for `limit_s`.

        The driver calls this all the time. After the kill Ray Train starts all ranks again.
        """
        rank = self._roll.missed(limit_s, time.monotonic())
        if rank is not None and rank in self._actors:
            _LOG.error(
                "rank %d has sent nothing for more than training.collective_timeout_s = %g s; it is killed",
                rank,
                limit_s,
            )
            # Removed, so that it is killed once: the roll names it until the next start.
            ray.kill(self._actors.pop(rank))
        warnings, self._warnings = tuple(self._warnings), []
        records, committed = tuple(self._records), self._committed
        self._records.clear()
        self._committed = None
        return Report(self._latest, warnings, self._controller, bool(self._actors), records, committed)


def report(monitor: ActorHandle, records: list[Quarantined]) -> float:
    """Report bad samples; return the share of the plan that is bad so far."""
    return cast(float, ray.get(monitor.quarantine.remote(records)))


def require_current(monitor: ActorHandle, start: Start, run: str) -> None:
    """Raise WorkersReplaced if other workers than those of `start` have been started."""
    newest = cast(Start, ray.get(monitor.starts_from.remote()))
    if newest != start:
        raise WorkersReplaced(
            f"{run}: the workers of start {start.attempt} were taken for dead, and those of {newest.attempt} have been "
            "started. The former end, and write nothing more."
        )


def give_up(monitor: ActorHandle, error: BetaKDError) -> None:
    """Report an error that a restart cannot repair. The workers of Ray Train's next restart see it and end at once."""
    ray.get(monitor.fail.remote(kind(error), str(error)))
