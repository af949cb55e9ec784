"""Sums over a global batch: kept on the device, all-reduced once per step, read by the host when a step is logged."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Totals:
    """Means over a global batch. They are equal on every rank, and still on the device."""

    loss: Float[Tensor, ""]
    energies: Float[Tensor, " channels"]
    """Mean of ℓ of each channel over the samples that have it. `objective.reduction` sets the samples' weights."""
    weighted: Float[Tensor, " channels"]
    """Mean of β·ℓ with the same weights."""
    beta: Float[Tensor, " channels"]
    """Mean of β with the same weights."""
    statistics: Float[Tensor, " statistics"]
    """Mean of each of the objective's `measures` over the valid samples."""
    applied: bool
    """False if the step was skipped because a gradient was not finite."""


class StepSums:
    """Sums over the micro-batches of one step on this rank."""

    def __init__(self, channels: int, statistics: int, device: torch.device) -> None:
        self._channels = channels
        self._statistics_count = statistics
        self._device = device
        self.clear(0)

    def clear(self, most_samples: int) -> None:
        """Start the next step. No rank has more than `most_samples` samples in it."""
        self._most_samples = most_samples
        self._sums = torch.zeros(4, self._channels, device=self._device)
        self._loss = torch.zeros((), device=self._device)
        self._statistics = torch.zeros(self._statistics_count + 1, device=self._device)
        self._betas: list[Tensor] = []

    def add(
        self,
        energies: Float[Tensor, "batch channels"],
        beta: Float[Tensor, "batch channels"],
        present: Bool[Tensor, "batch channels"],
        share: Float[Tensor, " batch"],
        loss: Float[Tensor, ""],
        statistics: Float[Tensor, "batch statistics"] | None,
    ) -> None:
        """Add a micro-batch. `share` is each sample's weight in the global mean; `loss` is the weighted sum."""
        here = torch.where(present, share[:, None], 0.0)
        self._sums += torch.stack(
            [part.sum(0) for part in (energies * here, energies * beta * here, beta * here, here)]
        )
        self._loss += loss
        if statistics is not None:
            valid = here.amax(dim=1)
            self._statistics += torch.cat([(statistics * valid[:, None]).sum(0), valid.sum()[None]])
            # NaN marks a missing channel, and `nanquantile` leaves it out. A zero would count as a β.
            self._betas.append(torch.where(present, beta, math.nan))

    def reduced(self, applied: bool) -> Totals:
        """Return the means over the global batch, without a copy to the host. Collective."""
        # One all-reduce for all sums, because each one has a fixed latency.
        flat = torch.cat([self._sums.flatten(), self._loss[None], self._statistics])
        dist.all_reduce(flat)
        sums = flat[: self._sums.numel()].view_as(self._sums)
        statistics = flat[self._sums.numel() + 1 :]
        energies, weighted, beta = sums[:3] / _divisor(sums[3])
        loss = flat[self._sums.numel()]
        return Totals(loss, energies, weighted, beta, statistics[:-1] / _divisor(statistics[-1]), applied)

    def betas(self) -> Float[Tensor, "samples channels"]:
        """Return β of every sample of the global batch [samples, channels]. Collective.

        It is NaN if a sample lacks the channel, and in rows of padding. Call it only after a step with statistics.
        """
        # Padded to the same number of rows on every rank, because all_gather needs equal shapes.
        mine = torch.full((self._most_samples, self._channels), math.nan, device=self._device)
        known = torch.cat(self._betas)[: self._most_samples]  # the rest are placeholders
        mine[: len(known)] = known
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        return torch.cat(everyone)


def _divisor(shares: Tensor) -> Tensor:
    """Return the divisors of the sums: 1 if no sample has the channel, which prevents 0/0."""
    return torch.where(shares > 0, shares, 1.0)
