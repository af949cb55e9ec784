"""The student workers' process group; its backend is found on a worker, as the driver's machine may have no GPU."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


@dataclass
class FoundTorchConfig(TorchConfig):
    """NCCL where the workers have GPUs that torch can use, else gloo: also for logical GPUs."""

    @property
    def backend_cls(self) -> type["FoundTorchBackend"]:
        return FoundTorchBackend


class FoundTorchBackend(_TorchBackend):
    """Asks the first worker what it has; all have the same."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        has_gpu = worker_group.execute_single(0, torch.cuda.is_available)
        super().on_start(worker_group, replace(backend_config, backend="nccl" if has_gpu else "gloo"))
