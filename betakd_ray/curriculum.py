"""Numbers of an energy that change during a job: ctkd's temperature T, and taid's position t from student to teacher.

Each is one number. It is equal on every rank, because only values reduced over all ranks change it. It is saved with
every checkpoint. It depends on the progress of the *job*, so a restart does not change it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from betakd_ray.spec import (
    CurriculumTemperature,
    Energy,
    InterpolationSchedule,
    TemperatureSchedule,
    TemporallyAdaptiveInterpolation,
)

Scalar = Float[Tensor, ""]


class Temperature(nn.Module):
    """T = start + range · sigmoid(θ), learned against the student: θ raises the loss that the student lowers (CTKD)."""

    def __init__(self, schedule: TemperatureSchedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.theta = nn.Parameter(torch.tensor(schedule.theta))

    def value(self) -> Scalar:
        """Return T, differentiable in θ."""
        return self.schedule.start + self.schedule.range * self.theta.sigmoid()


class Interpolation(nn.Module):
    """t of TAID, which is raised after each optimizer step.

    δ = (L_prev − L) / (L_prev + 1e-15),   m ← b·m + (1−b)·δ
    t ← min(t_end, max(t_0 + (t_end − t_0)·progress, t + a·sigmoid(m)·(1−t)))
    """

    t: Tensor
    momentum: Tensor
    previous: Tensor

    def __init__(self, schedule: InterpolationSchedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.register_buffer("t", torch.tensor(schedule.start))
        self.register_buffer("momentum", torch.tensor(0.0))
        self.register_buffer("previous", torch.tensor(math.nan))

    def value(self) -> Scalar:
        """Return t, which is constant within a step."""
        return self.t

    @torch.no_grad()
    def observe(self, loss: Scalar, progress: float) -> None:
        """Update t from the global batch's mean energy and job progress (0 to 1), without host synchronisation."""
        schedule = self.schedule
        # At the first step `previous` is NaN.
        change = torch.nan_to_num((self.previous - loss) / (self.previous + 1e-15), nan=0.0)
        self.momentum.lerp_(change, 1 - schedule.momentum)
        linear = schedule.start + (schedule.end - schedule.start) * progress
        risen = self.t + schedule.rate * self.momentum.sigmoid() * (1 - self.t)
        self.t.copy_(risen.clamp_min(linear).clamp_max(schedule.end))
        self.previous.copy_(loss)


class Curriculum(nn.Module):
    """Numbers of a job's energies that change during the job; most jobs have none."""

    def __init__(self, energies: Sequence[Energy]) -> None:
        super().__init__()
        self.moving = nn.ModuleDict()
        for energy in energies:
            if isinstance(energy, CurriculumTemperature):
                self.moving[energy.name] = Temperature(energy.schedule)
            elif isinstance(energy, TemporallyAdaptiveInterpolation):
                self.moving[energy.name] = Interpolation(energy.schedule)

    def values(self) -> dict[str, Scalar]:
        """Return the number of each stateful channel. A temperature is differentiable in θ."""
        return {name: cast(Temperature | Interpolation, module).value() for name, module in self.moving.items()}

    @torch.no_grad()
    def observe(self, energies: Mapping[str, Scalar], progress: float) -> None:
        """Update t of TAID after an applied step.

        `energies` are the mean energies over the global batch, equal on every rank.
        """
        for name, module in self.moving.items():
            if isinstance(module, Interpolation):
                module.observe(energies[name], progress)


def reversal(progress: float) -> float:
    """Return λ of ctkd's gradient reversal: 0 at the start of the job, −1 at its end, along a cosine."""
    return -0.5 * (1 - math.cos(math.pi * progress))
