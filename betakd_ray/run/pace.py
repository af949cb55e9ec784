"""What a run's newest metrics say in one line, and how long it will take. Its numbers are those of `run.metrics`."""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

SHOWN_BETAS = 4
"""Largest number of channels whose β is shown in a line."""
WINDOW = 20
"""Number of newest records by which the pace is measured."""


class Pace:
    """Seconds per step of a run, over its newest records. Their times are of one process: that of rank 0."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._points: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        for record in records:
            self.note(record)

    def note(self, record: Mapping[str, Any]) -> None:
        """Add a record. One of a step that was done before begins the measurement again."""
        if "time" not in record:
            return
        if self._points and record["step"] <= self._points[-1][1]:
            self._points.clear()
        self._points.append((record["time"], record["step"]))

    def seconds_left(self, total_steps: int) -> float | None:
        """Return the seconds until `total_steps` are done; None with fewer than two records."""
        if len(self._points) < 2:
            return None
        (begun, first), (ended, last) = self._points[0], self._points[-1]
        return (total_steps - last) * (ended - begun) / (last - first)


def progress_text(record: Mapping[str, Any], total_steps: int, pace: Pace) -> str:
    """Return a record as one line of ASCII: step, loss, β, speed, waits, time left."""
    step = record["step"]
    left = pace.seconds_left(total_steps)
    parts = [
        f"step {step}/{total_steps} ({100 * step / max(total_steps, 1):.0f}%)",
        f"loss {_number(record.get('loss'))}",
        beta_text(record),
        f"{record.get('samples_per_second', math.nan):.4g} samples/s",
        waits_text(record),
        f"ETA {clock_text(left)}",
    ]
    return ", ".join(part for part in parts if part)


def bar_text(record: Mapping[str, Any]) -> str:
    """Return what stands behind a bar, which shows the steps and the time left itself."""
    parts = [
        f"loss {_number(record.get('loss'))}",
        beta_text(record).replace("beta", "β", 1),
        f"{record.get('samples_per_second', math.nan):.0f} samples/s",
    ]
    return " · ".join(part for part in parts if part)


def beta_text(record: Mapping[str, Any]) -> str:
    """Return the mean β of each channel, as `beta fkl 0.93 fd 1.1`; empty without energies."""
    betas = {name.partition("/")[2]: value for name, value in record.items() if name.startswith("beta/")}
    shown = [f"{name} {value:.3g}" for name, value in list(betas.items())[:SHOWN_BETAS]]
    more = ["..."] if len(betas) > SHOWN_BETAS else []
    return " ".join(["beta", *shown, *more]) if betas else ""


def waits_text(record: Mapping[str, Any]) -> str:
    """Return the shares of the time that the training waited, as `waits: data 2%, teacher 5%`; empty if unknown."""
    named = {"data": record.get("data_wait"), "teacher": record.get("teacher_wait")}
    shown = [f"{name} {100 * share:.0f}%" for name, share in named.items() if share is not None]
    return f"waits {' '.join(shown)}" if shown else ""


def clock_text(seconds: float | None) -> str:
    """Return a time span as `1 day, 2:03:04`; `unknown` for None."""
    return "unknown" if seconds is None else str(timedelta(seconds=round(seconds)))


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
