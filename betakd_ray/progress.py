"""Progress lines on the driver's terminal. A terminal can have one live display, so concurrent jobs share it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Update = Callable[..., None]
"""Function that updates a progress line; takes those of `completed`, `advance` and `numbers` that have changed."""


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
                    TextColumn("{task.fields[numbers]}"),
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


@contextmanager
def progress_line(label: str, total: int, numbers: str = "", *, is_shown: bool = True) -> Iterator[Update]:
    """Show a line with a bar, and `numbers` after it, until the block ends.

    A line that ends while others are still shown is hidden.
    """
    if not is_shown:
        yield lambda **_: None
        return
    progress = _DISPLAY.open()
    line = progress.add_task(label, total=total, numbers=numbers)
    try:
        yield partial(progress.update, line)
    finally:
        if _DISPLAY.close():
            progress.update(line, visible=False)
