"""What a thread does when, so that another thread can say what it waited for."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator


class Activities:
    """Log of what a thread did when, so that another thread can say what it waited for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._past: deque[tuple[str, float, float]] = deque(maxlen=1000)
        self._present: tuple[str, float] | None = None

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Note `what` as the thread's activity until the block ends."""
        with self._lock:
            self._present = (what, time.perf_counter())
        try:
            yield
        finally:
            with self._lock:
                assert self._present is not None
                self._past.append((*self._present, time.perf_counter()))
                self._present = None

    @property
    def present(self) -> str:
        """Return the current activity; empty if there is none."""
        with self._lock:
            return self._present[0] if self._present else ""

    def between(self, start: float, end: float) -> dict[str, float]:
        """Return the seconds of each activity within an interval; `start` and `end` are `time.perf_counter` values."""
        with self._lock:
            spans = [*self._past, *([(*self._present, end)] if self._present else [])]
        found: dict[str, float] = {}
        for what, begun, ended in spans:
            overlap = min(end, ended) - max(start, begun)
            if overlap > 0:
                found[what] = found.get(what, 0.0) + overlap
        return found
