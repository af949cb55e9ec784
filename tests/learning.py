"""Steps of the real learner, without Ray: in processes of their own, as DeepSpeed keeps what it once set up."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from betakd_ray.batch.packing import stack
from betakd_ray.data.ledger import SampleIds
from betakd_ray.data.rows import Batch
from betakd_ray.data.shards import RawSample
from betakd_ray.job import BetaKDJob
from betakd_ray.spec import JobSpec
from betakd_ray.teacher.scorer import TeacherScorer
from betakd_ray.teacher.signal import TeacherFacts
from betakd_ray.train.learner import Learner, Window
from tests.nodes import free_port


def on_this_machine(patch: pytest.MonkeyPatch, ranks: int) -> None:
    """DeepSpeed names shared memory by these: two groups of one name would add up each other's gradients."""
    patch.setenv("LOCAL_SIZE", str(ranks))
    patch.setenv("MASTER_ADDR", "127.0.0.1")
    patch.setenv("MASTER_PORT", str(free_port()))


def spawned(work: Callable[..., Any], folder: Path, *arguments: Any, ranks: int = 1) -> Any:
    """What `work(*arguments)` returns on rank 0 of so many processes; `folder` is for their agreement."""
    with pytest.MonkeyPatch.context() as patch:
        on_this_machine(patch, ranks)
        store = folder / f"store-{work.__name__}-{ranks}"
        mp.spawn(_rank, (ranks, store, work, arguments), nprocs=ranks)
        left = [*Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*")]
    assert not left, "shared memory outlives the learner"
    return torch.load(store.with_suffix(".pt"), weights_only=False)


def _rank(rank: int, ranks: int, store: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    found = work(*arguments)
    if rank == 0:
        torch.save(found, store.with_suffix(".pt"))
    dist.destroy_process_group()


@dataclass(frozen=True)
class Study:
    """A learner, and one global batch that it can go over again and again."""

    learner: Learner
    window: Window

    @classmethod
    def of(cls, spec: JobSpec, samples: Sequence[RawSample]) -> "Study":
        """`samples` are the global batch; each rank takes its part of them."""
        job = BetaKDJob(spec)
        renderers = job.renderers()
        teacher, facts = None, None
        if spec.teacher:
            teacher = TeacherScorer(spec.teacher, job.needs(spec.teacher))
            facts: TeacherFacts | None = teacher.facts()
        micro, ranks = spec.training.micro_batch_size, dist.get_world_size()
        window: Window = []
        for start in range(dist.get_rank() * micro, len(samples), micro * ranks):
            piece = samples[start : start + micro]
            views = {
                name: stack(list(map(each.render, piece)), each.pad_token_id, each.image_token_id)
                for name, each in renderers.items()
            }
            seen = views.get("teacher", views["student"])
            nowhere = np.zeros(len(piece), np.int32)
            batch = Batch(views["student"], seen, SampleIds(nowhere, nowhere, nowhere), [])
            window.append((batch, teacher.score(seen) if teacher else None))
        return cls(Learner(spec, facts, total_steps=100), window)

    def steps(self, count: int) -> list[float]:
        """The loss of each of so many steps."""
        losses = []
        for _ in range(count):
            counts = self.learner.agree(self.window)
            assert counts
            totals = self.learner.step(self.window, counts, 0.5, statistics=False)
            assert totals.applied
            losses.append(totals.loss.item())
        return losses
