"""Numbers of a log record: of each channel, and what the steps since the last record used."""

import resource
import sys
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from betakd_ray.models.flops import StudentFlops
from betakd_ray.train.agreement import TokenCounts
from betakd_ray.train.clock import PHASES, STALLS
from betakd_ray.train.micro_batches import Step
from betakd_ray.train.sums import Totals

QUANTILES = (0.1, 0.5, 0.9)
"""Quantiles of β over a global batch that are logged."""


def of_channels(
    totals: Totals,
    betas: Float[Tensor, "samples channels"],
    saturated: Float[Tensor, " channels"],
    channels: Sequence[str],
) -> dict[str, float]:
    """Return each channel's energy, its β · energy, and statistics of its β.

    `saturated` is the share of samples whose β is at a bound.
    """
    quantiles = betas.nanquantile(torch.tensor(QUANTILES, device=betas.device), dim=0)
    quantiles = quantiles.nan_to_num()  # zero, like the mean, for a channel that no sample has
    by_channel = {
        "energy": totals.energies,
        "weighted": totals.weighted,
        "beta": totals.beta,
        **{f"beta_p{round(100 * q)}": row for q, row in zip(QUANTILES, quantiles, strict=True)},
        "beta_saturated": saturated,
    }
    return {
        f"{kind}/{name}": value
        for kind, values in by_channel.items()
        for name, value in zip(channels, values.tolist(), strict=True)
    }


class Usage:
    """Sums over the steps since the last record: samples, tokens and teacher time."""

    def __init__(self) -> None:
        self.steps = self.samples = self.squares = self.pixels = 0
        self.tokens = TokenCounts()
        self.teacher_busy_s = 0.0
        """Seconds that teachers computed for this rank's samples."""

    def add(self, step: Step) -> None:
        """Add a step to the sums."""
        self.steps += 1
        self.samples += step.counts.samples
        self.squares += step.counts.squares
        self.pixels += step.counts.pixels
        self.tokens += step.counts.tokens
        self.teacher_busy_s += step.teacher_busy_s

    def rates(self, mean: dict[str, float], slowest: dict[str, float], ranks: int) -> dict[str, float]:
        """Return rates per second, shares of the time, and seconds per step.

        `mean` and `slowest` are the mean and the maximum over the ranks of each phase's seconds. `data_wait`,
        `teacher_wait` and `compute` are shares of the elapsed time of the ranks' training threads.
        """
        elapsed, tokens = mean["elapsed"], self.tokens
        every = tokens.real + tokens.padding
        record = {
            "samples_per_second": self.samples / elapsed,
            "tokens_per_second": tokens.real / elapsed,
            "answer_tokens_per_second": tokens.answer / elapsed,
            "tokens/prompt": tokens.prompt / self.steps,
            "tokens/image": tokens.image / self.steps,
            "tokens/answer": tokens.answer / self.steps,
            "tokens/padding": tokens.padding / self.steps,
            "padding_share": tokens.padding / max(every, 1),
            "data_wait": mean["data_wait"] / elapsed,
            "teacher_wait": mean["teacher_wait"] / elapsed,
            "teacher_busy": mean["teacher_busy"] * ranks / elapsed,
            "compute": (mean["forward_backward"] + mean["optimizer"]) / elapsed,
        }
        for phase in (*PHASES, *STALLS):
            record[f"time/{phase}"] = mean[phase] / self.steps
            record[f"time_max/{phase}"] = slowest[phase] / self.steps
        return record

    def flops(self, count: StudentFlops) -> float:
        """Return the FLOPs of the student's forward and backward passes."""
        tokens = self.tokens
        return count.step(tokens.real, self.squares, tokens.answer, tokens.image, self.pixels)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the tensors on a GPU, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # ru_maxrss is in bytes on macOS and in KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
