"""Metrics of a run: written to the run's folder (`run.metrics` reads them) and sent to the spec's trackers.

Both happen on a separate thread.
"""

import hashlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Protocol, runtime_checkable

from betakd_ray.leftovers import temporary_folder
from betakd_ray.on_ray.gauges import NAMES, Gauges
from betakd_ray.run.folder import METRICS, METRICS_PARTS, TENSORBOARD
from betakd_ray.run.metrics import RESUMED, MetricsRecord, Part, parts_of, stream_metrics, stream_parts, to_jsonl
from betakd_ray.run.records import LOGGED_FILE, Logged
from betakd_ray.spec import JobSpec
from betakd_ray.storage import join, make_folder, open_store, put_file, replace_file

FLUSH_S, MOST_S = 10.0, 300.0
"""Limits in seconds of the time between two parts. Within them it is 1/50 of the time since the start.

A run of three days has about a thousand parts.
"""
MAX_PART_RECORDS = 1000
"""Largest number of records of a part: a part is written when there are so many, so that no more are in memory."""
_COPIED = "0"
"""Attempt name of the parts that are copied from the metrics.jsonl of an older version, which wrote no parts."""
_LOG = logging.getLogger(__name__)


@runtime_checkable
class Tracker(Protocol):
    """Destination of the numbers of each step."""

    def log(self, record: MetricsRecord) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder, or in ./tensorboard/NAME if the run is in an object store."""

    def __init__(self, spec: JobSpec, run: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(join(run, TENSORBOARD) if "://" not in run else f"{TENSORBOARD}/{spec.name}")

    def log(self, record: MetricsRecord) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """One MLflow run with the job's name. The server's address comes from MLFLOW_TRACKING_URI."""

    def __init__(self, spec: JobSpec, run: str) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]  # an extra

        self._mlflow = mlflow
        mlflow.set_experiment("betakd")
        mlflow.start_run(run_name=spec.name)
        mlflow.log_dict(spec.model_dump(mode="json"), "spec.json")

    def log(self, record: MetricsRecord) -> None:
        self._mlflow.log_metrics(_numbers(record), step=record["step"])

    def close(self) -> None:
        self._mlflow.end_run()


class WandB:
    """One Weights & Biases run. Its id follows from the run's URL, so a restart resumes it."""

    def __init__(self, spec: JobSpec, run: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  # an extra

        self._run = wandb.init(
            project="betakd", name=spec.name, id=_run_id(run), resume="allow", config=spec.model_dump(mode="json")
        )

    def log(self, record: MetricsRecord) -> None:
        self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class Prometheus:
    """Gauges on the node's metrics agent. Always on, because gauges cost nothing until they are scraped."""

    def __init__(self, spec: JobSpec) -> None:
        self._gauges = Gauges(spec.name)

    def log(self, record: MetricsRecord) -> None:
        numbers = _numbers(record) | {"step": record["step"], "loss/total": record["loss"]}
        numbers |= {
            name.replace("energy", "loss", 1): value for name, value in numbers.items() if name.startswith("energy/")
        }
        named = {f"betakd_{SHOWN_AS.get(name, name)}": value for name, value in numbers.items()}
        self._gauges.set({name: value for name, value in named.items() if name.partition("/")[0] in NAMES})

    def close(self) -> None:
        """Do nothing: gauges end with their process."""


SHOWN_AS = {
    "data_wait": "data_wait_ratio",
    "teacher_wait": "teacher_wait_ratio",
    "teacher_busy": "teacher_busy_ratio",
    "checkpoint_age_s": "checkpoint_age_seconds",
    "checkpoint_s": "checkpoint_duration_seconds",
}
"""Names in Prometheus of the numbers whose unit or kind is written out there."""
TRACKERS = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


class MetricsWriter:
    """Writer of the numbers of steps that does not block the caller.

    An error of the store is raised by the next call. An error of a tracker is logged as a warning and ends that
    tracker, so that no run stops because a dashboard is unreachable.
    """

    def __init__(self, spec: JobSpec, run: str, token: int = 0) -> None:
        self.last: MetricsRecord = {}
        """The newest record."""
        self._count = 0
        self._filesystem, self._root = open_store(run, spec.output.storage)
        self._attempt = f"{token}-{os.urandom(4).hex()}"
        # Used by the thread alone: the lines not written yet, and the number of the next part once it is known.
        # Nothing is written before `_resume`: a part that begins at step 0 would undo what was logged before.
        self._lines: list[MetricsRecord] = []
        self._number: int | None = None
        self._trackers: list[Tracker] = []
        self._failure: BaseException | None = None
        self._begun = self._flushed = time.monotonic()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()
        # On the thread, because MLflow binds its run to the thread that starts it.
        self._do(lambda: self._open(spec, run))

    def log(self, record: MetricsRecord) -> None:
        """Queue the numbers of a step and return at once."""
        self._raise_failure()
        self.last = record
        self._count += 1
        self._work.put(partial(self._add, record))

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
        for tracker in self._trackers:
            self._tell(tracker, tracker.close)

    def _open(self, spec: JobSpec, run: str) -> None:
        self._trackers.append(Prometheus(spec))
        for name in spec.tracking.trackers:
            self._trackers.append(TRACKERS[name](spec, run))

    def _add(self, record: MetricsRecord) -> None:
        self._lines.append(record)
        if len(self._lines) >= MAX_PART_RECORDS:
            self._write_part()
        for tracker in list(self._trackers):
            self._tell(tracker, partial(tracker.log, record))

    def _tell(self, tracker: Tracker, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:
            _LOG.warning("%s gets no more metrics: %s: %s", type(tracker).__name__, type(error).__name__, error)
            # A new list, because `_run` may be in a loop over the present one.
            self._trackers = [each for each in self._trackers if each is not tracker]

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


def _run_id(run: str) -> str:
    """Return an id that is the same for every start of a run, and differs between runs of one name."""
    return hashlib.sha256(run.encode()).hexdigest()[:16]


def _numbers(record: MetricsRecord) -> dict[str, float]:
    return {name: float(value) for name, value in record.items() if name != "step" and isinstance(value, (int, float))}
