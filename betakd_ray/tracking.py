"""Metrics out: the run's own metrics.jsonl, and whichever trackers the spec names."""

import hashlib
import json
import time
from collections.abc import Iterable
from typing import Any, Protocol

from betakd_ray.metrics import NAMES, Gauges
from betakd_ray.spec import JobSpec
from betakd_ray.storage import join, open_store, replace_file

METRICS = "metrics.jsonl"
Record = dict[str, Any]
FLUSH_S = 10.0
"""Object stores cannot append, so the file is written whole; not more often than this."""


class Tracker(Protocol):
    """Takes the numbers of a step."""

    def log(self, record: Record) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files beside the run, or in ./tensorboard/NAME when the run is in an object store."""

    def __init__(self, spec: JobSpec, run: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(join(run, "tensorboard") if "://" not in run else f"tensorboard/{spec.name}")

    def log(self, record: Record) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """One MLflow run of the job's name; the server comes from MLFLOW_TRACKING_URI."""

    def __init__(self, spec: JobSpec, run: str) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]  # an extra

        self._mlflow = mlflow
        mlflow.set_experiment("betakd")
        mlflow.start_run(run_name=spec.name)
        mlflow.log_dict(spec.model_dump(mode="json"), "spec.json")

    def log(self, record: Record) -> None:
        self._mlflow.log_metrics(_numbers(record), step=record["step"])

    def close(self) -> None:
        self._mlflow.end_run()


class WandB:
    """One Weights & Biases run, resumed by the run's place; the key comes from the environment."""

    def __init__(self, spec: JobSpec, run: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  # an extra

        self._run = wandb.init(
            project="betakd", name=spec.name, id=_run_id(run), resume="allow", config=spec.model_dump(mode="json")
        )

    def log(self, record: Record) -> None:
        self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class Prometheus:
    """Gauges on the node's metrics agent, always: nothing but a scrape makes them cost anything."""

    def __init__(self, spec: JobSpec) -> None:
        self._gauges = Gauges(spec.name)

    def log(self, record: Record) -> None:
        numbers = _numbers(record) | {"step": record["step"], "loss/total": record["loss"]}
        numbers |= {
            name.replace("energy", "loss", 1): value for name, value in numbers.items() if name.startswith("energy/")
        }
        named = {f"betakd_{SHOWN_AS.get(name, name)}": value for name, value in numbers.items()}
        self._gauges.set({name: value for name, value in named.items() if name.partition("/")[0] in NAMES})

    def close(self) -> None:
        """Gauges go with their process."""


SHOWN_AS = {
    "data_wait": "data_wait_ratio",
    "teacher_wait": "teacher_wait_ratio",
    "teacher_busy": "teacher_busy_ratio",
    "checkpoint_age_s": "checkpoint_age_seconds",
    "checkpoint_s": "checkpoint_duration_seconds",
}
"""Numbers whose name in Prometheus has its unit written out."""
TRACKERS = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


class Metrics:
    """The run's history, kept whole: it rides in the checkpoint, so a resumed curve has no gap and no double."""

    def __init__(self, spec: JobSpec, run: str) -> None:
        self.history: list[Record] = []
        self._filesystem, self._root = open_store(run, spec.output.storage)
        self._trackers: list[Tracker] = [Prometheus(spec)]
        self._trackers += [TRACKERS[name](spec, run) for name in spec.tracking.trackers]
        self._flushed = time.monotonic()

    def log(self, record: Record) -> None:
        """Add the numbers of a step."""
        self.history.append(record)
        for tracker in self._trackers:
            tracker.log(record)
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write metrics.jsonl."""
        self.write(METRICS, to_jsonl(self.history))
        self._flushed = time.monotonic()

    def write(self, name: str, content: str) -> None:
        """A file of the run's folder, whole."""
        replace_file(self._filesystem, join(self._root, name), content.encode())

    def close(self) -> None:
        """Flush and end the trackers."""
        self.flush()
        for tracker in self._trackers:
            tracker.close()

    def restore(self, text: str) -> None:
        """Continue from a checkpoint's history."""
        self.history = from_jsonl(text)


def _run_id(run: str) -> str:
    """The same for every start of a run, and for no other run of its name."""
    return hashlib.sha256(run.encode()).hexdigest()[:16]


def to_jsonl(records: Iterable[Record]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(record) + "\n" for record in records)


def from_jsonl(text: str) -> list[Record]:
    """The inverse."""
    return [json.loads(line) for line in text.splitlines()]


def _numbers(record: Record) -> dict[str, float]:
    return {name: float(value) for name, value in record.items() if name != "step" and isinstance(value, (int, float))}
