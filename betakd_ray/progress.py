"""Progress of jobs: bars on a terminal, and lines of text where there is none. Both go to standard error.

A terminal can have one live display, so concurrent jobs share it.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Update = Callable[..., None]
"""Function that updates a progress line. It takes those of these arguments that have changed:

`completed`, `advance`, `total`, `numbers` (a text after the bar), and `line` (the text without a terminal, if it is to
be another one than these).
"""


class _Display:
    """Live display that is shown as long as it has at least one line."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._lines = 0

    def open(self) -> Progress:
        with self._lock:
            if self._progress is None:
                self._progress = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[numbers]}", markup=False),
                    console=_console(),
                )
                self._progress.start()
            self._lines += 1
            return self._progress

    def close(self) -> bool:
        """Remove one line; return whether other lines are still shown."""
        with self._lock:
            self._lines -= 1
            if self._lines == 0 and self._progress is not None:
                self._progress.stop()
                self._progress = None
            return self._lines > 0


_DISPLAY = _Display()


REPEAT_S = 60.0
"""Seconds without a new line after which the present phase is said again, so that a log does not look dead."""
PACE_S = 10.0
"""Seconds between two lines of text of `pieces_line`."""


class _PlainLine:
    """Progress as lines of text: one for each change, and one a minute while a phase lasts."""

    def __init__(self, label: str, total: int | None, numbers: str, completed: int = 0) -> None:
        self._label, self._total, self._numbers, self._completed = label, total, numbers, completed
        self._phase, self._begun = numbers, time.monotonic()
        self._ended = threading.Event()
        self.say(f"{completed} of {total} {numbers}" if total is not None else numbers)
        threading.Thread(target=self._repeat, name="progress", daemon=True).start()

    def close(self) -> None:
        """Repeat the phase no more."""
        self._ended.set()

    def _repeat(self) -> None:
        while not self._ended.wait(REPEAT_S):
            minutes = (time.monotonic() - self._begun) / 60
            if self._phase and minutes >= REPEAT_S / 60:
                self.say(f"{self._phase}, since {minutes:.0f} min")

    def __call__(
        self,
        *,
        completed: int | None = None,
        advance: int = 0,
        total: int | None = None,
        numbers: str | None = None,
        line: str | None = None,
    ) -> None:
        before = (self._completed, self._numbers)
        self._total = self._total if total is None else total
        self._numbers = self._numbers if numbers is None else numbers
        self._completed = (self._completed if completed is None else completed) + advance
        self._phase = ""
        if line is not None:
            self.say(line)
        elif self._completed != before[0]:
            self.say(f"{self._completed} of {self._total} {self._numbers}".rstrip())
        elif self._numbers != before[1]:
            self._phase, self._begun = self._numbers, time.monotonic()
            self.say(self._numbers)

    def say(self, text: str) -> None:
        """Print a text, as one write: lines of concurrent jobs must not be mixed."""
        sys.stderr.write(f"{self._label}: {text}\n")
        sys.stderr.flush()


class _PacedLine:
    """Progress of many small pieces: a line every `PACE_S` seconds, with the time that is left, and one at the end."""

    def __init__(self, label: str, total: int, numbers: str, completed: int) -> None:
        self._plain = _PlainLine(label, total, numbers, completed)
        self.close = self._plain.close
        self._total, self._numbers = total, numbers
        self._first = self._done = completed
        self._begun = self._said = time.monotonic()

    def __call__(self, *, advance: int) -> None:
        self._done += advance
        now = time.monotonic()
        if self._done >= self._total or now - self._said >= PACE_S:
            self._said = now
            self._plain(line=f"{self._done} of {self._total} {self._numbers}{self._left(now)}")

    def _left(self, now: float) -> str:
        """Return the time left at the pace so far; empty if nothing is left. What was done before does not count."""
        left, new = self._total - self._done, self._done - self._first
        return f", ETA {timedelta(seconds=round((now - self._begun) / new * left))}" if left > 0 and new > 0 else ""


@contextmanager
def progress_line(
    label: str, total: int | None = None, numbers: str = "", *, is_shown: bool = True, completed: int = 0
) -> Iterator[Update]:
    """Show a line with a bar, and `numbers` after it, until the block ends; lines of text if there is no terminal.

    A line that ends while others are still shown, or before anything is completed, is hidden.
    """
    if not is_shown:
        yield lambda **_: None
        return
    if not has_display():
        plain = _PlainLine(label, total, numbers, completed)
        try:
            yield plain
        finally:
            plain.close()
        return
    progress = _DISPLAY.open()
    # Given here and not as an update, from which rich would take a pace at which the rest would be done at once.
    line = progress.add_task(label, total=total, numbers=numbers, completed=completed)
    try:
        yield partial(_update, progress, line)
    finally:
        if not progress.tasks[progress.task_ids.index(line)].completed:
            progress.update(line, visible=False)
        if _DISPLAY.close():
            progress.update(line, visible=False)


@contextmanager
def pieces_line(label: str, total: int, numbers: str, *, completed: int = 0) -> Iterator[Update]:
    """Show a line for many small pieces of work, of which `completed` were done before, with the time left.

    The update takes `advance` only. Without a terminal there is a line of text every `PACE_S` seconds.
    """
    if has_display():
        with progress_line(label, total, numbers, completed=completed) as update:
            yield update
        return
    plain = _PacedLine(label, total, numbers, completed)
    try:
        yield plain
    finally:
        plain.close()


def has_display() -> bool:
    """Return whether standard error is a terminal or a notebook, where a line can be drawn again."""
    console = _console()
    return console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)


def _update(progress: Progress, task: TaskID, **changes: Any) -> None:
    changes.pop("line", None)  # the text for where there is no terminal
    progress.update(task, **changes)


def _console() -> Console:
    return Console(stderr=True)
