"""Functions run on several ranks, in processes with few imports, for tests with a process group and no model."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(work: Callable[..., Any], folder: Path, *arguments: Any, ranks: int) -> list[Any]:
    """Run `work(*arguments)` on every rank and return all results; the ranks meet through a file in `folder`."""
    store = folder / f"group-{work.__name__}"
    mp.spawn(_rank, (ranks, store, work, arguments), nprocs=ranks)
    return [torch.load(f"{store}-{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, ranks: int, store: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.save(work(*arguments), f"{store}-{rank}.pt")
    dist.destroy_process_group()
