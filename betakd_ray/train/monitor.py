"""The one small actor that outlives student restarts and knows how the job stands: progress, quarantine, fate."""

import os
import time
from typing import Any, cast

import ray
from ray.actor import ActorHandle

from betakd_ray.data.plan import Quarantined
from betakd_ray.errors import BetaKDError, TrainingError, kind
from betakd_ray.train.watch import Orders, Roll, Start


class Monitor:
    """Readers report bad samples here, rank 0 its metrics; the driver looks on. Holds no data."""

    def __init__(self, planned_samples: int, quarantined: list[Quarantined], max_failures: int) -> None:
        self._planned = planned_samples
        self._max_failures = max_failures
        self._failures = 0
        self._quarantined: dict[tuple[int, int, int], Quarantined] = {}
        self.quarantine(quarantined)
        self._latest: dict[str, Any] = {}
        self._failure: tuple[str, str] | None = None
        self._is_stopping = False
        self._roll = Roll()
        self._start = Start()

    def resuming_from(self, checkpoint: str | None) -> None:
        """Note which checkpoint a new start of the workers goes on from: the one that its rows are the rest of."""
        self._start = Start(checkpoint, os.urandom(4).hex())
        self._roll.begin(self._start.attempt)

    def starts_from(self) -> Start:
        """Return what the newest start of the workers goes by."""
        return self._start

    def beat(self, attempt: str, rank: int, activity: str, limit_s: float) -> Orders:
        """Note that a student worker is well; return what is asked of the job."""
        now = time.monotonic()
        self._roll.heard(attempt, rank, activity, limit_s, now)
        return Orders(self._is_stopping, len(self._quarantined), self._roll.silent(limit_s, now))

    def quarantine(self, records: list[Quarantined]) -> float:
        """Note bad samples (a shard read twice counts once); returns their share of the plan."""
        self._quarantined.update({(record.epoch, record.shard, record.index): record for record in records})
        return len(self._quarantined) / self._planned

    def quarantined(self) -> list[Quarantined]:
        """Every bad sample so far, in plan order of (epoch, shard, index)."""
        return [self._quarantined[place] for place in sorted(self._quarantined)]

    def log(self, record: dict[str, Any]) -> None:
        """The newest metrics."""
        self._latest = record

    def fail(self, kind: str, message: str) -> None:
        """An error that no restart will mend; the first one stands."""
        self._failure = self._failure or (kind, message)

    def failure(self) -> tuple[str, str] | None:
        """(class name in `errors`, message) of such an error."""
        return self._failure

    def committed(self) -> None:
        """A new checkpoint is there: whatever dies now, something was gained."""
        self._failures = 0

    def workers_died(self, reason: str) -> None:
        """Count a restart of the workers, and give up after too many without a new checkpoint in between.

        Preemptible nodes may cause one every hour, for days, which is well as long as the job gets on.
        """
        self._failures += 1
        if self._failures > self._max_failures:
            self.fail(
                TrainingError.__name__,
                f"the student workers died {self._failures} times with no new checkpoint in between (the limit is "
                f"training.max_failures; training.checkpoint_every may be too rare). The last time: {reason}",
            )

    def stop(self) -> None:
        """The driver was asked to end: the workers shall save and return."""
        self._is_stopping = True

    def latest(self) -> dict[str, Any]:
        """The newest metrics, or {}."""
        return self._latest


def report(monitor: ActorHandle, records: list[Quarantined]) -> float:
    """Bad samples; returns their share of the plan so far."""
    return cast(float, ray.get(monitor.quarantine.remote(records)))


def give_up(monitor: ActorHandle, error: BetaKDError) -> None:
    """An error that no restart will mend: the one that Ray Train makes finds it, and ends at once."""
    ray.get(monitor.fail.remote(kind(error), str(error)))
