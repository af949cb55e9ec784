"""The student workers as Ray Train runs them, seen from the driver."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from betakd_ray import errors
from betakd_ray.errors import ClusterError, TrainingError
from betakd_ray.on_ray.backend import FoundTorchConfig, ReportFailures, causes
from betakd_ray.on_ray.cluster import gpus_each
from betakd_ray.on_ray.source import SplitOnce, rows
from betakd_ray.progress import progress_line
from betakd_ray.spec import JobSpec
from betakd_ray.train.config import WorkerConfig
from betakd_ray.train.worker import train_worker

STARTS = 4
"""Number of times that Ray Train tries to place the students. Together they take `cluster.start_timeout_s`."""
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


def train_students(config: WorkerConfig, reader: "ray.ObjectRef") -> dict[str, Any]:
    """Train on the cluster's students until the job ends or is to stop; return rank 0's outcome.

    `reader` is the data's `Reader`. Raises ClusterError if the students find no place in time, RayActorError if the
    teachers' pool died, and the error that ended the training as a TrainingError or UserError.
    """
    spec = config.spec
    gpus = gpus_each(spec.cluster.student.gpus)
    student, workers = spec.cluster.student, spec.training.workers
    resources = {"CPU": student.cpus, **student.resources} | ({"GPU": gpus} if gpus else {})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"worker": config},
        datasets={"train": partial(rows, reader, spec, config.run, config.plan, config.monitor)},
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
            name=f"{spec.name}-{os.urandom(4).hex()}",
            storage_path=_scratch(),
            # Unlimited, because Ray does not reset its count on progress. The monitor counts failures instead.
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=STARTS - 1),
            callbacks=[ReportFailures(config.monitor, spec.cluster.start_timeout_s / STARTS)],
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT | _accelerator(gpus)},
        ),
    )
    try:
        outcome = trainer.fit().return_value or {}
    except TrainingFailedError as error:
        _raise_cause(config, is_failed=True)
        raise _failure(error, spec) from error
    # Also without an error of Ray Train's: workers that find a failure noted in the monitor end as if all were well.
    _raise_cause(config)
    return outcome


@contextmanager
def show_progress(monitor: ActorHandle, total_steps: int, spec: JobSpec) -> Iterator[None]:
    """Show a progress line on the driver's terminal, with the monitor's newest metrics; look for ranks that hang."""
    stop = threading.Event()
    with progress_line(spec.name, total_steps, "starting", is_shown=spec.tracking.progress) as update:

        def show() -> None:
            latest = cast(dict[str, Any], ray.get(monitor.poll.remote(spec.training.collective_timeout_s)))
            if latest:
                numbers = f"loss {latest['loss']:.4f} · {latest['samples_per_second']:.0f} samples/s"
                update(completed=latest["step"], numbers=numbers)

        def follow() -> None:
            while not stop.wait(1.0):
                show()

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
            show()  # the last step may have ended since the last update
        finally:
            stop.set()
            follower.join(timeout=5)


def _accelerator(gpus: float) -> dict[str, str]:
    return {} if gpus else ON_CPU


def _scratch() -> str:
    folder = Path(os.environ.get("BETAKD_CACHE", Path.home() / ".cache" / "betakd")) / "ray-train"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


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
