"""One rank's student: models, optimizers and β, from a step's micro-batches to one optimizer step. Knows no Ray."""

import os
import random
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from betakd_ray.batch.inputs import TensorInputs
from betakd_ray.curriculum import Curriculum, reversal
from betakd_ray.models.device import find_device
from betakd_ray.models.flops import StudentFlops, device_peak
from betakd_ray.models.student import build_student, student_processor
from betakd_ray.models.vlm import with_attention_weights
from betakd_ray.spec import AlignTopK, JobSpec
from betakd_ray.teacher.parts import TeacherFacts, to_tensor
from betakd_ray.train import checkpoint
from betakd_ray.train.agreement import StepCounts
from betakd_ray.train.clock import StepClock
from betakd_ray.train.distiller import ATTENTION, Distilled, Distiller
from betakd_ray.train.optim import beta_optimizer, deepspeed_config, schedule, student_optimizer
from betakd_ray.train.prefetch import DeviceBatch, Loader
from betakd_ray.train.tally import Tally, Totals
from betakd_ray.train.unpickling import pickle_stages_by_value, tensors_only
from betakd_ray.weighting import BetaWeighting, present_channels

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
else:
    DeepSpeedEngine = Any  # imported only where something trains: it takes seconds, and greets on the terminal

FOREVER = timedelta(days=365)
"""Limit of collectives that may wait for a teacher or a store. A rank that is gone is found by `watch`."""


class Learner:
    """Needs a process group. Every method named collective must be called by all ranks alike."""

    def __init__(
        self,
        spec: JobSpec,
        facts: TeacherFacts | None,
        total_steps: int,
        teacher_head: NDArray[Any] | None = None,
    ) -> None:
        self.spec = spec
        self.device = find_device()
        self.peak_flops = device_peak(self.device)
        self.flops: StudentFlops | None = None
        """What a step takes; where the device's peak is known, with which it is compared."""
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        _seed(spec.training.seed)
        self.distiller = self._distiller(facts, teacher_head)
        self.engine = self._engine(total_steps)
        _bound_collectives(timedelta(seconds=spec.training.collective_timeout_s))
        # What is known on the host is agreed on there, without waiting for the device, and with patience: a checkpoint
        # takes as long as its slowest rank. The feed's group is for its own thread: it must meet no other collective.
        self.host_group, self.feed_group = (
            cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=FOREVER)) for _ in range(2)
        )
        self._unname_shared_memory()
        self.weighting = BetaWeighting(
            spec.objective.weighting,
            spec.objective.channels,
            ce=spec.objective.ce,
            feature_sizes=facts.feature_sizes if facts else None,
        ).to(self.device)
        self.curriculum = Curriculum(spec.objective.energies).to(self.device)
        self.beta_optimizer = beta_optimizer(self.weighting, self.curriculum, spec.optimizer, total_steps)
        self.tally = Tally(len(self.channels), len(self.distiller.rows.measures), self.device)

    @property
    def channels(self) -> tuple[str, ...]:
        return self.distiller.channels

    @property
    def loader(self) -> Loader:
        """What makes this learner's device batches."""
        salient = [energy.tokens for energy in self.spec.objective.energies if isinstance(energy, AlignTopK)]
        return Loader(self.device, salient[0] if salient else 0, ATTENTION in self.channels)

    def step(
        self,
        micro_batches: Iterable[DeviceBatch],
        counts: StepCounts,
        number: int,
        progress: float,
        *,
        statistics: bool,
        clock: StepClock | None = None,
    ) -> Totals:
        """Collective: one optimizer step on the `counts.micro_batches` micro-batches of this rank.

        `number` counts the job's steps from 1; `progress` is the job's with this step done, up to 1. With `statistics`,
        those of the objective come along. Only launches work where there is a GPU.
        """
        clock = clock or StepClock(self.device)
        self.tally.clear(counts.most_samples)
        _seed_step(self.spec.training.seed, number, self.rank, self.device)
        with clock.phase("forward_backward"):
            for at, batch in enumerate(micro_batches, 1):
                # DeepSpeed reduces gradients over the ranks with the last micro-batch's backward.
                self.engine.set_gradient_accumulation_boundary(at == counts.micro_batches)
                self._backward(batch, counts, progress, statistics)
        with clock.phase("optimizer"):
            return self._update(progress)

    def _backward(self, batch: DeviceBatch, counts: StepCounts, progress: float, statistics: bool) -> None:
        """Run forward and backward of one micro-batch."""
        inputs = batch.inputs
        features = {name: batch.teacher.parts[name] for name in self.weighting.needed} if batch.teacher else {}
        beta = self.weighting.beta(features, inputs.has_image)
        present = present_channels(self.channels, batch.valid, inputs.has_image)
        share = self._share(inputs, counts)
        moving = self.curriculum.values()
        # DeepSpeed takes the mean over ranks, and `share` is already that of the global batch.
        scale = self.world_size
        output: Distilled = self.engine(
            inputs,
            batch.teacher,
            batch.pairs,
            torch.where(present, beta.detach() * share[:, None] * scale, 0.0),
            {name: value.detach() for name, value in moving.items()},
            statistics,
        )
        self.engine.backward(output.loss, scale_wrt_gas=False)
        energies = torch.where(present, output.energies, 0.0)
        loss = (self.weighting.loss(beta, energies, present) * share).sum()
        if loss.requires_grad:
            loss.backward()
        for name, value in moving.items():
            if value.requires_grad:
                value.backward(output.moving_gradients[name] / scale * reversal(progress))
        self.tally.add(energies, beta.detach(), present, share, loss.detach(), output.statistics)

    def _share(self, inputs: TensorInputs, counts: StepCounts) -> Tensor:
        """Return [B] each sample's part of the global mean, by `objective.reduction`."""
        if self.spec.objective.reduction == "token":
            return inputs.rows_per_sample.float() / max(counts.tokens.answer, 1)
        return torch.full((len(inputs.input_ids),), 1 / counts.samples, device=self.device)

    def _update(self, progress: float) -> Totals:
        """Step the student's optimizer, then β's. Where the gradient is not finite, both stay as they were."""
        self.engine.step()
        applied = self.engine.was_step_applied()
        totals = self.tally.reduced(applied)
        if self.beta_optimizer:
            self.beta_optimizer.step(applied)
        if applied:
            self.weighting.observe(totals.energies)
            self.curriculum.observe(dict(zip(self.channels, totals.energies, strict=True)), progress)
        return totals

    def mean_and_max(self, numbers: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
        """Collective: return the mean of each number over the ranks, and the largest."""
        mean = torch.tensor([*numbers.values()], device=self.device)
        largest = mean.clone()
        dist.all_reduce(mean)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        mean /= self.world_size
        names = tuple(numbers)
        return dict(zip(names, mean.tolist(), strict=True)), dict(zip(names, largest.tolist(), strict=True))

    # -------------------------------------------------------------------------------------------------- state

    def save(self, folder: Path) -> None:
        """Collective: this rank's files of a checkpoint."""
        pickle_stages_by_value()
        self.engine.save_checkpoint(str(folder), tag=checkpoint.ENGINE, exclude_frozen_parameters=True)
        if self.rank == 0:
            torch.save(
                {
                    "weighting": self.weighting.state_dict(),
                    "curriculum": self.curriculum.state_dict(),
                    "beta_optimizer": self.beta_optimizer.state_dict() if self.beta_optimizer else None,
                },
                folder / "beta.pt",
            )

    def load(self, folder: Path) -> None:
        """Collective: the inverse, also of a checkpoint that another number of ranks wrote."""
        checkpoint.load_engine(self.engine, folder)
        with tensors_only(folder.name):
            state = torch.load(folder / "beta.pt", weights_only=True, map_location=self.device)
        self.weighting.load_state_dict(state["weighting"])
        self.curriculum.load_state_dict(state["curriculum"])
        if self.beta_optimizer:
            self.beta_optimizer.load_state_dict(state["beta_optimizer"])

    # --------------------------------------------------------------------------------------------------- build

    def _distiller(self, facts: TeacherFacts | None, teacher_head: NDArray[Any] | None) -> Distiller:
        training = self.spec.training
        student = build_student(self.spec.student, torch.bfloat16 if training.precision == "bf16" else torch.float32)
        if training.gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        if ATTENTION in self.spec.objective.channels:
            with_attention_weights(student)
        processor = student_processor(self.spec.student)
        cast(nn.Module, student).to(self.device)  # transformers' decorator hides the type of its `to`
        head = None if teacher_head is None else to_tensor(teacher_head, self.device)
        distiller = Distiller(student, processor, self.spec.objective, facts, head).to(self.device).train()
        if self.peak_flops:  # counted now, as DeepSpeed may take the weights apart
            elements = 0 if head is None else head.numel()
            self.flops = StudentFlops.of(student, distiller.normalize, distiller.blank, elements)
        return distiller

    def _engine(self, total_steps: int) -> DeepSpeedEngine:
        import deepspeed

        optimizer = student_optimizer(self.distiller, self.spec)
        engine, *_ = deepspeed.initialize(
            model=self.distiller,
            optimizer=optimizer,
            lr_scheduler=schedule(optimizer, self.spec.optimizer, total_steps),  # pyright: ignore[reportArgumentType]
            config=deepspeed_config(self.spec, self.world_size),
            dist_init_required=False,
        )
        return engine

    def _unname_shared_memory(self) -> None:
        """Collective: have the shared memory of DeepSpeed's CPU collectives, 66 MB a rank, end with its processes.

        DeepSpeed itself leaves it behind. Every rank has it open by now, so nobody needs its name.
        """
        dist.barrier(group=self.host_group)  # pyright: ignore[reportArgumentType]
        place = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
        name = "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *place, str(self.rank)])
        Path("/dev/shm", name).unlink(missing_ok=True)


def _bound_collectives(timeout: timedelta) -> None:
    """Set the timeout of every process group. DeepSpeed makes its own with torch's default and has no option for it."""
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timeout, group)


def _seed(seed: int) -> None:
    """Give every rank the same initial weights."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Give each rank dropout masks of its own in each step, and the same ones whenever the step is done again."""
    drawn = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
    # Not torch.manual_seed, which asks every kind of device there might be: a hundred times as long.
    torch.default_generator.manual_seed(drawn)
    if device.type == "cuda":
        torch.cuda.manual_seed(drawn)
