"""The student workers as Ray Train runs them, seen from the driver."""

import logging
import os
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from betakd_ray import errors
from betakd_ray.background import in_background
from betakd_ray.errors import ClusterError, TrainingError
from betakd_ray.leftovers import owned, remove_abandoned
from betakd_ray.on_ray.backend import FoundTorchConfig, ReportController, ReportFailures, causes
from betakd_ray.on_ray.cluster import gpus_each
from betakd_ray.on_ray.local import loopback_environment
from betakd_ray.on_ray.monitor import Report
from betakd_ray.on_ray.source import SplitOnce, rows
from betakd_ray.on_ray.spares import importing
from betakd_ray.progress import Update
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.sigterm import POLL_S, StopRequest
from betakd_ray.spec import JobSpec
from betakd_ray.teacher.remote import RemotePending
from betakd_ray.train.canaries import CanaryWatch
from betakd_ray.train.config import WorkerConfig
from betakd_ray.train.teacher_checks import settings_of
from betakd_ray.train.view import TrainingView
from betakd_ray.train.worker import train_worker

STARTS = 4
"""Number of times that Ray Train tries to place the students. Together they take `cluster.start_timeout_s`."""
_LOG = logging.getLogger(__name__)

WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DEEPSPEED_LOG_LEVEL": "error",
}
ON_CPU = {
    "DS_ACCELERATOR": "cpu",
    # glibc keeps the memory of a step's tensors for the next step. By default it returns the pages to the system, and
    # every step has page faults for all of them.
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
}


def train_students(config: WorkerConfig, reader: "ray.ObjectRef", stop: StopRequest, update: Update) -> dict[str, Any]:
    """Train on the cluster's students until the job ends or is to stop; return rank 0's outcome.

    `reader` is the data's `Reader`, and `update` shows the progress. Raises ClusterError if the students find no place
    in time, RayActorError if the teachers' pool died, Interrupted if the job was asked to stop before they trained, and
    the error that ended the training as a TrainingError or UserError.
    """
    try:
        with owned(_scratch(config.spec.name)) as folder:
            # In a thread of its own: this one looks for requests to stop, also while Ray Train waits for places.
            training = in_background(_trainer(config, reader, folder).fit, "ray-train")
            _follow(training, config, stop, update)
            outcome = training.result().return_value or {}
    except TrainingFailedError as error:
        _raise_cause(config, is_failed=True)
        raise _failure(error, config.spec) from error
    # Also without an error of Ray Train's: workers that find a failure noted in the monitor end as if all were well.
    _raise_cause(config)
    return outcome


def _trainer(config: WorkerConfig, reader: "ray.ObjectRef", folder: Path) -> TorchTrainer:
    spec, monitor = config.spec, config.monitor
    gpus = gpus_each(spec.cluster.student.gpus)
    student, workers = spec.cluster.student, spec.training.workers
    resources = {"CPU": student.cpus, **student.resources} | ({"GPU": gpus} if gpus else {})
    failures = ReportFailures(monitor, spec.cluster.start_timeout_s / STARTS, workers.max)
    return TorchTrainer(
        train_worker,
        train_loop_config={"worker": config},
        datasets={"train": partial(rows, reader, spec, config.run, config.plan, monitor)},
        dataset_config=SplitOnce(),
        torch_config=FoundTorchConfig(timeout_s=int(spec.training.collective_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=(workers.min, workers.max) if workers.is_elastic else workers.min,
            use_gpu=gpus > 0,
            resources_per_worker=resources,
            label_selector=student.labels or None,
            accelerator_type=student.accelerator_type,
        ),
        run_config=RunConfig(
            # Ray Train's own folder holds only its state. Checkpoints and metrics are in the run's folder.
            name=folder.name,
            storage_path=str(folder.parent),
            # Unlimited, because Ray does not reset its count on progress. The monitor counts failures instead.
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=STARTS - 1),
            callbacks=cast(
                Any, [failures, ReportController(monitor)]
            ),  # its type names only callbacks of the public kind
            worker_runtime_env={"env_vars": _environment(gpus, spares=student.spares)},
        ),
    )


def _follow(training: Future[Any], config: WorkerConfig, stop: StopRequest, update: Update) -> None:
    """Until the training ends: show progress and warnings, look for ranks that hang, and pass on a request to stop.

    Also ask the canary again. Raises TeacherError if its answer is another one, Interrupted if the job is to stop and
    has no workers yet, which could save, and the failure of `stop`, such as RunTaken. Ray Train is then ended.
    """
    controller, canaries, view = None, _canaries(config), TrainingView(config.total_steps, update)
    try:
        while not wait([training], timeout=POLL_S).done:
            report = _report(config)
            controller = report.controller or controller
            view.show(report)
            if canaries and report.latest:
                canaries.poll(report.latest["step"])
            if stop.is_made:
                config.monitor.stop.remote()
                view.stopping()
            if stop.failure or (stop.is_made and controller and not report.has_begun):
                stop.check()
        view.show(_report(config))  # the last step may have ended since the last update
    except RayActorError:
        return  # the monitor died. The workers fail on it, and Ray Train's own error says so
    except BaseException:
        if controller:
            ray.kill(controller)
        raise


def _canaries(config: WorkerConfig) -> CanaryWatch | None:
    settings, pool = settings_of(config.spec), config.pool
    if settings is None or not settings.canary_every or config.canary is None or pool is None:
        return None
    store = CheckpointStore(config.run, config.spec.output.storage)
    return CanaryWatch(config.canary, settings.canary_every, lambda: RemotePending(pool.roster.remote(-1)), store)


def _report(config: WorkerConfig) -> Report:
    return cast(Report, ray.get(config.monitor.poll.remote(config.spec.training.collective_timeout_s)))


def _environment(gpus: float, *, spares: bool) -> dict[str, str]:
    """Return the environment variables of the workers' processes."""
    accelerator = {} if gpus else ON_CPU
    imports = importing("betakd_ray.train.loop") if spares else {}
    return WORKER_ENVIRONMENT | accelerator | loopback_environment() | imports


def _scratch(name: str) -> Path:
    """Return a new folder for Ray Train's own files; remove those of drivers that were killed."""
    folder = Path(os.environ.get("BETAKD_CACHE", Path.home() / ".cache" / "betakd")) / "ray-train"
    remove_abandoned(folder, "*")
    return folder / f"{name}-{os.urandom(4).hex()}"


def _raise_cause(config: WorkerConfig, *, is_failed: bool = False) -> None:
    """Raise the error that ended the training, if the monitor has one.

    Raises RayActorError if the teacher pool died, because no restart of the students can repair that.
    """
    failure = ray.get(config.monitor.failure.remote())
    if (failure or is_failed) and config.pool is not None:
        ray.get(config.pool.is_leasing.remote())  # raises if it died
    if failure:
        kind, message = failure
        raise getattr(errors, kind, TrainingError)(message)


def _failure(error: TrainingFailedError, spec: JobSpec) -> errors.BetaKDError:
    """Return what is raised instead of Ray Train's error."""
    cause = getattr(error, "controller_failure", None)
    if not isinstance(cause, WorkerGroupStartupTimeoutError):
        workers = getattr(error, "worker_failures", None)
        return TrainingError(f"{spec.name}: the student workers failed: {causes(workers) if workers else error}")
    return ClusterError(
        f"cluster.student: the cluster had no room for {cause.num_workers} students within cluster.start_timeout_s = "
        f"{spec.cluster.start_timeout_s:g}. Free now: {ray.available_resources()}. Wait for the other jobs, add nodes "
        "or lower training.workers, and run the job again to go on from the last checkpoint."
    )
