"""TensorBoard, MLflow, Weights & Biases, trackio and Prometheus, through their own libraries."""

import netrc
import os
import urllib.error
import urllib.request
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable
from urllib.parse import urlsplit

from betakd_ray.on_ray.gauges import NAMES, Gauges
from betakd_ray.run.metrics import MetricsRecord
from betakd_ray.spec import JobSpec

ASK_S = 5.0
"""Timeout in seconds of the question whether a server answers."""


@runtime_checkable
class Tracker(Protocol):
    """Destination of the numbers of each step. It is made and used in one thread, and may raise anything."""

    def log(self, record: MetricsRecord) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder."""

    package: ClassVar[str] = "tensorboard"

    def __init__(self, spec: JobSpec, run: str, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Made at the first step: what an earlier start has logged of this step and later ones, is done again.
        self._made: Any = None
        self._make = lambda step: SummaryWriter(str(folder), purge_step=step, flush_secs=10)

    @staticmethod
    def server() -> str:
        return ""

    def log(self, record: MetricsRecord) -> None:
        self._made = self._made or self._make(record["step"])
        for name, value in numbers_of(record).items():
            self._made.add_scalar(name, value, record["step"], walltime=record.get("time"))

    def close(self) -> None:
        if self._made:
            self._made.close()


class MLflow:
    """One MLflow run, at MLFLOW_TRACKING_URI; without it, in the run's folder. A restart goes on in it."""

    package: ClassVar[str] = "mlflow"

    def __init__(self, spec: JobSpec, run: str, folder: Path) -> None:
        # MLflow's own would be two minutes, seven times.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # for the run's folder: it needs no database

        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]  # an extra
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        self._metric: Any = Metric
        address = os.environ.get("MLFLOW_TRACKING_URI")
        is_here = not address or (goes_offline(spec) and not answers(address))
        self._client = MlflowClient(folder.absolute().as_uri() if is_here else address)
        found = self._client.get_experiment_by_name(spec.tracking.project)
        experiment = found.experiment_id if found else self._client.create_experiment(spec.tracking.project)
        self._run = self._found(experiment, run) or self._created(experiment, spec, run)

    @staticmethod
    def server() -> str:
        address = os.environ.get("MLFLOW_TRACKING_URI", "")
        return address if address.startswith("http") else ""

    def _found(self, experiment: str, run: str) -> str:
        runs = self._client.search_runs([experiment], f"tags.`betakd.run` = '{run_id(run)}'", max_results=1)
        return runs[0].info.run_id if runs else ""

    def _created(self, experiment: str, spec: JobSpec, run: str) -> str:
        tags = {"betakd.run": run_id(run)} | ({"group": spec.tracking.group} if spec.tracking.group else {})
        made = self._client.create_run(experiment, run_name=spec.tracking.name or spec.name, tags=tags).info.run_id
        self._client.log_dict(made, spec.model_dump(mode="json"), "spec.json")
        return made

    def log(self, record: MetricsRecord) -> None:
        when = int(1000 * record.get("time", 0))
        numbers = numbers_of(record).items()
        self._client.log_batch(self._run, [self._metric(name, value, when, record["step"]) for name, value in numbers])

    def close(self) -> None:
        self._client.set_terminated(self._run)


class WandB:
    """One Weights & Biases run. Its id follows from the run's URL, so a restart resumes it.

    W&B's own process sends the numbers, and keeps what it cannot send in the folder. WANDB_MODE=offline sends nothing.
    """

    package: ClassVar[str] = "wandb"

    def __init__(self, spec: JobSpec, run: str, folder: Path) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  # an extra

        address = self.server()
        offline = {"mode": "offline"} if address and goes_offline(spec) and not answers(address) else {}
        self._run = wandb.init(
            project=spec.tracking.project,
            group=spec.tracking.group,
            name=spec.tracking.name or spec.name,
            id=run_id(run),
            resume="allow",
            dir=str(folder),
            config=spec.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True, init_timeout=30),
            **offline,
        )

    @staticmethod
    def server() -> str:
        if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
            return ""
        return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")

    @classmethod
    def lacks(cls) -> str:
        """Return what is missing for the server besides the network; empty if nothing is."""
        host = urlsplit(cls.server()).hostname
        if not host or os.environ.get("WANDB_API_KEY") or _has_netrc(host):
            return ""
        return f"there is no key for {host}: set WANDB_API_KEY, or run `wandb login`; WANDB_MODE=offline needs none"

    def log(self, record: MetricsRecord) -> None:
        self._run.log(numbers_of(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """One trackio run, in the run's folder, or where TRACKIO_SERVER_URL or TRACKIO_SPACE_ID says."""

    package: ClassVar[str] = "trackio"

    def __init__(self, spec: JobSpec, run: str, folder: Path) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(folder))  # read when it is imported

        import trackio  # pyright: ignore[reportMissingImports]  # an extra

        address = os.environ.get("TRACKIO_SERVER_URL")
        is_there = address and not (goes_offline(spec) and not answers(address))
        self._run = trackio.init(
            spec.tracking.project,
            name=spec.tracking.name or spec.name,
            group=spec.tracking.group,
            config=spec.model_dump(mode="json"),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
            **({"server_url": address} if is_there else {}),
            **({"space_id": space} if (space := os.environ.get("TRACKIO_SPACE_ID")) else {}),
        )

    @staticmethod
    def server() -> str:
        space = os.environ.get("TRACKIO_SPACE_ID")
        return os.environ.get("TRACKIO_SERVER_URL", "https://huggingface.co" if space else "")

    def log(self, record: MetricsRecord) -> None:
        self._run.log(numbers_of(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class Prometheus:
    """Gauges on the node's metrics agent. Always on, because gauges cost nothing until they are scraped."""

    def __init__(self, spec: JobSpec) -> None:
        self._gauges = Gauges(spec.name)

    def log(self, record: MetricsRecord) -> None:
        numbers = numbers_of(record) | {"step": record["step"], "loss/total": record["loss"]}
        numbers |= {
            name.replace("energy", "loss", 1): value for name, value in numbers.items() if name.startswith("energy/")
        }
        named = {f"betakd_{SHOWN_AS.get(name, name)}": value for name, value in numbers.items()}
        self._gauges.set({name: value for name, value in named.items() if name.partition("/")[0] in NAMES})


SHOWN_AS = {
    "data_wait": "data_wait_ratio",
    "teacher_wait": "teacher_wait_ratio",
    "teacher_busy": "teacher_busy_ratio",
    "checkpoint_age_s": "checkpoint_age_seconds",
    "checkpoint_s": "checkpoint_duration_seconds",
}
"""Names in Prometheus of the numbers whose unit or kind is written out there."""
TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB, "trackio": Trackio}


def goes_offline(spec: JobSpec) -> bool:
    """Return whether a tracker whose server does not answer writes to the run's folder."""
    return spec.tracking.unreachable == "offline"


def answers(address: str) -> bool:
    """Return whether an HTTP server answers at an address, whatever it says."""
    try:
        urllib.request.urlopen(address, timeout=ASK_S).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _has_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def run_id(run: str) -> str:
    """Return an id that is the same for every start of a run, and differs between runs of one name."""
    return sha256(run.encode()).hexdigest()[:16]


def numbers_of(record: MetricsRecord) -> dict[str, float]:
    """Return the numbers of a record, without its step and time, which trackers have places of their own for."""
    return {
        name: float(value)
        for name, value in record.items()
        if name not in ("step", "time") and isinstance(value, (int, float))
    }
