"""The training loop of a student worker: build, resume, train, save."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import torch.distributed as dist

from betakd_ray import errors
from betakd_ray.batch.packing import stack
from betakd_ray.batch.sample import Sample
from betakd_ray.data.ledger import SampleIds
from betakd_ray.data.plan import Quarantined, ids_of, require_few
from betakd_ray.data.rows import samples_of
from betakd_ray.on_ray.monitor import require_current
from betakd_ray.on_ray.spares import keep_spare
from betakd_ray.on_ray.watch import Start, Watch
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.folder import LEDGER, LOGGED, PROGRESS, QUARANTINE, SKIPPED, SPEC
from betakd_ray.run.metrics import to_jsonl
from betakd_ray.run.records import PROGRESS_FILE, SKIPPED_FILE
from betakd_ray.teacher.cache import CacheWriter
from betakd_ray.teacher.client import TeacherClient
from betakd_ray.teacher.remote import RemotePool
from betakd_ray.teacher.signals import SignalSource
from betakd_ray.tracking import MetricsWriter
from betakd_ray.train import checkpoint
from betakd_ray.train.activities import Activities
from betakd_ray.train.agreement import gather_over
from betakd_ray.train.clock import StepClock
from betakd_ray.train.config import STOPPED, WorkerConfig
from betakd_ray.train.export import export_student
from betakd_ray.train.feed import Feed
from betakd_ray.train.held_out import HeldOut
from betakd_ray.train.learner import Learner
from betakd_ray.train.micro_batches import Collator, Refused, Step
from betakd_ray.train.prefetch import Prefetch
from betakd_ray.train.sums import Totals
from betakd_ray.train.teacher_checks import check_new_student, tell
from betakd_ray.train.usage import Usage, of_channels, peak_memory

COUNTS = ("samples", "dropped", "skipped", "skipped_in_a_row")
"""Counters of a worker that a checkpoint keeps in progress.json."""
LISTED_SAMPLES = 100_000
"""Largest number of samples of skipped steps that are listed, because the list is written whole each time."""


class Worker:
    """One rank: its learner, its feed, and their connections to Ray."""

    held_out: HeldOut | None = None

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.spec = config.spec
        self.training = config.spec.training
        self.total_steps = config.total_steps
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.start = cast(Start, ray.get(config.monitor.starts_from.remote()))
        self.step = 0
        self.activities = Activities()
        # Started before all collectives, those of DeepSpeed's start among them: they have no short timeout, and a dead
        # rank would block the others in them.
        self.watch = Watch(
            config.monitor,
            self.rank,
            self.ranks,
            self.start.attempt,
            self.training.collective_timeout_s,
            lambda: f"step {self.step + 1}, its feed at {self.activities.present or 'rest'}",
        )
        self.client: TeacherClient | None = None
        if config.pool and self.spec.teacher:
            self.client = TeacherClient(
                RemotePool(config.pool),
                self.rank,
                self.ranks,
                self.spec.teacher,
                self.spec.cluster.start_timeout_s,
                partial(stack, pad_token_id=config.pad_token_id, image_token_id=config.teacher_image_token_id),
            )
        head = self.client.head() if self.client else None
        is_new = self.rank == 0 and self.start.checkpoint is None
        check = partial(check_new_student, config) if is_new else None
        self.learner = Learner(self.spec, config.facts, self.total_steps, head, check)
        self.cache = CacheWriter(config.cache, keep=config.plan.epochs > 1) if config.cache else None
        self.permit = config.permit.requiring(partial(require_current, config.monitor, self.start, config.run))
        self.store = CheckpointStore(config.run, self.spec.output.storage, self.permit, config.origins)
        warn = partial(tell, config.monitor)
        self.metrics = MetricsWriter(self.spec, config.run, config.permit.token, warn) if self.rank == 0 else None
        self.ledger = config.plan.empty_ledger() if self.rank == 0 else None
        """Samples of all ranks that took part in a step, up to the last checkpoint; only rank 0 has it."""
        self.trained: list[SampleIds] = []
        """This rank's samples since the last checkpoint."""
        self.saved_step = self.samples = self.dropped = self.skipped = self.skipped_in_a_row = 0
        self.saved_token = config.permit.token  # of the driver that has committed `saved_step`
        self.skips: list[dict[str, Any]] = []
        self.clock, self.usage = StepClock(self.learner.device), Usage()
        self.saved_at, self.save_s = time.monotonic(), 0.0
        self.saver = checkpoint.Saver(
            self.store, self.start.attempt, self.training.keep, self.learner.save_group, self.note_commit
        )

    def run(self) -> dict[str, Any]:
        """Resume, train to the end or until the job is to stop, and return the outcome. Collective."""
        with ExitStack() as threads:
            # Closed last: this rank must count as alive while it saves, exports the model and writes the cache.
            threads.callback(self.watch.close)
            if self.metrics:
                threads.callback(self.metrics.end_trackers)
            self.resume()
            if data := self.config.held_out:
                self.held_out = HeldOut.of(ray.get(data), self.collator, self.client, self.learner.host_group)
            feed, prefetch = self.feed(threads)
            for step, batches in prefetch.steps():
                self.saver.check()
                self.note_stalls(prefetch)
                is_logged = self.is_logged(step.number)
                progress = step.number / self.total_steps
                totals = self.learner.step(
                    batches, step.counts, step.number, progress, statistics=is_logged, clock=self.clock
                )
                self.note_stalls(prefetch, within="forward_backward")
                self.account(step)
                self.guard(totals, step)
                if is_logged:
                    self.log(totals, step, self.evaluate(step.number))
                keep_spare()
                if self.step < self.total_steps and (
                    step.counts.save or self.step % self.training.checkpoint_every == 0
                ):
                    self.save()
            # Also after another driver's last step: the last checkpoint, model and result have one token.
            if self.step != self.saved_step or self.saved_token != self.config.permit.token:
                self.save()
            self.saver.wait()
            # The feeds agreed to stop, so all ranks left the loop after the same step, and have saved that step.
            if feed.was_stopped:
                return {STOPPED: self.step}
            return self.finish()

    def is_logged(self, step: int) -> bool:
        """Return whether a step's numbers are logged: every `log_every` steps, first, last, and evaluated ones."""
        return step % self.training.log_every == 0 or step in (1, self.total_steps) or self.is_evaluated(step)

    def is_evaluated(self, step: int) -> bool:
        """Return whether the student is evaluated after a step: every `evaluation.every` steps, and after the last."""
        evaluation = self.spec.evaluation
        return evaluation is not None and (step % evaluation.every == 0 or step == self.total_steps)

    def evaluate(self, step: int) -> dict[str, float]:
        """Return the numbers on the held-out samples, if the student is evaluated after this step. Collective."""
        if self.held_out is None or not self.is_evaluated(step):
            return {}
        with self.clock.phase("evaluate"):
            return self.held_out.evaluate(self.learner)

    # -------------------------------------------------------------------------------------------- what feeds it

    @property
    def collator(self) -> Collator:
        """Return the function that cuts samples into this job's micro-batches."""
        config, limits = self.config, (self.training.micro_batch_samples, self.training.micro_batch_tokens)
        return Collator(config.pad_token_id, config.image_token_id, config.needs, config.facts, *limits)

    def feed(self, threads: ExitStack) -> tuple[Feed, Prefetch]:
        """Start the threads that prepare this rank's steps; closing `threads` ends them."""
        config, teacher = self.config, self.spec.teacher
        tokens = teacher.batch_tokens if teacher else 0
        feed = Feed(
            self.rows(),
            SignalSource(
                self.client,
                tokens,
                config.cache,
                self.cache,
                config.plan.shards,
                config.facts.dtype if config.facts else "float32",
            ),
            self.collator,
            gather_over(self.learner.feed_group),
            rank=self.rank,
            ranks=self.ranks,
            global_batch=self.training.global_batch_size,
            steps=range(self.step + 1, self.total_steps + 1),
            control=self.watch,
            activities=self.activities,
            window_tokens=teacher.window * tokens if teacher else 0,
            on_refused=self.quarantine,
        )
        prefetch = Prefetch(feed, self.learner.loader)
        # Closed in the reverse order: first the feed, so that no new signals are asked for while the cache is closed.
        for part in (self.client, self.cache, prefetch):
            if part is not None:
                threads.callback(part.close)
        return feed, prefetch

    def rows(self) -> Iterator[Sample]:
        """Yield the samples of this rank's part of the stream, in the order of the stream."""
        shard = ray.train.get_dataset_shard("train")
        assert shard is not None
        # With None, Ray gives whole blocks as they are. With a number, it would cut and join them.
        for table in shard.iter_batches(batch_size=cast(Any, None), batch_format="pyarrow", prefetch_batches=2):
            yield from samples_of(cast(Any, table))

    def quarantine(self, refused: list[Refused]) -> None:
        """Put samples into quarantine that the teacher cannot answer. Raises TooManyBadSamples."""
        bad = [Quarantined(sample.epoch, sample.shard, sample.index, sample.key, reason) for sample, reason in refused]
        fraction = cast(float, ray.get(self.config.monitor.quarantine.remote(bad)))
        require_few(fraction, self.spec.data, self.config.plan, bad[-1])

    # ------------------------------------------------------------------------------------- after a step

    def note_stalls(self, prefetch: Prefetch, within: str = "") -> None:
        """Note how long the training waited for its feed. The teacher pool is told, because it grows on such waits."""
        stalls = prefetch.take_stalls()
        self.clock.stalled(stalls, within=within)
        if self.client and "teacher_wait" in stalls:
            self.client.report_waiting(stalls["teacher_wait"])

    def account(self, step: Step) -> None:
        """Add the step's samples and tokens to the counters."""
        self.step = step.number
        self.trained.append(ids_of(step.samples))
        self.samples += step.counts.samples + step.counts.dropped
        self.dropped += step.counts.dropped
        self.usage.add(step)

    def guard(self, totals: Totals, step: Step) -> None:
        """Note a step that was skipped because its gradient was not finite.

        Raises NonFiniteLoss after `max_skipped_steps` such steps in a row.
        """
        if totals.applied:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        # Collective, but no rank is alone here: `applied` is equal on all ranks.
        self.note_skip(step)
        if self.skipped_in_a_row >= self.training.max_skipped_steps:
            last = self.store.latest()
            energies = zip(self.learner.channels, totals.energies.tolist(), strict=True)
            broken = ", ".join(name for name, value in energies if not math.isfinite(value))
            raise errors.NonFiniteLoss(
                f"{self.skipped_in_a_row} steps in a row, up to step {self.step}, had a loss or gradient that is not "
                f"finite. Last good checkpoint: {last.name if last else 'none'}. Not finite: {broken or 'a gradient'}. "
                "Start a new job, under another name, with a lower optimizer.lr or precision fp32."
            )

    def note_skip(self, step: Step) -> None:
        """Write the samples of the newest skipped steps to skipped.jsonl. Collective."""
        plan = self.config.plan
        mine = [
            {"epoch": each.epoch, "shard": plan.shards[each.shard].url, "index": each.index, "key": each.key}
            for each in step.samples
        ]
        everyone = checkpoint.gather(mine, self.learner.host_group)
        if self.metrics:
            self.skips.append({"step": self.step, "samples": [sample for part in everyone for sample in part]})
            del self.skips[: -max(1, LISTED_SAMPLES // self.training.global_batch_size)]
            self.metrics.write(SKIPPED, to_jsonl(self.skips))

    def log(self, totals: Totals, step: Step, evaluation: dict[str, float]) -> None:
        """Log this step's numbers (paper Figures 4–6, Table 6), and the timing since the last record. Collective.

        `evaluation` has the numbers on held-out samples; it is empty if the student was not evaluated.
        """
        betas = self.learner.sums.betas()
        seconds = self.clock.read()
        mean, slowest = self.learner.mean_and_max({**seconds, "teacher_busy": self.usage.teacher_busy_s})
        # All that is collective is above: only rank 0 goes on from here.
        usage, self.usage = self.usage, Usage()
        if self.metrics is None:
            return
        with self.clock.phase("log"):
            record: dict[str, Any] = {"step": self.step, "time": time.time()}
            record |= {"loss": totals.loss.item(), "samples": self.samples}
            record |= of_channels(totals, betas, self.learner.weighting.saturated(betas), self.learner.channels)
            record |= {f"moving/{name}": value.item() for name, value in self.learner.curriculum.values().items()}
            record |= dict(zip(self.learner.distiller.rows.measures, totals.statistics.tolist(), strict=True))
            engine = self.learner.engine
            record |= {"lr": engine.get_lr()[0], "grad_norm": float(engine.get_global_grad_norm() or 0.0)}
            record |= {
                "dropped_samples": self.dropped,
                "skipped_steps": self.skipped,
                "quarantined_samples": self.watch.quarantined,
                "queue_depth": self.client.in_flight if self.client else 0,
                "checkpoint_age_s": time.monotonic() - self.saved_at,
                "checkpoint_s": self.save_s,
                "peak_memory_gb": peak_memory(self.learner.device) / 1e9,
            }
            record |= usage.rates(mean, slowest, self.ranks)
            if (peak := self.learner.peak_flops) and (flops := self.learner.flops):
                record["flops_utilisation"] = usage.flops(flops) / mean["elapsed"] / (peak * self.ranks)
            record |= evaluation
            self.metrics.log(record)
            self.config.monitor.log.remote(record)

    # ---------------------------------------------------------------------------- checkpoint and result

    def save(self) -> None:
        """Take a checkpoint with everything that a resume needs. Collective; a thread stores it."""
        with self.clock.phase("save"):
            # Before `write`, in which rank 0 stores the ledger: a resume would repeat the samples that it lacks.
            self.merge_trained()
            # A resume counts on the records that this checkpoint refers to.
            self.saver.save(self.step, self.write, self.metrics.flush if self.metrics else lambda: None)
        self.saved_step, self.saved_token = self.step, self.config.permit.token

    def note_commit(self, step: int, seconds: float) -> None:
        """Note a commit, `seconds` after the save began. Called by the saver's thread on rank 0."""
        self.saved_at, self.save_s = time.monotonic(), seconds
        self.config.monitor.committed.remote(step)

    def merge_trained(self) -> None:
        """Add every rank's samples since the last checkpoint to rank 0's ledger. Collective.

        Raises TrainingError if a sample was trained on twice.
        """
        delta = self.config.plan.empty_ledger()
        delta.add(SampleIds.joined(self.trained))
        self.trained = []
        checkpoint.merge_ledgers(self.ledger, delta, self.learner.host_group)

    def write(self, folder: Path) -> None:
        """Write this rank's files of a checkpoint; rank 0 also writes the job's. Collective."""
        self.learner.save(folder)
        if self.metrics is None or self.ledger is None:
            return
        progress = {name: getattr(self, name) for name in COUNTS}
        quarantined = cast(list[Quarantined], ray.get(self.config.monitor.quarantined.remote()))
        # A sample that an earlier attempt put into quarantine may have been trained on since. It must not be in both.
        done = self.ledger.holds(ids_of(quarantined))
        quarantined = [asdict(bad) for bad, is_done in zip(quarantined, done, strict=True) if not is_done]
        (folder / PROGRESS).write_text(json.dumps(progress))
        (folder / LEDGER).write_text(self.ledger.to_json())
        (folder / QUARANTINE).write_text(to_jsonl(quarantined))
        (folder / SKIPPED).write_text(to_jsonl(self.skips))
        (folder / LOGGED).write_text(self.metrics.reference())
        (folder / SPEC).write_text(self.spec.model_dump_json(indent=2))

    def resume(self) -> None:
        """Continue from the checkpoint that the stream of rows was made for, if there is one. Collective.

        It need not be the newest: workers of an earlier start that had not ended yet may have committed another one
        meanwhile. The samples of that one are in this stream, so a resume from it would train on them twice.
        """
        if self.start.checkpoint is None:
            if self.metrics:
                self.metrics.restore(None)
            return
        try:
            self.load(self.start.checkpoint)
        except errors.CheckpointDamaged as error:
            # Before the restart, whose rows are made for the newest checkpoint that is not rejected.
            self.store.reject(self.start.checkpoint, str(error))
            raise

    def load(self, name: str) -> None:
        """Load the state of this rank from the checkpoint of that name. Collective."""
        manifest = self.store.named(name)
        with checkpoint.on_disk(self.store, manifest, self.start.attempt, self.learner.host_group) as folder:
            self.learner.load(folder)
        progress = self.store.parsed(manifest, PROGRESS_FILE)
        if self.metrics:
            self.ledger = self.store.ledger(manifest, self.config.plan)
            self.metrics.restore(checkpoint.metrics_reference(self.store, manifest))
            self.skips = [asdict(skip) for skip in self.store.parsed(manifest, SKIPPED_FILE)]
        self.step = self.saved_step = manifest.step
        self.saved_token = manifest.token
        for name in COUNTS:
            setattr(self, name, getattr(progress, name))

    def finish(self) -> dict[str, Any]:
        """Export the student; rank 0 returns the outcome, the others {}. Collective."""
        last = self.metrics.last if self.metrics else {}
        export_student(self.learner.engine, self.spec, self.permit, last, self.learner.host_group, step=self.step)
        if self.metrics is None or self.ledger is None:
            return {}
        self.permit.check()
        self.metrics.close()
        return {"steps": self.step, "metrics": last, "consumed": self.ledger.count, "skipped_steps": self.skipped}
