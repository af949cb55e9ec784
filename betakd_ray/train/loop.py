"""A student worker's life: build, resume, train, save."""

import itertools
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import ray.train
import ray.train.collective
import torch

from betakd_ray import errors
from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Quarantined, ids_of, require_few
from betakd_ray.data.rows import Batch, collate
from betakd_ray.teacher.cache import CacheWriter
from betakd_ray.teacher.client import TeacherClient, scored
from betakd_ray.teacher.signal import Signal, TeacherFacts
from betakd_ray.tracking import Metrics, from_jsonl, to_jsonl
from betakd_ray.train import checkpoint
from betakd_ray.train.export import export
from betakd_ray.train.learner import GlobalCounts, Learner, Scored, Window, valid_samples
from betakd_ray.train.tally import Totals
from betakd_ray.train.worker import STOPPED, WorkerConfig

COUNTS = ("samples", "dropped", "skipped", "skipped_in_a_row")
"""Of a worker, in a checkpoint's progress."""
QUANTILES = (0.1, 0.5, 0.9)
"""Of β over a global batch."""
LOOK_EVERY_S = 2.0
"""How often the workers look up from training: is a node of theirs to go, is the job to end?"""


class Worker:
    """One rank: its learner, and what it needs from Ray around it."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.spec = config.spec
        self.training = config.spec.training
        self.total_steps = config.total_steps
        facts: TeacherFacts | None = ray.get(config.teacher) if config.teacher else None
        self.learner = Learner(self.spec, facts, self.total_steps)
        self.client: TeacherClient | None = None
        if config.pool and self.spec.teacher:
            self.client = TeacherClient(
                config.pool, self.learner.rank, self.spec.teacher.timeout_s, self.spec.cluster.start_timeout_s
            )
        self.cache = CacheWriter(config.cache, config.plan) if config.cache else None
        self.store = checkpoint.CheckpointStore(config.run, self.spec.output.storage)
        self.metrics = Metrics(self.spec, config.run) if self.learner.rank == 0 else None
        self.clock = Clock()
        self.ledger = config.plan.empty_ledger()
        self.step = self.saved_step = self.samples = self.dropped = self.skipped = self.skipped_in_a_row = 0
        self.looked = time.monotonic()
        self.leaving: list[str] = []
        self.skips: list[dict[str, Any]] = []
        # New at every start of the workers, so that a save never meets the remains of another.
        self.attempt = ray.train.collective.broadcast_from_rank_zero(os.urandom(4).hex())

    def run(self) -> dict[str, Any]:
        """The loop: one screen is one step of training."""
        self.resume()
        for window in self.windows() if self.step < self.total_steps else ():
            counts = self.learner.agree(window, is_due=time.monotonic() - self.looked > LOOK_EVERY_S)
            if counts is None:
                break
            is_logged = self.is_logged(self.step + 1)
            progress = (self.step + 1) / self.total_steps
            totals = self.learner.step(window, counts, progress, statistics=is_logged)
            self.step += 1
            self.account(window, counts)
            self.guard(totals, window)
            if is_logged:
                self.log(totals)
            if self.step == self.total_steps:
                break
            wish = self.look() if counts.is_due else Wish()
            if wish.save or self.step % self.training.checkpoint_every == 0:
                self.save()
            if wish.stop:
                return {STOPPED: self.step}
        if self.step != self.saved_step:
            self.save()
        return self.finish()

    def is_logged(self, step: int) -> bool:
        """Every `log_every` steps, the first and the last."""
        return step % self.training.log_every == 0 or step in (1, self.total_steps)

    # -------------------------------------------------------------------------------------------- batches

    def windows(self) -> Iterator[Window]:
        """One step's micro-batches at a time, each with its signal; short, then empty, when the stream ends."""
        stream: Iterator[Scored] = ((batch, None) for batch in self.batches())
        if self.client and self.spec.teacher:
            stream = scored(self.batches(), self.client, self.spec.teacher.window, self.config.needs, self.cache)
        while True:
            yield list(itertools.islice(stream, self.learner.accumulation))

    def batches(self) -> Iterator[Batch]:
        """Micro-batches of this rank's part of the stream."""
        shard = ray.train.get_dataset_shard("train")
        assert shard is not None
        size = self.training.micro_batch_size
        rows = iter(shard.iter_batches(batch_size=size, batch_format="pyarrow", drop_last=True, prefetch_batches=2))
        while True:
            start = time.perf_counter()
            table = next(rows, None)
            self.clock.data_s += time.perf_counter() - start
            if table is None:
                return
            yield collate(table, self.config.pad_token_id, self.config.image_token_id)

    # ------------------------------------------------------------------------------------- after a step

    def account(self, window: Window, counts: GlobalCounts) -> None:
        """What the step used up."""
        for batch, signal in window:
            valid = valid_samples(batch, signal)
            self.ledger.add(batch.ids.where(valid))
            if signal and not valid.all():
                self.quarantine(batch, signal)
            self.clock.teacher_busy_s += signal.busy_s if signal else 0.0
        self.samples += self.training.global_batch_size
        self.clock.tokens += counts.tokens
        self.dropped += counts.dropped

    def quarantine(self, batch: Batch, signal: Signal) -> None:
        """Samples that the teacher has no answer to. Raises TooManyBadSamples."""
        bad = [
            Quarantined(
                int(batch.ids.epoch[at]),
                int(batch.ids.shard[at]),
                int(batch.ids.index[at]),
                batch.keys[at],
                signal.reasons.get(int(at), "the teacher's output is not finite"),
            )
            for at in np.flatnonzero(~signal.valid)
        ]
        fraction = cast(float, ray.get(self.config.monitor.quarantine.remote(bad)))
        require_few(fraction, self.spec.data, self.config.plan, bad[-1])

    def guard(self, totals: Totals, window: Window) -> None:
        """Note steps whose gradient was not finite. Raises NonFiniteLoss after `max_skipped_steps` in a row."""
        if totals.applied:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.note_skip(window)
        if self.skipped_in_a_row >= self.training.max_skipped_steps:
            last = self.store.latest()
            energies = zip(self.learner.channels, totals.energies.tolist(), strict=True)
            broken = ", ".join(name for name, value in energies if not math.isfinite(value))
            raise errors.NonFiniteLoss(
                f"{self.skipped_in_a_row} steps in a row, up to step {self.step}, had a loss or gradient that is not "
                f"finite. Last good checkpoint: {last.name if last else 'none'}. Not finite: {broken or 'a gradient'}. "
                "Start anew, under another name, with a lower optimizer.lr or precision fp32."
            )

    def note_skip(self, window: Window) -> None:
        """Collective: which samples were in the step that was skipped, in skipped.jsonl."""
        plan = self.config.plan
        mine = [
            {"epoch": int(epoch), "shard": plan.shards[shard].url, "index": int(index), "key": key}
            for batch, _ in window
            for epoch, shard, index, key in zip(
                batch.ids.epoch, batch.ids.shard, batch.ids.index, batch.keys, strict=True
            )
        ]
        everyone = checkpoint.gather(mine)
        if self.metrics:
            self.skips.append({"step": self.step, "samples": [sample for part in everyone for sample in part]})
            self.metrics.write(checkpoint.SKIPPED, to_jsonl(self.skips))

    def look(self) -> "Wish":
        """Collective: what the cluster and the driver want of the job."""
        self.looked = time.monotonic()
        preemption = ray.train.get_preemption_info()
        leaving = preemption.preempted_node_ids if preemption else []
        is_new, self.leaving = leaving != self.leaving, leaving
        stopping = ray.get(self.config.monitor.is_stopping.remote()) if self.metrics else None
        stop = cast(bool, ray.train.collective.broadcast_from_rank_zero(stopping))
        return Wish(save=stop or (is_new and bool(leaving)), stop=stop)

    def log(self, totals: Totals) -> None:
        """Collective: numbers of this step (paper Figures 4–6, Table 6) and of the time since the last log."""
        betas = self.learner.tally.betas()
        if self.metrics is None:
            return
        record: dict[str, Any] = {"step": self.step, "time": time.time()}
        record |= {"loss": totals.loss.item(), "samples": self.samples}
        quantiles = betas.nanquantile(torch.tensor(QUANTILES, device=betas.device), dim=0)
        quantiles = quantiles.nan_to_num()  # zero, as the mean is, of a channel that no sample has
        by_channel = {
            "energy": totals.energies,
            "weighted": totals.weighted,
            "beta": totals.beta,
            **{f"beta_p{round(100 * q)}": row for q, row in zip(QUANTILES, quantiles, strict=True)},
            "beta_saturated": self.learner.weighting.saturated(betas),
        }
        for kind, values in by_channel.items():
            columns = zip(self.learner.channels, values.tolist(), strict=True)
            record |= {f"{kind}/{name}": value for name, value in columns}
        record |= {f"moving/{name}": value.item() for name, value in self.learner.curriculum.values().items()}
        record |= dict(zip(self.learner.distiller.rows.measures, totals.statistics.tolist(), strict=True))
        engine = self.learner.engine
        record |= {"lr": engine.get_lr()[0], "grad_norm": float(engine.get_global_grad_norm() or 0.0)}
        record |= {
            "dropped_samples": self.dropped,
            "skipped_steps": self.skipped,
            "quarantined_samples": ray.get(self.config.monitor.count_quarantined.remote()),
            **self.clock.record(self.samples, self.client),
        }
        record["peak_memory_gb"] = _peak_memory(self.learner.device) / 1e9
        self.metrics.log(record)
        self.config.monitor.log.remote(record)

    # ---------------------------------------------------------------------------- checkpoint and result

    def save(self) -> None:
        """Collective: a checkpoint of everything a resume needs."""
        if self.cache:
            self.cache.flush()
        self.merge_ledgers()
        start = time.monotonic()
        checkpoint.save(self.store, self.step, self.attempt, self.training.keep, self.write)
        self.saved_step = self.step
        self.clock.saved(time.monotonic() - start)
        if self.metrics:
            self.config.monitor.committed.remote()

    def merge_ledgers(self) -> None:
        """Collective: every rank's ledger becomes everyone's."""
        for part in checkpoint.gather(self.ledger.to_json()):
            self.ledger.merge(Ledger.from_json(part))

    def write(self, folder: Path) -> None:
        """Collective: this rank's files of a checkpoint."""
        self.learner.save(folder)
        if self.metrics is None:
            return
        progress = {name: getattr(self, name) for name in COUNTS}
        quarantined = cast(list[Quarantined], ray.get(self.config.monitor.quarantined.remote()))
        # What a former attempt set aside may have gone well since.
        done = self.ledger.holds(ids_of(quarantined))
        quarantined = [asdict(bad) for bad, is_done in zip(quarantined, done, strict=True) if not is_done]
        (folder / checkpoint.PROGRESS).write_text(json.dumps(progress))
        (folder / checkpoint.LEDGER).write_text(self.ledger.to_json())
        (folder / checkpoint.QUARANTINE).write_text(to_jsonl(quarantined))
        (folder / checkpoint.SKIPPED).write_text(to_jsonl(self.skips))
        (folder / checkpoint.METRICS).write_text(self.metrics.reference())
        (folder / checkpoint.SPEC).write_text(self.spec.model_dump_json(indent=2))
        self.metrics.flush()

    def resume(self) -> None:
        """Collective: continue from the newest committed checkpoint, if there is one."""
        # One rank looks, or a commit that arrives just now could part them.
        manifest = ray.train.collective.broadcast_from_rank_zero(self.store.latest() if self.metrics else None)
        if manifest is None:
            if self.metrics:
                self.metrics.restore(None)
            return
        with self.store.on_disk(manifest, self.attempt) as folder:
            self.learner.load(folder)
        self.ledger = self.store.ledger(manifest)
        progress = json.loads(self.store.read_text(manifest, checkpoint.PROGRESS))
        if self.metrics:
            self.metrics.restore(self.store.read_text(manifest, checkpoint.METRICS))
            self.skips = from_jsonl(self.store.read_text(manifest, checkpoint.SKIPPED))
        self.step = self.saved_step = manifest.step
        for name in COUNTS:
            setattr(self, name, progress[name])
        self.clock = Clock(self.samples)

    def finish(self) -> dict[str, Any]:
        """Collective: export the student; rank 0 returns the outcome."""
        last = self.metrics.last if self.metrics else {}
        export(self.learner.engine, self.spec, self.config.run, last)
        if self.metrics is None:
            return {}
        self.metrics.close()
        return {"steps": self.step, "metrics": last, "consumed": self.ledger.count, "skipped_steps": self.skipped}


@dataclass(frozen=True)
class Wish:
    """What is wanted of the workers before the next step."""

    save: bool = False
    stop: bool = False


class Clock:
    """Where the time between two logs went, and the last checkpoint's."""

    def __init__(self, samples: int = 0) -> None:
        self.data_s = self.teacher_busy_s = 0.0
        self.tokens = 0
        self._since = time.perf_counter()
        self._samples = samples
        self._waited_s = 0.0
        self._saved = time.monotonic()
        self._save_s = 0.0

    def saved(self, duration_s: float) -> None:
        """A checkpoint is committed."""
        self._saved, self._save_s = time.monotonic(), duration_s

    def record(self, samples: int, client: TeacherClient | None) -> dict[str, float]:
        """Rates and shares since the last call, which this resets."""
        elapsed = time.perf_counter() - self._since
        waited = client.waited_s if client else 0.0
        teacher_s = waited - self._waited_s
        record = {
            "samples_per_second": (samples - self._samples) / elapsed,
            "tokens_per_second": self.tokens / elapsed,
            "data_wait": self.data_s / elapsed,
            "teacher_wait": teacher_s / elapsed,
            "teacher_busy": self.teacher_busy_s / elapsed,
            "compute": 1 - (self.data_s + teacher_s) / elapsed,
            "queue_depth": client.queue_depth if client else 0,
            "checkpoint_age_s": time.monotonic() - self._saved,
            "checkpoint_s": self._save_s,
        }
        self.data_s = self.teacher_busy_s = 0.0
        self.tokens = 0
        self._since, self._samples, self._waited_s = time.perf_counter(), samples, waited
        return record


def _peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU of tensors, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
