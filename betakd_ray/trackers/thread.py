"""A tracker's thread, which keeps what is not taken and tries again; and its files in the run's folder."""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from betakd_ray.errors import without_secrets
from betakd_ray.leftovers import temporary_folder
from betakd_ray.run.folder import TRACKER_FOLDERS
from betakd_ray.run.metrics import MetricsRecord
from betakd_ray.spec import JobSpec
from betakd_ray.storage import join, make_folder, open_store, put_file
from betakd_ray.trackers.services import TRACKERS, Tracker

RETRY_S = 30.0
"""Seconds between two attempts to reach a tracker that has failed."""
CLOSE_S = 20.0
"""Longest time in seconds that the end of a job waits for a tracker."""
COPY_EVERY_S = 300.0
"""Seconds between two copies of a tracker's files to a run that is in an object store."""
MAX_WAITING = 100_000
"""Largest number of records that wait for a tracker."""


class TrackerThread:
    """A tracker on a thread of its own. The first failure is a warning; what was missed is said at the end."""

    def __init__(self, name: str, make: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self._name, self._make, self._warn = name, make, warn
        self._waiting: deque[MetricsRecord] = deque(maxlen=MAX_WAITING)
        self._news, self._has_failed, self._dropped = threading.Event(), False, 0
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, record: MetricsRecord) -> None:
        """Queue a record and return at once."""
        self._dropped += len(self._waiting) == MAX_WAITING
        self._waiting.append(record)
        self._news.set()

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Send what waits, end the tracker, and say what it has missed. Returns after `timeout_s` in any case."""
        self._is_ending.set()
        self._news.set()
        self._thread.join(timeout_s)
        missed = [record["step"] for record in tuple(self._waiting)]
        if missed or self._dropped:
            count, steps = len(missed) + self._dropped, f" of steps {missed[0]} to {missed[-1]}" if missed else ""
            self._warn(f"tracking: {self._name} has missed {count} records{steps}. They are in the run's own metrics.")

    def _run(self) -> None:
        tracker = None
        while True:
            self._news.wait()
            self._news.clear()
            is_last = self._is_ending.is_set()
            if is_last and not tracker and not self._waiting:
                return  # nothing was ever logged: there is no run to be made for it
            try:
                tracker = tracker or self._make()
                while self._waiting:
                    tracker.log(self._waiting[0])
                    self._waiting.popleft()  # only now: a record that was not taken is sent again
                if is_last:
                    tracker.close()
            except Exception as error:
                self._note(error)
                if not is_last:
                    self._is_ending.wait(RETRY_S)
                    self._news.set()
            if is_last:
                return

    def _note(self, error: Exception) -> None:
        if not self._has_failed:
            self._warn(
                f"tracking: {self._name} fails, and is tried again every {RETRY_S:g} s; the job goes on: "
                f"{type(error).__name__}: {without_secrets(str(error))}"
            )
        self._has_failed = True


def started_trackers(spec: JobSpec, run: str, warn: Callable[[str], None]) -> list[TrackerThread]:
    """Start the trackers of a job, each on its thread."""
    return [TrackerThread(name, partial(InRunFolder, name, spec, run), warn) for name in spec.tracking.trackers]


class InRunFolder:
    """A tracker whose files are in the run's folder. If that is in an object store, they are copied there."""

    def __init__(self, name: str, spec: JobSpec, run: str) -> None:
        filesystem, root = open_store(run, spec.output.storage)
        self._filesystem, self._target = filesystem, join(root, TRACKER_FOLDERS[name])
        self._copied: dict[Path, tuple[int, int]] = {}
        self._is_local = isinstance(filesystem, LocalFileSystem)
        with ExitStack() as stack:
            self._folder = Path(self._target) if self._is_local else stack.enter_context(temporary_folder("tracker"))
            make_folder(filesystem, self._target)
            self._tracker: Tracker = TRACKERS[name](spec, run, self._folder)
            self._resources = stack.pop_all()
        self._copied_at = time.monotonic()

    def log(self, record: MetricsRecord) -> None:
        self._tracker.log(record)
        if time.monotonic() - self._copied_at > COPY_EVERY_S:
            self._copy()

    def close(self) -> None:
        with self._resources:
            self._tracker.close()
            self._copy()

    def _copy(self) -> None:
        """Copy the files that have changed since the last copy."""
        self._copied_at = time.monotonic()
        if self._is_local:
            return
        for file in sorted(path for path in self._folder.rglob("*") if path.is_file() and not path.is_symlink()):
            state = (file.stat().st_mtime_ns, file.stat().st_size)
            if self._copied.get(file) != state:
                put_file(self._filesystem, file, join(self._target, file.relative_to(self._folder).as_posix()))
                self._copied[file] = state
