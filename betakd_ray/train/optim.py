"""Optimizers and learning-rate schedules of a spec."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from betakd_ray.curriculum import reversal
from betakd_ray.engine.config import is_plain
from betakd_ray.models.vlm import part_parameters
from betakd_ray.spec import JobSpec, OptimizerSpec
from betakd_ray.train.distiller import Distiller


class GuardedAdamW(AdamW):
    """AdamW that clips gradients, and changes nothing if a gradient is not finite.

    DeepSpeed's ZeRO and bf16 optimizers do both themselves. This class gives the plain float32 engine (stage 0) the
    same behaviour, through the attributes that the engine reads after a step. At stage 0 every rank has the whole
    reduced gradient, so all ranks decide alike.
    """

    overflow = False
    _global_grad_norm: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], *, max_grad_norm: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self._max_grad_norm = max_grad_norm

    def step(self, closure: Any = None) -> Any:
        """Make one update; or none, and set `overflow`, if a gradient is not finite."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._global_grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        self.overflow = not self._global_grad_norm.isfinite()
        return None if self.overflow else super().step(closure)


def student_optimizer(distiller: Distiller, spec: JobSpec) -> AdamW:
    """Return AdamW over the trained parameters.

    It has one group for the projector and the maps from the teacher, and one for the other parameters.
    """
    optimizer = spec.optimizer
    projector = [*part_parameters(distiller.student)["projector"], *distiller.maps.parameters()]
    own = {id(parameter) for parameter in projector}
    learning = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learning if id(p) not in own], "lr": optimizer.lr},
        {"params": [p for p in learning if id(p) in own], "lr": optimizer.projector_lr or optimizer.lr},
    ]
    groups = [group for group in groups if group["params"]]
    # Fused: one pass over the memory, whose bandwidth limits Adam; four times as fast on a CPU.
    options: dict[str, Any] = {"betas": optimizer.adam_betas, "weight_decay": optimizer.weight_decay, "fused": True}
    if is_plain(spec):
        return GuardedAdamW(groups, max_grad_norm=optimizer.max_grad_norm, **options)
    return AdamW(groups, **options)


def schedule(optimizer: torch.optim.Optimizer, spec: OptimizerSpec, total_steps: int) -> LambdaLR:
    """Return the schedule: linear warm-up, then the spec's decay, which ends at `total_steps`."""
    return LambdaLR(optimizer, _factor(spec, total_steps))


def _factor(spec: OptimizerSpec, total_steps: int) -> Callable[[int], float]:
    warmup = math.ceil(spec.warmup_fraction * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[
            spec.schedule
        ]

    return factor


class BetaOptimizer:
    """AdamW over the parameters that DeepSpeed does not have: β's, and ctkd's θ.

    It works in float32, with its own learning rate and no weight decay. Gradients are summed over the ranks.
    """

    def __init__(self, weighting: nn.Module, curriculum: nn.Module, spec: OptimizerSpec, total_steps: int) -> None:
        self._beta = [parameter for parameter in weighting.parameters() if parameter.numel()]
        theta = list(curriculum.parameters())
        # θ climbs the loss, more strongly as the job goes on. Adam divides out the scale of a gradient, so θ's learning
        # rate grows instead.
        groups = [(self._beta, _factor(spec, total_steps)), (theta, lambda step: -reversal(step / total_steps))]
        groups = [(parameters, factor) for parameters, factor in groups if parameters]
        self._parameters = self._beta + theta
        self._max_grad_norm = spec.max_grad_norm
        self._adam = AdamW(
            [{"params": parameters} for parameters, _ in groups],
            lr=spec.beta_lr,
            betas=spec.adam_betas,
            weight_decay=0.0,
        )
        self._schedule = LambdaLR(self._adam, [factor for _, factor in groups])

    def step(self, apply: bool) -> None:
        """Make one update. If `apply` is false (the student's step was skipped), drop the gradients. Collective."""
        if apply:
            for parameter in self._parameters:
                # A sum, not a mean: each rank's loss is already its share of the global mean.
                dist.all_reduce(parameter.grad)
            torch.nn.utils.clip_grad_norm_(self._beta, self._max_grad_norm)
            self._adam.step()
            self._schedule.step()
        # Zeros and not None: `all_reduce` needs a tensor on every rank, also where a parameter got no gradient.
        self._adam.zero_grad(set_to_none=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"adam": self._adam.state_dict(), "schedule": self._schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self._adam.load_state_dict(state["adam"])
        self._schedule.load_state_dict(state["schedule"])


def beta_optimizer(
    weighting: nn.Module, curriculum: nn.Module, spec: OptimizerSpec, total_steps: int
) -> BetaOptimizer | None:
    """Return the optimizer of β and θ; None if DeepSpeed has all the trained parameters."""
    learns = any(parameter.numel() for module in (weighting, curriculum) for parameter in module.parameters())
    return BetaOptimizer(weighting, curriculum, spec, total_steps) if learns else None
