"""One rank's student: models, optimizers and β. It makes one optimizer step of a step's micro-batches, without Ray."""

import random
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from betakd_ray.batch.inputs import TensorInputs
from betakd_ray.curriculum import Curriculum, reversal
from betakd_ray.engine.checkpoint import load_engine
from betakd_ray.engine.collectives import bound_collectives, named_shared_memory
from betakd_ray.engine.compiled import load_collective
from betakd_ray.engine.config import deepspeed_config
from betakd_ray.engine.unpickling import pickle_stages_by_value, tensors_only
from betakd_ray.models.device import find_device
from betakd_ray.models.flops import StudentFlops, device_peak
from betakd_ray.models.student import build_student, student_processor
from betakd_ray.models.vlm import with_attention_weights
from betakd_ray.run.folder import BETA, ENGINE
from betakd_ray.spec import JobSpec
from betakd_ray.teacher.answers import to_tensor
from betakd_ray.teacher.parts import TeacherFacts
from betakd_ray.train.agreement import StepCounts
from betakd_ray.train.clock import StepClock
from betakd_ray.train.distiller import Distilled, Distiller
from betakd_ray.train.optim import beta_optimizer, schedule, student_optimizer
from betakd_ray.train.prefetch import DeviceBatch, Loader
from betakd_ray.train.sums import StepSums, Totals
from betakd_ray.weighting import BetaWeighting, present_channels

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
else:
    DeepSpeedEngine = Any  # imported only where something trains: the import takes seconds and prints to the terminal

FOREVER = timedelta(days=365)
"""Timeout of process groups whose collectives may wait for a teacher or a store. `watch` finds a rank that died."""


class Learner:
    """Student, optimizers and β of one rank. It needs an initialized process group.

    If a docstring says "collective", every rank must call the method.
    """

    def __init__(
        self,
        spec: JobSpec,
        facts: TeacherFacts | None,
        total_steps: int,
        teacher_head: NDArray[Any] | None = None,
        check_student: Callable[[Any], None] | None = None,
    ) -> None:
        """Build everything. `check_student` is called with the student before DeepSpeed may shard its weights."""
        self.spec = spec
        self.device = find_device()
        self.peak_flops = device_peak(self.device)
        self.flops: StudentFlops | None = None
        """Counter of the FLOPs of a step; None if the device's peak, with which they are compared, is not known."""
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        _seed(spec.training.seed)
        self.distiller = self._distiller(facts, teacher_head, check_student)
        load_collective()
        with named_shared_memory(self.rank):
            self.engine = self._engine(total_steps)
            # After DeepSpeed has made its groups, and before the groups below, which keep their long timeout.
            bound_collectives(timedelta(seconds=spec.training.collective_timeout_s))
            # Collectives on host data use gloo, so that they do not wait for the device. Their timeout is long, because
            # a checkpoint takes as long as its slowest rank. The threads of the feed and of the saver have groups of
            # their own: in a group of two threads, the ranks could match collectives in different orders.
            self.host_group, self.feed_group, self.save_group = (
                cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=FOREVER)) for _ in range(3)
            )
            dist.barrier(group=self.host_group)
        self.weighting = BetaWeighting(
            spec.objective.weighting,
            spec.objective.channels,
            ce=spec.objective.ce,
            feature_sizes=facts.feature_sizes if facts else None,
        ).to(self.device)
        self.curriculum = Curriculum(spec.objective.energies).to(self.device)
        self.beta_optimizer = beta_optimizer(self.weighting, self.curriculum, spec.optimizer, total_steps)
        self.sums = StepSums(len(self.channels), len(self.distiller.rows.measures), self.device)

    @property
    def channels(self) -> tuple[str, ...]:
        return self.distiller.channels

    @property
    def loader(self) -> Loader:
        """Return the loader that makes this learner's device batches."""
        objective = self.spec.objective
        return Loader(self.device, objective.salient_tokens, objective.compares_attention)

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
        """Run one optimizer step on this rank's `counts.micro_batches` micro-batches. Collective.

        `number` counts the job's steps from 1. `progress` is the fraction of the job that is done after this step, up
        to 1. With `statistics`, the totals include those of the objective. On a GPU the method only launches kernels,
        and does not wait for them.
        """
        clock = clock or StepClock(self.device)
        self.sums.clear(counts.most_samples)
        _seed_step(self.spec.training.seed, number, self.rank, self.device)
        with clock.phase("forward_backward"):
            for at, batch in enumerate(micro_batches, 1):
                # DeepSpeed reduces gradients over the ranks with the last micro-batch's backward.
                self.engine.set_gradient_accumulation_boundary(at == counts.micro_batches)
                self._backward(batch, counts, progress, statistics)
        with clock.phase("optimizer"):
            return self._update(progress)

    def evaluate(self, micro_batches: Iterable[DeviceBatch], counts: StepCounts) -> Totals:
        """Return the means over held-out samples with the weights of now, statistics included. Collective.

        It changes nothing that the training depends on: neither weights, β and sums, nor random generators.
        """
        sums = StepSums(len(self.channels), len(self.distiller.rows.measures), self.device)
        sums.clear(counts.most_samples)
        generators = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=generators), torch.no_grad():
            self.engine.eval()
            try:
                for batch in micro_batches:
                    passed = self._forward(batch, counts, statistics=True)
                    sums.add(*passed.added, passed.output.statistics)
            finally:
                self.engine.train()
        return sums.reduced(applied=True)

    def _backward(self, batch: DeviceBatch, counts: StepCounts, progress: float, statistics: bool) -> None:
        """Run forward and backward of one micro-batch."""
        passed = self._forward(batch, counts, statistics)
        self.engine.backward(passed.output.loss, scale_wrt_gas=False)
        if passed.loss.requires_grad:
            passed.loss.backward()
        for name, value in passed.moving.items():
            if value.requires_grad:
                # Without the scale, because BetaOptimizer sums over the ranks and does not divide.
                value.backward(passed.output.moving_gradients[name] / self.world_size * reversal(progress))
        self.sums.add(*passed.added, passed.output.statistics)

    def _forward(self, batch: DeviceBatch, counts: StepCounts, statistics: bool) -> "_Passed":
        """Run the student and the objective on one micro-batch."""
        inputs = batch.inputs
        features = {name: batch.teacher.parts[name] for name in self.weighting.needed} if batch.teacher else {}
        beta = self.weighting.beta(features, inputs.has_image)
        present = present_channels(self.channels, batch.valid, inputs.has_image)
        share = self._share(inputs, counts)
        moving = self.curriculum.values()
        # DeepSpeed divides gradients by the number of ranks, but `share` already divides by the global batch.
        scale = self.world_size
        output: Distilled = self.engine(
            inputs,
            batch.teacher,
            batch.pairs,
            # Detached: in the student's loss β is a constant. β learns only from its own loss.
            torch.where(present, beta.detach() * share[:, None] * scale, 0.0),
            {name: value.detach() for name, value in moving.items()},
            statistics,
        )
        # Not a product with zero, which would keep a NaN.
        energies = torch.where(present, output.energies, 0.0)
        loss = (self.weighting.loss(beta, energies, present) * share).sum()
        return _Passed(output, moving, loss, (energies, beta.detach(), present, share, loss.detach()))

    def _share(self, inputs: TensorInputs, counts: StepCounts) -> Tensor:
        """Return each sample's weight in the global mean [B], by `objective.reduction`."""
        if self.spec.objective.reduction == "token":
            return inputs.rows_per_sample.float() / max(counts.tokens.answer, 1)
        return torch.full((len(inputs.input_ids),), 1 / counts.samples, device=self.device)

    def _update(self, progress: float) -> Totals:
        """Step the student's optimizer, then β's. If the gradient is not finite, neither changes."""
        # DeepSpeed decides on the reduced gradient, so all ranks skip the same steps.
        self.engine.step()
        applied = self.engine.was_step_applied()
        totals = self.sums.reduced(applied)
        if self.beta_optimizer:
            self.beta_optimizer.step(applied)
        if applied:
            self.weighting.observe(totals.energies)
            self.curriculum.observe(dict(zip(self.channels, totals.energies, strict=True)), progress)
        return totals

    def mean_and_max(self, numbers: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
        """Return the mean of each number over the ranks, and its maximum. Collective."""
        mean = torch.tensor([*numbers.values()], device=self.device)
        largest = mean.clone()
        dist.all_reduce(mean)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        mean /= self.world_size
        names = tuple(numbers)
        return dict(zip(names, mean.tolist(), strict=True)), dict(zip(names, largest.tolist(), strict=True))

    # -------------------------------------------------------------------------------------------------- state

    def save(self, folder: Path) -> None:
        """Write this rank's files of a checkpoint to a local folder. Collective."""
        pickle_stages_by_value()
        self.engine.save_checkpoint(str(folder), tag=ENGINE, exclude_frozen_parameters=True)
        # Rank 0 alone: this state is equal on all ranks, as it changes only by sums over all of them.
        if self.rank == 0:
            torch.save(
                {
                    "weighting": self.weighting.state_dict(),
                    "curriculum": self.curriculum.state_dict(),
                    "beta_optimizer": self.beta_optimizer.state_dict() if self.beta_optimizer else None,
                },
                folder / BETA,
            )

    def load(self, folder: Path) -> None:
        """Load a checkpoint from a folder, also one that another number of ranks wrote. Collective."""
        load_engine(self.engine, folder)
        with tensors_only(folder.name):
            state = torch.load(folder / BETA, weights_only=True, map_location=self.device)
        self.weighting.load_state_dict(state["weighting"])
        self.curriculum.load_state_dict(state["curriculum"])
        if self.beta_optimizer:
            self.beta_optimizer.load_state_dict(state["beta_optimizer"])

    # --------------------------------------------------------------------------------------------------- build

    def _distiller(
        self,
        facts: TeacherFacts | None,
        teacher_head: NDArray[Any] | None,
        check_student: Callable[[Any], None] | None,
    ) -> Distiller:
        training = self.spec.training
        student = build_student(self.spec.student, torch.bfloat16 if training.precision == "bf16" else torch.float32)
        if check_student:
            check_student(student)
        if training.gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        if self.spec.objective.compares_attention:
            with_attention_weights(student)
        processor = student_processor(self.spec.student)
        cast(nn.Module, student).to(self.device)  # transformers' decorator hides the type of its `to`
        head = None if teacher_head is None else to_tensor(teacher_head, self.device)
        distiller = Distiller(student, processor, self.spec.objective, facts, head).to(self.device).train()
        if self.peak_flops:  # counted now, because DeepSpeed may shard the weights (ZeRO-3)
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
            # The process group is there already: Ray Train makes it.
            dist_init_required=False,
        )
        return engine


class _Passed(NamedTuple):
    """Results of a forward pass over one micro-batch."""

    output: Distilled
    moving: Mapping[str, Tensor]
    """Current number of each stateful channel."""
    loss: Tensor
    """Loss from which β learns: the sum of the samples' losses, times their shares."""
    added: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    """What `StepSums.add` takes, but for the statistics."""


def _seed(seed: int) -> None:
    """Seed all generators with the same number on every rank, so that all start with the same weights."""
    random.seed(seed)
    # numpy takes a seed of 32 bits only.
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed dropout for one rank and one step.

    Each rank has its own masks in each step. A step that is repeated after a resume has the same masks again.
    """
    drawn = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
    # Not torch.manual_seed: it asks for every kind of device, and takes a hundred times as long.
    torch.default_generator.manual_seed(drawn)
    if device.type == "cuda":
        torch.cuda.manual_seed(drawn)
