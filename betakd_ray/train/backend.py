"""What Ray Train's controller runs of ours: it chooses the workers' process group, and tells of their deaths.

Apart from `job`, so that the controller, which every job waits for, loads none of what a job is checked with.
"""

from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


@dataclass
class FoundTorchConfig(TorchConfig):
    """NCCL where the workers have GPUs that torch can use, else gloo: also for logical GPUs. It is found on a worker,
    as the driver's machine may have no GPU."""

    @property
    def backend_cls(self) -> type["FoundTorchBackend"]:
        return FoundTorchBackend


class FoundTorchBackend(_TorchBackend):
    """Asks the first worker what it has; all have the same."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        has_gpu = worker_group.execute_single(0, torch.cuda.is_available)
        super().on_start(worker_group, replace(backend_config, backend="nccl" if has_gpu else "gloo"))


class Deaths(ray.train.UserCallback):
    """Tells the monitor when the workers die, and of what."""

    def __init__(self, monitor: ActorHandle) -> None:
        self._monitor = monitor

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train before it restarts the workers."""
        ray.get(self._monitor.workers_died.remote(causes(worker_exceptions)))


def causes(failures: dict[int, Exception]) -> str:
    """Return the causes of the workers' deaths in one line."""
    return "; ".join(f"rank {rank}: {failure}" for rank, failure in failures.items())
