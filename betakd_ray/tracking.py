"""Metrics of a run: written to the run's folder by a thread (`run.metrics` reads them), and given to the trackers."""

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice

from betakd_ray.leftovers import temporary_folder
from betakd_ray.run.folder import METRICS, METRICS_PARTS
from betakd_ray.run.metrics import RESUMED, MetricsRecord, Part, parts_of, stream_metrics, stream_parts, to_jsonl
from betakd_ray.run.records import LOGGED_FILE, Logged
from betakd_ray.spec import JobSpec
from betakd_ray.storage import join, make_folder, open_store, put_file, replace_file
from betakd_ray.trackers.services import Prometheus
from betakd_ray.trackers.thread import started_trackers

FLUSH_S, MOST_S = 10.0, 300.0
"""Limits in seconds of the time between two parts. Within them it is 1/50 of the time since the start.

A run of three days has about a thousand parts.
"""
MAX_PART_RECORDS = 1000
"""Largest number of records of a part: a part is written when there are so many, so that no more are in memory."""
_COPIED = "0"
"""Attempt name of the parts that are copied from the metrics.jsonl of an older version, which wrote no parts."""
_LOG = logging.getLogger(__name__)


class MetricsWriter:
    """Writer of the numbers of steps that does not block the caller.

    An error of the store is raised by the next call. One of a tracker is a text for `warn`, so that no run stops
    because a dashboard is unreachable.
    """

    def __init__(self, spec: JobSpec, run: str, token: int = 0, warn: Callable[[str], None] = _LOG.warning) -> None:
        self.last: MetricsRecord = {}
        """The newest record."""
        self._count = 0
        self._filesystem, self._root = open_store(run, spec.output.storage)
        self._attempt = f"{token}-{os.urandom(4).hex()}"
        # Used by the thread alone: the lines not written yet, and the number of the next part once it is known.
        # Nothing is written before `_resume`: a part that begins at step 0 would undo what was logged before.
        self._lines: list[MetricsRecord] = []
        self._number: int | None = None
        self._failure: BaseException | None = None
        self._begun = self._flushed = time.monotonic()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()
        self._warn = warn
        self._trackers = started_trackers(spec, run, warn)
        self._prometheus: Prometheus | None = Prometheus(spec)

    def log(self, record: MetricsRecord) -> None:
        """Queue the numbers of a step and return at once."""
        self._raise_failure()
        self.last = record
        self._count += 1
        self._work.put(partial(self._add, record))
        for tracker in self._trackers:
            tracker.log(record)  # each has a queue of its own

    def flush(self) -> None:
        """Block until everything logged so far is stored."""
        self._do(self._write_part)

    def write(self, name: str, content: str) -> None:
        """Queue the writing of a whole file in the run's folder and return at once."""
        self._raise_failure()
        self._work.put(partial(self._replace, name, content))

    def reference(self) -> str:
        """Return what a checkpoint stores about the metrics so far, for `restore`.

        Call `flush` before that checkpoint is committed.
        """
        return json.dumps({"step": self.last.get("step", 0), "records": self._count})

    def restore(self, reference: str | None) -> None:
        """Go on from the metrics of a checkpoint, or from none: records that were logged later no longer count.

        Call it at every start, before the first `log`.
        """
        kept = LOGGED_FILE.parse(reference.encode()) if reference else Logged(0, 0)
        self.last, self._count = {}, 0
        for record in stream_metrics(self._filesystem, self._root):
            if record["step"] <= kept.step:
                self.last, self._count = record, self._count + 1
        if self._count != kept.records:
            _LOG.warning(
                "%s: %d records up to step %d were logged, but %d are there", self._root, kept.records, kept.step,
                self._count,
            )  # fmt: skip
        self._do(lambda: self._resume(kept.step))

    def close(self) -> None:
        """Join the parts into metrics.jsonl and end the trackers."""
        self._do(self._join)
        self._work.put(None)
        self._thread.join()
        self.end_trackers()

    def end_trackers(self) -> None:
        """Let the trackers send what they have, and end. The run may begin again."""
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            tracker.close()

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    def _do(self, work: Callable[[], None]) -> None:
        """Run `work` on the thread, after everything queued before, and wait for it. Raises the thread's error."""
        done = threading.Event()
        self._work.put(work)
        # A separate item, so that it runs even if `work` raises. Otherwise the caller would wait forever.
        self._work.put(done.set)
        done.wait()
        self._raise_failure()

    # -------------------------------------------------------------------------------------- on the thread

    def _run(self) -> None:
        while True:
            pause = min(max(FLUSH_S, (time.monotonic() - self._begun) / 50), MOST_S)
            try:
                work = self._work.get(timeout=max(0.0, self._flushed + pause - time.monotonic()))
            except queue.Empty:
                work = self._write_part
            if work is None:
                break
            try:
                work()
            except Exception as error:
                self._failure = self._failure or error

    def _add(self, record: MetricsRecord) -> None:
        self._lines.append(record)
        if len(self._lines) >= MAX_PART_RECORDS:
            self._write_part()
        if self._prometheus:
            try:
                self._prometheus.log(record)
            except Exception as error:  # no run stops because of a dashboard
                self._prometheus = None
                self._warn(f"Prometheus gets no more metrics: {type(error).__name__}: {error}")

    def _write_part(self) -> None:
        # Set first: if the store fails, the next attempt comes after a whole pause, and not at once.
        self._flushed = time.monotonic()
        if not self._lines:
            return
        if self._number is None:  # known at the first write, when the parts of all earlier attempts exist
            self._number = 1 + max((part.number for part in parts_of(self._filesystem, self._root)), default=0)
        self._store_part(self._number, self._attempt, to_jsonl(self._lines))
        self._lines = []
        self._number += 1

    def _store_part(self, number: int, attempt: str, lines: str) -> None:
        make_folder(self._filesystem, join(self._root, METRICS_PARTS))
        self._replace(join(METRICS_PARTS, f"{number:08d}-{attempt}.jsonl"), lines)

    def _resume(self, step: int) -> None:
        whole = join(self._root, METRICS)
        has_whole = self._filesystem.exists(whole)
        if has_whole and not _are_complete(parts_of(self._filesystem, self._root)):
            self._copy()
        self._lines.append({RESUMED: step})
        self._write_part()
        if has_whole:
            # Either it was copied to a part above, or an attempt had joined its parts, which are still there.
            self._filesystem.rm_file(whole)

    def _copy(self) -> None:
        """Copy the metrics.jsonl of an older version of this package, which wrote no parts, to parts."""
        records = stream_metrics(self._filesystem, self._root)
        for number, lines in enumerate(_batches(records), 1):
            self._store_part(number, _COPIED, lines)
        # Last, because these parts count only with it: this process may die before.
        self._store_part(0, _COPIED, to_jsonl([{RESUMED: 0}]))

    def _join(self) -> None:
        self._write_part()
        with temporary_folder("metrics") as folder:
            joined = folder / METRICS
            with joined.open("w") as file:
                file.writelines(_batches(stream_parts(self._filesystem, self._root)))
            put_file(self._filesystem, joined, join(self._root, METRICS))

    def _replace(self, name: str, content: str) -> None:
        replace_file(self._filesystem, join(self._root, name), content.encode())


def _batches(records: Iterable[MetricsRecord]) -> Iterator[str]:
    """Yield records as JSON lines, several at a time."""
    rest = iter(records)
    while batch := list(islice(rest, MAX_PART_RECORDS)):
        yield to_jsonl(batch)


def _are_complete(parts: list[Part]) -> bool:
    """Return whether the parts hold all the metrics: not if a copy to parts was begun, and its first one is missing."""
    return any(part.attempt != _COPIED or part.number == 0 for part in parts)
