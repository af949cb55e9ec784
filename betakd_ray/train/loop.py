"""A student worker's life: build, resume, train, save. What Ray Train runs on every rank."""

import itertools
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import psutil
import ray
import ray.train
import ray.train.collective
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from torch import Tensor

from betakd_ray import errors
from betakd_ray.data.collate import Batch, collate
from betakd_ray.data.ledger import Ledger
from betakd_ray.data.stream import Plan
from betakd_ray.models.device import find_device
from betakd_ray.models.inputs import TensorInputs, to_device
from betakd_ray.models.load import build_student, load_processor, processor_source
from betakd_ray.models.vlm import Normalization
from betakd_ray.objective import STATISTICS
from betakd_ray.spec import JobSpec
from betakd_ray.teacher.pool import TeacherClient, scored
from betakd_ray.teacher.signal import Signal, TeacherFacts
from betakd_ray.tracking import Metrics
from betakd_ray.train import checkpoint
from betakd_ray.train.distiller import FD, Distiller
from betakd_ray.train.export import export
from betakd_ray.train.optim import beta_optimizer, deepspeed_config, schedule, student_optimizer
from betakd_ray.train.tally import QUANTILES, Tally, Totals
from betakd_ray.weighting import BetaWeighting

Scored = tuple[Batch, Signal | None]


@dataclass(frozen=True)
class WorkerConfig:
    """What the job tells every worker."""

    spec: JobSpec
    run: str
    plan: Plan
    monitor: ActorHandle
    image_token_id: dict[str, int]
    pad_token_id: int
    total_steps: int
    pool: ActorHandle | None = None
    teacher: "ray.ObjectRef | None" = None
    """TeacherFacts, fetched once a node."""


def train_worker(config: dict[str, WorkerConfig]) -> dict[str, Any]:
    """Train to the end of the plan and export the student. Rank 0's return value is the job's outcome."""
    worker = config["worker"]
    if ray.get(worker.monitor.failure.remote()):
        return {}
    try:
        return Worker(worker).run()
    except (errors.UserError, errors.TrainingError) as error:
        # Noted first: the restart that Ray Train now makes finds it and ends at once.
        ray.get(worker.monitor.fail.remote(type(error).__name__, str(error)))
        raise


class Worker:
    """One rank of the student."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.spec = config.spec
        self.training = config.spec.training
        self.device = find_device()
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        self.accumulation = self.training.global_batch_size // (self.training.micro_batch_size * self.world_size)
        self.total_steps = config.total_steps
        _seed(self.training.seed)
        facts: TeacherFacts | None = ray.get(config.teacher) if config.teacher else None
        self.distiller = self._distiller(facts)
        self.engine = self._engine()
        self.weighting = BetaWeighting(
            self.spec.objective.weighting,
            self.spec.objective.channels,
            ce=self.spec.objective.ce,
            feature_sizes=facts.feature_sizes if facts else None,
        ).to(self.device)
        self.beta_optimizer = beta_optimizer(self.weighting, self.spec.optimizer, self.total_steps)
        self.client: TeacherClient | None = None
        if config.pool and self.spec.teacher:
            self.client = TeacherClient(config.pool, self.rank, self.spec.teacher.timeout_s)
        self.store = checkpoint.CheckpointStore(config.run, self.spec.output.storage)
        self.metrics = Metrics(self.spec, config.run) if self.rank == 0 else None
        self.tally = Tally(len(self.distiller.channels), self.device)
        self.clock = Clock()
        self.ledger = config.plan.empty_ledger()
        self.step = self.skipped = self.skipped_in_a_row = self.samples = 0
        # New at every start of the workers, so that a save never meets the remains of another.
        self.attempt = ray.train.collective.broadcast_from_rank_zero(os.urandom(4).hex())

    def run(self) -> dict[str, Any]:
        """The loop: one screen is one step of training."""
        self.resume()
        for window in self.windows():
            totals = self.agree(window)
            if totals is None:
                break
            self.tally.clear()
            for batch, signal in window:
                self.backward(batch, signal, totals)
            reduced = self.update()
            for batch, _ in window:
                self.ledger.add(batch.ids)
            self.step += 1
            if self.is_logged(self.step):
                self.log(reduced)
            if self.step == self.total_steps:
                break
            if self.step % self.training.checkpoint_every == 0:
                self.save()
        self.save()
        return self.finish()

    def is_logged(self, step: int) -> bool:
        """Every `log_every` steps, the first and the last."""
        return step % self.training.log_every == 0 or step in (1, self.total_steps)

    # -------------------------------------------------------------------------------------------- batches

    def windows(self) -> Iterator[list[Scored]]:
        """One step's micro-batches at a time, each with its signal; short, then empty, when the stream ends."""
        stream: Iterator[Scored] = ((batch, None) for batch in self.batches())
        if self.client and self.spec.teacher:
            stream = scored(self.batches(), self.client, self.spec.teacher.window)
        while True:
            yield list(itertools.islice(stream, self.accumulation))

    def batches(self) -> Iterator[Batch]:
        """Micro-batches of this rank's part of the stream."""
        shard = ray.train.get_dataset_shard("train")
        size = self.training.micro_batch_size
        rows = iter(shard.iter_batches(batch_size=size, batch_format="pyarrow", drop_last=True, prefetch_batches=2))
        while True:
            start = time.perf_counter()
            table = next(rows, None)
            self.clock.data_s += time.perf_counter() - start
            if table is None:
                return
            yield collate(table, self.config.pad_token_id, self.config.image_token_id)

    def agree(self, window: list[Scored]) -> tuple[float, float] | None:
        """(valid samples, their answer tokens) of the global batch; None once any rank lacks a full window.

        Every rank learns it before the first backward, so the loss is a mean over the *global* batch, however its
        samples fall on ranks and micro-batches.
        """
        samples = tokens = 0
        for batch, signal in window:
            valid = _valid(batch, signal)
            samples += int(valid.sum())
            tokens += int(batch.student.rows_per_sample[valid].sum())
        counts = torch.tensor([samples, tokens, len(window) == self.accumulation], dtype=torch.float64)
        counts = counts.to(self.device)
        dist.all_reduce(counts)
        samples, tokens, full = counts.tolist()
        return (max(samples, 1), max(tokens, 1)) if full == self.world_size else None

    # ------------------------------------------------------------------------------------------- one step

    def backward(self, batch: Batch, signal: Signal | None, totals: tuple[float, float]) -> None:
        """Forward and backward of one micro-batch, for the student and for β."""
        inputs = TensorInputs.of(batch.student, self.device)
        valid = to_device(_valid(batch, signal), self.device)
        features = {name: to_device(value, self.device) for name, value in (signal.features if signal else {}).items()}
        beta = self.weighting.beta(features, inputs.has_image)
        present = self.present(inputs, valid)
        share = self.share(inputs, totals)
        output = self.engine(
            inputs,
            signal.hidden.tensor(self.device) if signal and signal.hidden else None,
            signal.visual.tensor(self.device) if signal and signal.visual else None,
            # DeepSpeed divides by accumulation steps and ranks, and `share` already by the global batch.
            beta.detach() * present * share[:, None] * (self.accumulation * self.world_size),
            self.is_logged(self.step + 1),
        )
        self.engine.backward(output["loss"])
        self.engine.step()
        energies = torch.where(present, output["energies"], 0.0)
        loss = (self.weighting.loss(beta, energies, present) * share).sum()
        if self.beta_optimizer:
            loss.backward()
        self.tally.add(energies, beta.detach(), present, loss.detach(), output["statistics"])
        self.samples += batch.student.size * self.world_size
        self.clock.teacher_busy_s += signal.busy_s if signal else 0.0

    def present(self, inputs: TensorInputs, valid: Tensor) -> Tensor:
        """[B, channels] which channels a sample has: none if the teacher's answer is invalid, no `fd` without image."""
        present = valid[:, None].expand(-1, len(self.distiller.channels)).clone()
        if FD in self.distiller.channels:
            present[:, self.distiller.channels.index(FD)] &= inputs.has_image
        return present

    def share(self, inputs: TensorInputs, totals: tuple[float, float]) -> Tensor:
        """[B] each sample's part of the global mean, by `objective.reduction`."""
        samples, tokens = totals
        if self.spec.objective.reduction == "token":
            return inputs.rows_per_sample.float() / tokens
        return torch.full((len(inputs.input_ids),), 1 / samples, device=self.device)

    def update(self) -> Totals:
        """What follows the student's step. DeepSpeed skips one whose gradient is not finite; β is then left alone too.

        Raises NonFiniteLoss after `max_skipped_steps` in a row.
        """
        applied = self.engine.was_step_applied()
        totals = self.tally.reduced()
        if self.beta_optimizer:
            self.beta_optimizer.step(applied)
        if applied:
            self.weighting.observe(totals.energies)
            self.skipped_in_a_row = 0
            return totals
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.training.max_skipped_steps:
            last = self.store.latest()
            raise errors.NonFiniteLoss(
                f"{self.skipped_in_a_row} steps in a row, up to step {self.step + 1}, had a loss or gradient that is "
                f"not finite. Last good checkpoint: {last.name if last else 'none'}. Lower optimizer.lr or use "
                "precision fp32."
            )
        return totals

    def log(self, totals: Totals) -> None:
        """Numbers of this step (paper Figures 4–6, Table 6) and of the time since the last log."""
        quantiles = self.tally.beta_quantiles().tolist()
        if self.metrics is None:
            return
        record: dict[str, Any] = {"step": self.step, "loss": totals.loss.item(), "samples": self.samples}
        columns = zip(
            self.distiller.channels,
            totals.energies.tolist(),
            totals.weighted.tolist(),
            totals.beta.tolist(),
            strict=True,
        )
        for at, (name, energy, weighted, beta) in enumerate(columns):
            record |= {f"energy/{name}": energy, f"weighted/{name}": weighted, f"beta/{name}": beta}
            record |= {f"beta_p{round(100 * q)}/{name}": row[at] for q, row in zip(QUANTILES, quantiles, strict=True)}
        record |= dict(zip(STATISTICS, totals.statistics.tolist(), strict=True))
        record |= {"lr": self.engine.get_lr()[0], "grad_norm": float(self.engine.get_global_grad_norm() or 0.0)}
        record |= {"skipped_steps": self.skipped, **self.clock.record(self.samples, self.client)}
        record["peak_memory_gb"] = _peak_memory(self.device) / 1e9
        self.metrics.log(record)
        self.config.monitor.log.remote(record | {"total_steps": self.total_steps})

    # ---------------------------------------------------------------------------- checkpoint and result

    def save(self) -> None:
        """Collective: a checkpoint of everything a resume needs."""
        self.merge_ledgers()
        checkpoint.save(self.store, self.step, self.attempt, self.training.keep, self.write)

    def merge_ledgers(self) -> None:
        """Every rank's ledger becomes everyone's, quarantined samples included."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, self.ledger.to_json())
        for part in parts:
            self.ledger.merge(Ledger.from_json(part))

    def write(self, folder: Path) -> None:
        """This rank's files of a checkpoint."""
        self.engine.save_checkpoint(str(folder), tag="deepspeed", exclude_frozen_parameters=True)
        torch.save(_rng_state(), folder / f"rng-{self.rank}.pt")
        if self.metrics is None:
            return
        state = {"weighting": self.weighting.state_dict(), "skipped": self.skipped, "samples": self.samples}
        if self.beta_optimizer:
            state["beta_optimizer"] = self.beta_optimizer.state_dict()
        torch.save(state, folder / "state.pt")
        (folder / "ledger.json").write_text(self.ledger.to_json())
        (folder / "metrics.jsonl").write_text(self.metrics.to_jsonl())
        (folder / "spec.json").write_text(self.spec.model_dump_json(indent=2))
        self.metrics.flush()

    def resume(self) -> None:
        """Continue from the newest committed checkpoint, if there is one."""
        manifest = self.store.latest()
        if manifest is None:
            return
        self.ledger = Ledger.from_json(self.store.read_text(manifest, "ledger.json"))
        with self.store.on_disk(manifest) as folder:
            checkpoint.load_engine(self.engine, folder, manifest.world_size, self.world_size)
            state = torch.load(folder / "state.pt", weights_only=True, map_location=self.device)
            self.weighting.load_state_dict(state["weighting"])
            if self.beta_optimizer:
                self.beta_optimizer.load_state_dict(state["beta_optimizer"])
            if manifest.world_size == self.world_size:
                _set_rng_state(torch.load(folder / f"rng-{self.rank}.pt", weights_only=True))
        self.step, self.skipped, self.samples = manifest.step, state["skipped"], state["samples"]
        if self.metrics:
            self.metrics.restore(self.store.read_text(manifest, "metrics.jsonl"))

    def finish(self) -> dict[str, Any]:
        """Collective: export the student; rank 0 returns the outcome."""
        last = self.metrics.history[-1] if self.metrics and self.metrics.history else {}
        export(self.engine, self.spec, self.config.run, last)
        if self.metrics is None:
            return {}
        self.metrics.close()
        return {"steps": self.step, "metrics": last, "consumed": self.ledger.count, "skipped_steps": self.skipped}

    def _distiller(self, facts: TeacherFacts | None) -> Distiller:
        dtype = torch.bfloat16 if self.training.precision == "bf16" else torch.float32
        student = build_student(self.spec.student, dtype)
        if self.training.gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        normalize = Normalization.of(load_processor(processor_source(self.spec.student)).image_processor)
        head = facts.head.tensor(self.device) if facts else None
        distiller = Distiller(student, normalize, self.spec.objective, head, facts.visual_size if facts else None)
        return distiller.to(self.device).train()

    def _engine(self) -> deepspeed.DeepSpeedEngine:
        optimizer = student_optimizer(self.distiller, self.spec.optimizer)
        engine, *_ = deepspeed.initialize(
            model=self.distiller,
            optimizer=optimizer,
            lr_scheduler=schedule(optimizer, self.spec.optimizer, self.total_steps),
            config=deepspeed_config(self.spec, self.world_size),
            dist_init_required=False,
        )
        return engine


class Clock:
    """Where the time between two logs went."""

    def __init__(self) -> None:
        self.data_s = self.teacher_busy_s = 0.0
        self._since = time.perf_counter()
        self._samples = 0
        self._waited_s = 0.0

    def record(self, samples: int, client: TeacherClient | None) -> dict[str, float]:
        """Rates and shares since the last call, which this resets."""
        elapsed = time.perf_counter() - self._since
        waited = client.waited_s if client else 0.0
        teacher_s = waited - self._waited_s
        record = {
            "samples_per_second": (samples - self._samples) / elapsed,
            "data_wait": self.data_s / elapsed,
            "teacher_wait": teacher_s / elapsed,
            "teacher_busy": self.teacher_busy_s / elapsed,
            "compute": 1 - (self.data_s + teacher_s) / elapsed,
        }
        self.data_s = self.teacher_busy_s = 0.0
        self._since, self._samples, self._waited_s = time.perf_counter(), samples, waited
        return record


def _valid(batch: Batch, signal: Signal | None) -> np.ndarray:
    return np.ones(batch.student.size, dtype=bool) if signal is None else signal.valid


def _seed(seed: int) -> None:
    """The same initial weights on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
