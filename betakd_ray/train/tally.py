"""Sums over a global batch: kept on the device, reduced over ranks once a step, read by the host on logging steps."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Totals:
    """A global batch, reduced. Alike on every rank; still on the device."""

    loss: Float[Tensor, ""]
    energies: Float[Tensor, " channels"]
    """Mean of each channel over the samples that have it, each counted as `objective.reduction` does."""
    weighted: Float[Tensor, " channels"]
    """Mean of β·ℓ likewise."""
    beta: Float[Tensor, " channels"]
    """Mean of β likewise."""
    statistics: Float[Tensor, " statistics"]
    applied: bool
    """False for a step that was skipped, because a gradient was not finite."""


class Tally:
    """One step's sums on this rank."""

    def __init__(self, channels: int, statistics: int, device: torch.device) -> None:
        self._channels = channels
        self._statistics_count = statistics
        self._device = device
        self.clear(0)

    def clear(self, most_samples: int) -> None:
        """Start the next step, of which no rank has more than `most_samples` samples."""
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
        """A micro-batch. `share` is each sample's part of the global mean, and `loss` the sum of what they have."""
        here = torch.where(present, share[:, None], 0.0)
        self._sums += torch.stack(
            [part.sum(0) for part in (energies * here, energies * beta * here, beta * here, here)]
        )
        self._loss += loss
        if statistics is not None:
            valid = here.amax(dim=1)
            self._statistics += torch.cat([(statistics * valid[:, None]).sum(0), valid.sum()[None]])
            self._betas.append(torch.where(present, beta, math.nan))

    def reduced(self, applied: bool) -> Totals:
        """Collective: the global batch's means. Moves nothing to the host."""
        flat = torch.cat([self._sums.flatten(), self._loss[None], self._statistics])
        dist.all_reduce(flat)
        sums = flat[: self._sums.numel()].view_as(self._sums)
        statistics = flat[self._sums.numel() + 1 :]
        energies, weighted, beta = sums[:3] / _divisor(sums[3])
        loss = flat[self._sums.numel()]
        return Totals(loss, energies, weighted, beta, statistics[:-1] / _divisor(statistics[-1]), applied)

    def betas(self) -> Float[Tensor, "samples channels"]:
        """Collective: β of every sample of the global batch, NaN where it lacks the channel, and in rows that fill up.

        Only on steps that gathered statistics.
        """
        mine = torch.full((self._most_samples, self._channels), math.nan, device=self._device)
        known = torch.cat(self._betas)[: self._most_samples]  # beyond them there are only stand-ins
        mine[: len(known)] = known
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        return torch.cat(everyone)


def _divisor(shares: Tensor) -> Tensor:
    """What sums are divided by: 1 where nobody had a part in them."""
    return torch.where(shares > 0, shares, 1.0)
