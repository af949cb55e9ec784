"""What changes in an energy as the job goes on: ctkd's temperature, taid's place between student and teacher.

Each is one number, alike on every rank because only reduced numbers move it, saved with every checkpoint, and driven by
the progress of the *job*, so that a restart changes nothing.
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

KNOBS = {"ctkd": "temperature", "taid": "t"}
"""The argument of each stateful energy that moves."""
LEARNED = frozenset({"ctkd"})
"""Energies whose schedule value is learned by gradient."""


class Temperature(nn.Module):
    """T = start + range · sigmoid(θ), for an adversary: θ climbs the loss that the student descends (CTKD)."""

    def __init__(self, schedule: TemperatureSchedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.theta = nn.Parameter(torch.tensor(schedule.theta))

    def value(self) -> Scalar:
        """T, differentiable in θ."""
        return self.schedule.start + self.schedule.range * self.theta.sigmoid()


class Interpolation(nn.Module):
    """t of TAID, raised after each optimizer step:

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
        """t, a constant of the step."""
        return self.t

    @torch.no_grad()
    def observe(self, loss: Scalar, progress: float) -> None:
        """Move on, given the global batch's mean energy and the job's progress from 0 to 1. No host synchronisation."""
        schedule = self.schedule
        change = torch.nan_to_num((self.previous - loss) / (self.previous + 1e-15), nan=0.0)  # the first has no before
        self.momentum.lerp_(change, 1 - schedule.momentum)
        linear = schedule.start + (schedule.end - schedule.start) * progress
        risen = self.t + schedule.rate * self.momentum.sigmoid() * (1 - self.t)
        self.t.copy_(risen.clamp_min(linear).clamp_max(schedule.end))
        self.previous.copy_(loss)


class Curriculum(nn.Module):
    """The moving numbers of a job's energies; empty for most jobs."""

    def __init__(self, energies: Sequence[Energy]) -> None:
        super().__init__()
        self.moving = nn.ModuleDict()
        for energy in energies:
            if isinstance(energy, CurriculumTemperature):
                self.moving[energy.kind] = Temperature(energy.schedule)
            elif isinstance(energy, TemporallyAdaptiveInterpolation):
                self.moving[energy.kind] = Interpolation(energy.schedule)

    def values(self) -> dict[str, Scalar]:
        """Each stateful channel's number; a temperature's carries a gradient to θ."""
        return {name: cast(Temperature | Interpolation, module).value() for name, module in self.moving.items()}

    @torch.no_grad()
    def observe(self, energies: Mapping[str, Scalar], progress: float) -> None:
        """Tell an applied step's mean energies over the global batch, alike on every rank."""
        for name, module in self.moving.items():
            if isinstance(module, Interpolation):
                module.observe(energies[name], progress)


def reversal(progress: float) -> float:
    """λ of ctkd's gradient reversal: 0 at the start of the job, −1 at its end, on a cosine."""
    return -0.5 * (1 - math.cos(math.pi * progress))
