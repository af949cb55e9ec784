"""Code that Ray Train's controller runs: the choice of the workers' process group, and the report of their failures.

It is not in `job`, because every job waits until the controller has started: it must not load what only checks a job.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.train.torch import TorchConfig, config
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client

from betakd_ray.engine.collectives import store_on_loopback
from betakd_ray.on_ray.local import is_on_loopback

# With workers of {min, max}, a controller reserves resources for so long, and renews that every 20 s. The reservation
# of a killed driver stands in the way of its successor; Ray's own 180 s would be three minutes without a student.
autoscaling_coordinator_client.AUTOSCALING_REQUESTS_EXPIRE_TIME_S = 60


START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
LOOK_INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
LOOKS_PER_S = 512
"""Largest number of workers that a controller asks for their health in a second."""
LOOK_EVERY_S = 0.25
"""Seconds between two looks at all workers, if there are few. Ray's default of 2 s is lost after each death."""


@dataclass
class FoundTorchConfig(TorchConfig):
    """Process group config: NCCL if torch can use a GPU on the workers, otherwise gloo (also for logical GPUs).

    A worker is asked, because the driver's machine may have no GPU.
    """

    @property
    def backend_cls(self) -> type["FoundTorchBackend"]:
        return FoundTorchBackend


class FoundTorchBackend(_TorchBackend):
    """Torch backend that asks the first worker whether it has a GPU; all workers are alike."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        has_gpu = worker_group.execute_single(0, torch.cuda.is_available)
        chosen = replace(backend_config, backend="nccl" if has_gpu else "gloo")
        with _store_on_loopback() if is_on_loopback() else nullcontext():
            super().on_start(worker_group, chosen)


@contextmanager
def _store_on_loopback() -> Iterator[None]:
    """Let `on_start` in the block ask the first worker for a store that listens on loopback alone.

    Otherwise it asks for a free port, where torch then starts a store that listens on all interfaces.
    """
    names = config.__dict__
    before = names["get_address_and_port"]
    names["get_address_and_port"] = store_on_loopback
    try:
        yield
    finally:
        names["get_address_and_port"] = before


class ReportFailures(ray.train.UserCallback):
    """Callback that tells the monitor when workers failed, and why. `start_timeout_s` limits each start of workers."""

    def __init__(self, monitor: ActorHandle, start_timeout_s: float, workers: int) -> None:
        self._monitor = monitor
        self._start_timeout_s = start_timeout_s
        self._look_every_s = max(LOOK_EVERY_S, workers / LOOKS_PER_S)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in the controller's process, and set its limit and its interval there.

        Ray Train reads them only from the environment. That of the driver would not do: jobs of a sweep share it.
        """
        self.__dict__ = state
        os.environ[START_TIMEOUT] = str(self._start_timeout_s)
        os.environ.setdefault(LOOK_INTERVAL, str(self._look_every_s))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Report the workers' errors. Ray Train calls this before it restarts the workers."""
        # Waited for: the next workers ask the monitor first whether the job has failed too often.
        ray.get(self._monitor.workers_died.remote(causes(worker_exceptions)))


class ReportController(ControllerCallback):
    """Callback that tells the monitor which actor Ray Train's controller is. Ray Train does not tell the driver."""

    def __init__(self, monitor: ActorHandle) -> None:
        self._monitor = monitor

    def after_controller_start(self, train_run_context: Any) -> None:
        """Report this process. Ray Train calls this once, before it looks for places for the workers."""
        ray.get(self._monitor.controlled_by.remote(ray.get_runtime_context().current_actor))


def causes(failures: dict[int, Exception]) -> str:
    """Return the workers' errors in one line. `failures` maps a rank to its error."""
    return "; ".join(f"rank {rank}: {failure}" for rank, failure in failures.items())
