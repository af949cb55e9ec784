"""Share of padding in a micro-batch: `python -m benchmarks.padding`, a few seconds.

The lengths are like those of an instruction mix: log-normal, from 40 to 900 tokens. Before: neighbours of the stream,
padded to the longest of them. After: a rank's share of a step, cut by `batch.packing`. Both have the same number of
tokens per micro-batch.
"""

from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from betakd_ray.batch.packing import cut

BUDGETS, SHARES = (2048, 4096, 8192), (32, 64, 128, 256)
Cut = Callable[[list[int], int], list[list[int]]]


def mix(samples: int, seed: int = 0) -> list[int]:
    """Return the lengths of `samples` samples, in tokens."""
    drawn = np.exp(np.random.default_rng(seed).normal(5.2, 0.8, 2 * samples)).astype(int)
    return drawn[(drawn >= 40) & (drawn <= 900)][:samples].tolist()


def neighbours(lengths: list[int], budget: int) -> list[list[int]]:
    """Return micro-batches of neighbours in the stream; their number has `budget` tokens on average."""
    size = max(1, int(budget / np.mean(lengths)))
    return [list(range(at, min(at + size, len(lengths)))) for at in range(0, len(lengths), size)]


def alike(lengths: list[int], budget: int) -> list[list[int]]:
    """Return micro-batches of similar lengths."""
    return cut(lengths, max_tokens=budget)


def measure(lengths: list[int], share: int, budget: int, made: Cut) -> tuple[float, float]:
    """Return the share of padding (0 to 1), and the mean number of micro-batches per step."""
    padded = batches = steps = real = 0
    for start in range(0, len(lengths) - share + 1, share):
        part = lengths[start : start + share]
        found = made(part, budget)
        padded += sum(max(part[at] for at in batch) * len(batch) for batch in found)
        real, batches, steps = real + sum(part), batches + len(found), steps + 1
    return 1 - real / padded, batches / steps


def main(*, miniature: bool = False) -> None:
    """Print both methods for several shares of a step and sizes of micro-batches."""
    lengths = mix(2_000 if miniature else 50_000)
    table = Table("samples a step", "tokens a micro-batch", "padding before", "after", "micro-batches before", "after")
    for share in SHARES:
        for budget in BUDGETS:
            before, after = (measure(lengths, share, budget, made) for made in (neighbours, alike))
            padding, batches = (
                (f"{each[0]:.1%}" for each in (before, after)),
                (f"{each[1]:.1f}" for each in (before, after)),
            )
            table.add_row(f"{share}", f"{budget}", *padding, *batches)
    Console().print(table)


if __name__ == "__main__":
    main()
