"""Steps of the real learner without Ray, in separate processes, because DeepSpeed keeps global state in a process."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from betakd_ray.batch.packing import stack
from betakd_ray.batch.sample import Rendering, Sample
from betakd_ray.data.render import Renderer
from betakd_ray.data.samples import RawSample
from betakd_ray.engine.compiled import load_collective
from betakd_ray.job import BetaKDJob
from betakd_ray.spec import JobSpec
from betakd_ray.teacher.parts import Needs, Signal, TeacherFacts
from betakd_ray.teacher.scorer import TeacherScorer
from betakd_ray.train.agreement import Proposal, StepCounts, TokenCounts, gather_over, shares
from betakd_ray.train.learner import Learner
from betakd_ray.train.micro_batches import Collator, MicroBatch
from betakd_ray.train.sums import Totals
from tests.nodes import free_port


def on_this_machine(patch: pytest.MonkeyPatch, ranks: int) -> None:
    """Set the variables from which DeepSpeed makes the names of its shared memory.

    Two groups with the same name would add up each other's gradients.
    """
    patch.setenv("LOCAL_SIZE", str(ranks))
    patch.setenv("MASTER_ADDR", "127.0.0.1")
    patch.setenv("MASTER_PORT", str(free_port()))


def spawned(work: Callable[..., Any], folder: Path, *arguments: Any, ranks: int = 1) -> Any:
    """Run `work(*arguments)` in `ranks` processes, which meet through a file in `folder`; return rank 0's result."""
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
    load_collective()
    found = work(*arguments)
    if rank == 0:
        torch.save(found, store.with_suffix(".pt"))
    dist.destroy_process_group()


@dataclass(frozen=True)
class Part:
    """One rank's micro-batches of a global batch, and the counts over all ranks."""

    batches: list[MicroBatch]
    counts: StepCounts

    @classmethod
    def of(cls, learner: Learner, collator: Collator, samples: Sequence[tuple[Sample, Signal]]) -> "Part":
        """Return this rank's share of the global batch `samples`. Collective: every rank passes the whole batch."""
        sizes = shares(len(samples), learner.world_size, step=1)
        start = sum(sizes[: learner.rank])
        batches = collator.micro_batches(samples[start : start + sizes[learner.rank]])
        proposal = Proposal(
            taken=sizes[learner.rank],
            valid=sizes[learner.rank],
            micro_batches=len(batches),
            tokens=TokenCounts(answer=sum(len(batch.inputs.targets) for batch in batches)),
        )
        counts = StepCounts.of(gather_over(learner.feed_group)(proposal.vector()))
        return cls([*batches, *[collator.empty()] * (counts.micro_batches - len(batches))], counts)

    def step(self, learner: Learner, number: int, progress: float, *, statistics: bool = False) -> Totals:
        """Run one step on this part (a collective call)."""
        return learner.step(map(learner.loader, self.batches), self.counts, number, progress, statistics=statistics)


def sample_of(number: int, student: Rendering, teacher: Rendering | None = None) -> Sample:
    """Return a sample with this number, in shard 0."""
    return Sample(0, 0, number, number, str(number), student, teacher or student)


def collator_of(spec: JobSpec, renderer: Renderer, needs: Needs, facts: TeacherFacts | None) -> Collator:
    """Return a collator with the settings that a worker uses."""
    limits = (spec.training.micro_batch_samples, spec.training.micro_batch_tokens)
    return Collator(renderer.pad_token_id, renderer.image_token_id, needs, facts, *limits)


@dataclass(frozen=True)
class Study:
    """A learner, and one global batch on which it can run any number of steps."""

    learner: Learner
    part: Part

    @classmethod
    def of(cls, spec: JobSpec, samples: Sequence[RawSample]) -> "Study":
        """Build a learner; the global batch is `samples`, of which each rank takes its part."""
        job = BetaKDJob(spec)
        renderers = job.renderers()
        student = renderers["student"]
        view = renderers.get("teacher", student)
        seen = [view.render(sample) for sample in samples]
        needs, facts, head = Needs(), None, None
        signals: list[Signal] = [{} for _ in samples]
        if spec.teacher:
            needs = job.needs(spec.teacher)
            teacher = TeacherScorer(spec.teacher, needs)
            facts, head = teacher.facts(), teacher.head()
            answer = teacher.score(stack(seen, view.pad_token_id, view.image_token_id))
            signals = [signal for signal in answer.signals() if signal is not None]
        learner = Learner(spec, facts, 100, head)
        made = [sample_of(at, student.render(one), seen[at]) for at, one in enumerate(samples)]
        collator = collator_of(spec, student, needs, facts)
        return cls(learner, Part.of(learner, collator, list(zip(made, signals, strict=True))))

    def steps(self, count: int) -> list[float]:
        """Run `count` steps and return the loss of each."""
        losses = []
        for number in range(1, count + 1):
            totals = self.part.step(self.learner, number, 0.5)
            assert totals.applied
            losses.append(totals.loss.item())
        return losses
