"""One rank's student: models, optimizers and β, from a window of scored micro-batches to one step. Knows no Ray."""

import os
import random
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from betakd_ray.batch.inputs import ModelInputs, Pairs, TensorInputs, most_salient, to_device
from betakd_ray.curriculum import Curriculum, reversal
from betakd_ray.data.rows import Batch
from betakd_ray.errors import TeacherError
from betakd_ray.models.device import find_device
from betakd_ray.models.student import build_student, student_processor
from betakd_ray.models.vlm import with_attention_weights
from betakd_ray.objective import TeacherRows
from betakd_ray.spec import AlignTopK, JobSpec
from betakd_ray.teacher.signal import Signal, TeacherFacts, Wire
from betakd_ray.train import checkpoint
from betakd_ray.train.distiller import ATTENTION, Distilled, Distiller, Selection, TeacherView
from betakd_ray.train.optim import beta_optimizer, deepspeed_config, schedule, student_optimizer
from betakd_ray.train.tally import Tally, Totals
from betakd_ray.train.unpickling import pickle_stages_by_value, tensors_only
from betakd_ray.weighting import BetaWeighting, present_channels

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
else:
    DeepSpeedEngine = Any  # imported only where something trains: it takes seconds, and greets on the terminal

Scored = tuple[Batch, Signal | None]
Window = list[Scored]
"""One step's micro-batches on this rank."""


@dataclass(frozen=True)
class GlobalCounts:
    """What the global batch holds that takes part: the denominators of its means."""

    samples: int
    tokens: int
    dropped: int
    """Samples that their teacher cannot answer, or not with finite numbers: they take no part."""
    is_due: bool
    """Whether any rank finds it time to look up from training."""


class Learner:
    """Needs a process group. Every method named collective must be called by all ranks alike."""

    def __init__(self, spec: JobSpec, facts: TeacherFacts | None, total_steps: int) -> None:
        self.spec = spec
        self.device = find_device()
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        self.accumulation = spec.training.accumulation(self.world_size)
        # What is known on the host is agreed on there, without waiting for the device.
        timeout = timedelta(seconds=spec.training.collective_timeout_s)
        self.host_group = dist.new_group(backend="gloo", timeout=timeout)
        _seed(spec.training.seed)
        self.distiller = self._distiller(facts)
        self.engine = self._engine(total_steps)
        self._unname_shared_memory()
        _bound_collectives(timeout)
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

    def agree(self, window: Window, *, is_due: bool = False) -> GlobalCounts | None:
        """Collective: the global batch's counts; None once any rank lacks a full window.

        Every rank learns them before the first backward, so the loss is a mean over the *global* batch, however its
        samples fall on ranks and micro-batches. Raises TeacherError if no sample takes part.
        """
        samples = tokens = 0
        for batch, signal in window:
            valid = valid_samples(batch, signal)
            samples += int(valid.sum())
            tokens += int(batch.student.rows_per_sample[valid].sum())
        counts = torch.tensor([samples, tokens, len(window) == self.accumulation, is_due], dtype=torch.float64)
        dist.all_reduce(counts, group=self.host_group)
        samples, tokens, full, due = (int(count) for count in counts.tolist())
        if full < self.world_size:
            return None
        if samples == 0:
            raise TeacherError(
                "the teacher's answers are not finite for any sample of a global batch. In float16 it may overflow: "
                "set teacher.dtype to bfloat16 or float32"
            )
        return GlobalCounts(samples, max(tokens, 1), self.spec.training.global_batch_size - samples, due > 0)

    def step(self, window: Window, counts: GlobalCounts, progress: float, *, statistics: bool) -> Totals:
        """Collective: one optimizer step on a full window.

        `progress` is the job's with this step done, up to 1. With `statistics`, those of the objective come along.
        """
        self.tally.clear()
        for number, (batch, signal) in enumerate(window, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(window))
            self._backward(batch, signal, counts, progress, statistics)
        self.engine.step()
        return self._update(progress)

    def _backward(
        self, batch: Batch, signal: Signal | None, counts: GlobalCounts, progress: float, statistics: bool
    ) -> None:
        """Forward and backward of one micro-batch."""
        inputs = TensorInputs.of(batch.student, self.device)
        valid = to_device(valid_samples(batch, signal), self.device)
        features = {name: to_device(value, self.device) for name, value in (signal.features if signal else {}).items()}
        beta = self.weighting.beta(features, inputs.has_image)
        present = present_channels(self.channels, valid, inputs.has_image)
        share = self._share(inputs, counts)
        moving = self.curriculum.values()
        # DeepSpeed divides by the number of ranks, and `share` already by the global batch.
        scale = self.world_size
        output: Distilled = self.engine(
            inputs,
            self._view(batch.student, signal) if signal else None,
            Pairs.of(batch.student, self.device) if ATTENTION in self.channels else None,
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

    def _view(self, inputs: ModelInputs, signal: Signal) -> TeacherView:
        rows = TeacherRows(
            *(_tensor(wire, self.device) for wire in (signal.hidden, signal.top_ids, signal.top_log_probs))
        )
        salient = None
        if signal.salience:
            (energy,) = (energy for energy in self.spec.objective.energies if isinstance(energy, AlignTopK))
            token = most_salient(signal.salience.array, inputs, energy.tokens)
            sample = inputs.visual_sample[token]
            counts = np.bincount(sample, minlength=inputs.size)
            salient = Selection(*(to_device(array, self.device) for array in (token, sample, counts)))
        visual, visual_layer, attention = (
            _tensor(wire, self.device) for wire in (signal.visual, signal.visual_layer, signal.attention)
        )
        return TeacherView(rows, visual, visual_layer, attention, salient)

    def _share(self, inputs: TensorInputs, counts: GlobalCounts) -> Tensor:
        """[B] each sample's part of the global mean, by `objective.reduction`."""
        if self.spec.objective.reduction == "token":
            return inputs.rows_per_sample.float() / counts.tokens
        return torch.full((len(inputs.input_ids),), 1 / counts.samples, device=self.device)

    def _update(self, progress: float) -> Totals:
        """DeepSpeed has stepped by now, or skipped a gradient that is not finite; β then stays as it was, too."""
        applied = self.engine.was_step_applied()
        totals = self.tally.reduced(applied)
        if self.beta_optimizer:
            self.beta_optimizer.step(applied)
        if applied:
            self.weighting.observe(totals.energies)
            self.curriculum.observe(dict(zip(self.channels, totals.energies, strict=True)), progress)
        return totals

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

    def _distiller(self, facts: TeacherFacts | None) -> Distiller:
        training = self.spec.training
        student = build_student(self.spec.student, torch.bfloat16 if training.precision == "bf16" else torch.float32)
        if training.gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        if ATTENTION in self.spec.objective.channels:
            with_attention_weights(student)
        processor = student_processor(self.spec.student)
        cast(nn.Module, student).to(self.device)  # transformers' decorator hides the type of its `to`
        distiller = Distiller(student, processor, self.spec.objective, facts)
        return distiller.to(self.device).train()

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


def _tensor(wire: Wire | None, device: torch.device) -> Tensor | None:
    return wire.tensor(device) if wire else None


def valid_samples(batch: Batch, signal: Signal | None) -> np.ndarray:
    """[B] which samples of a micro-batch take part."""
    return np.ones(batch.student.size, dtype=bool) if signal is None else signal.valid


def _bound_collectives(timeout: timedelta) -> None:
    """For DeepSpeed's groups as for ours: it makes them with torch's default, half an hour, and has no option."""
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timeout, group)


def _seed(seed: int) -> None:
    """The same initial weights on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
