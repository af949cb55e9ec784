"""Progress lines on the driver's terminal. What runs side by side shares the one live display that a terminal has."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Update = Callable[..., None]
"""Takes `completed`, `advance` and `numbers`, each if it has changed."""


class _Display:
    """Live while any line is."""

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
        """Whether other lines go on."""
        with self._lock:
            self._lines -= 1
            if self._lines == 0 and self._progress is not None:
                self._progress.stop()
                self._progress = None
            return self._lines > 0


_DISPLAY = _Display()


@contextmanager
def progress_line(label: str, total: int, numbers: str = "", *, is_shown: bool = True) -> Iterator[Update]:
    """A line with a bar, until the block ends; `numbers` stand behind it. A line that ends before others vanishes."""
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
