"""The simulated job: the real code of a job, of which only the models, the data and Ray are replaced."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache, partial
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import ray.data
import torch

from betakd_ray.batch.sample import Rendering, Sample
from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Pass, Plan, Quarantined, ids_of
from betakd_ray.data.render import Renderer
from betakd_ray.data.shards import Shard
from betakd_ray.job import BetaKDJob
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.records import Logged
from betakd_ray.spec import JobSpec, parse_spec
from betakd_ray.train import checkpoint as saving
from betakd_ray.train.agreement import StepCounts, TokenCounts
from betakd_ray.train.clock import StepClock
from betakd_ray.train.loop import Worker
from betakd_ray.train.micro_batches import Refused, Step
from betakd_ray.train.prefetch import Prefetch
from betakd_ray.train.sums import Totals
from betakd_ray.train.usage import Usage
from tests.simulation.cluster import Group
from tests.simulation.scheduler import Scheduler

SHARDS = (Shard("/data/a.tar", 7, 100, "0a"), Shard("/data/b.tar", 5, 100, "0b"), Shard("/data/c.tar", 3, 100, "0c"))
EPOCHS, BATCH = 2, 4
UNREADABLE = {(0, 1), (2, 2)}
"""(shard, index) of samples that no reader can decode."""
RUN = "simulated://runs/job"
BLANK = Rendering(np.zeros(2, np.int32), np.array([False, True]))
NOTHING = torch.zeros(())
TOTALS = Totals(NOTHING, NOTHING[None], NOTHING[None], NOTHING[None], NOTHING[None], applied=True)
STEP_S = (0.5, 1.0, 3.0)
"""Seconds that a step takes."""

Place = tuple[int, int, int]


@lru_cache
def plan() -> Plan:
    """Return the plan of every simulated job."""
    return Plan.of([Pass(shard, shard.samples) for shard in SHARDS], EPOCHS, 0, True)


@lru_cache
def spec(checkpoint_every: int, ranks: int) -> JobSpec:
    """Return the spec of a simulated job. Only what may differ between two drivers of a run is a parameter."""
    return parse_spec(
        {
            "name": "job",
            "data": {"train": "/data/*.tar", "max_bad_fraction": 0.9},
            "student": {"init": {"path": "org/student", "kind": "checkpoint"}},
            "training": {
                "epochs": EPOCHS,
                "global_batch_size": BATCH,
                "workers": ranks,
                "checkpoint_every": checkpoint_every,
                "keep": 2,
                "max_failures": 9,
            },
            "output": {"path": "simulated://runs", "if_running": "wait"},
            "tracking": {"progress": False},
        }
    )


@cache
def sample(place: Place) -> Sample:
    """Return a sample of the plan."""
    return Sample(*place, place[2], str(place), BLANK, BLANK)


class Rows(ray.data.Dataset):
    """The rows of one start of the workers: the samples that are not done, in the plan's order."""

    def __init__(self, places: list[Place]) -> None:
        self.places = places

    def __del__(self) -> None: ...

    @classmethod
    def of(cls, reader: Any, plan: Plan, done: Ledger, *_: Any) -> "Rows":
        """Return what `on_ray.stream.stream` would make Ray Data read."""
        return cls(
            [
                (epoch, shard, int(index))
                for epoch in range(plan.epochs)
                for shard in plan.order(epoch).tolist()
                for index in np.flatnonzero(~done.done(epoch, shard))
            ]
        )


@dataclass
class Attempt:
    """One start of the workers: its rows, and how they are divided into steps."""

    rows: Rows
    group: Group
    host_group: Group
    save_group: Group
    """Process group of the savers' threads, which take no part in collectives of another."""
    random: Random
    monitor: Any
    steps: list[tuple[list[Place], list[Place], bool]] = field(default_factory=list)
    """Samples of each step, those of them that the teacher refuses, and whether a checkpoint is asked for."""

    def step(self, number: int) -> tuple[list[Place], list[Place], bool] | None:
        """Return the `number`-th step of this start; None if the rows do not fill it."""
        while len(self.steps) <= number:
            taken = [self.rows.places.pop(0) for _ in range(min(BATCH, len(self.rows.places)))]
            bad = [place for place in taken if place[1:] in UNREADABLE]
            self.monitor.quarantine.remote([Quarantined(*place, str(place), "no image") for place in bad])
            good = [place for place in taken if place not in bad]
            if bad and self.rows.places:
                self.rows.places[:0] = good
                continue
            if len(good) < BATCH:
                return None
            refused = [place for place in good if self.random.random() < 0.04]
            self.steps.append((good, refused, self.random.random() < 0.1))
        return self.steps[number]


class Learner:
    """A student whose state is the list of the samples that it was trained on."""

    def __init__(self, scheduler: Scheduler, group: Group, rank: int) -> None:
        self.trained: list[Place] = []
        self.host_group = cast(Attempt, group.attempt).host_group
        self.engine = SimpleNamespace(module=SimpleNamespace(student=SimpleNamespace(config=None)))
        self._scheduler, self._group, self._rank = scheduler, group, rank

    def step(self, samples: list[Sample], *_: Any, **__: Any) -> Totals:
        self._scheduler.pause(self._scheduler.random.choice(STEP_S))
        self._group.exchange(None)
        self.trained += [(each.epoch, each.shard, each.index) for each in samples]
        return TOTALS

    def save(self, folder: Any) -> None:
        (folder / f"trained-{self._rank}.json").write_text(json.dumps(self.trained))

    def load(self, folder: Any) -> None:
        if self._rank == 0:  # the others go on with what they add, as the number of ranks may differ
            files = (path for path in folder.rglob("*") if path.name.startswith("trained-"))
            self.trained = [tuple(place) for path in sorted(files) for place in json.loads(path.read_text())]


class Metrics:
    """Rank 0's metrics, which the simulation does not write."""

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}

    def reference(self) -> str:
        return json.dumps(asdict(Logged(0, 0)))

    def restore(self, reference: str | None) -> None: ...
    def flush(self) -> None: ...
    def end_trackers(self) -> None: ...
    def close(self) -> None: ...


class Steps(Prefetch):
    """The steps of one rank, in place of those that a thread prepares."""

    def __init__(self, steps: Iterator[tuple[Step, Any]]) -> None:
        self._made = steps

    def steps(self) -> Any:
        return self._made

    def take_stalls(self) -> dict[str, float]:
        return {}


class SimulatedWorker(Worker):
    """A rank whose learner and feed are simulated. How it resumes, saves and finishes is the real code."""

    def __init__(self, config: Any) -> None:
        from betakd_ray.train import loop

        self.scheduler = cast(Scheduler, cast(Any, loop.dist)._scheduler)
        process = self.scheduler.thread.process
        self.config, self.spec, self.training = config, config.spec, config.spec.training
        self.total_steps = config.total_steps
        self.rank, self.ranks = process.rank, process.group.ranks
        self.attempt = cast(Attempt, process.group.attempt)
        self.start = config.monitor.starts_from.remote()
        self.watch = cast(Any, SimpleNamespace(close=lambda: None))
        self.client = self.cache = None
        self.learner = cast(Any, Learner(self.scheduler, process.group, self.rank))
        self.permit = config.permit.requiring(partial(loop.require_current, config.monitor, self.start, config.run))
        self.store = CheckpointStore(config.run, self.spec.output.storage, self.permit, config.origins)
        self.metrics = cast(Any, Metrics()) if self.rank == 0 else None
        self.ledger = config.plan.empty_ledger() if self.rank == 0 else None
        self.trained, self.skips = [], []
        self.step = self.saved_step = self.samples = self.dropped = self.skipped = self.skipped_in_a_row = 0
        self.saved_token = config.permit.token
        self.clock, self.usage = StepClock(torch.device("cpu")), Usage()
        self.saved_at = self.save_s = 0.0
        save_group = cast(Any, self.attempt.save_group)
        self.saver = saving.Saver(self.store, self.start.attempt, self.training.keep, save_group, self.note_commit)

    def feed(self, threads: ExitStack) -> Any:
        self.begun_at = self.step
        feed = SimpleNamespace(was_stopped=False)
        return feed, Steps(self._steps(feed))

    def _steps(self, feed: Any) -> Iterator[tuple[Step, Any]]:
        for number in range(self.step + 1, self.total_steps + 1):
            is_stopping = self.config.monitor._instance._is_stopping
            feed.was_stopped = any(self.learner._group.exchange(is_stopping))
            part = None if feed.was_stopped else self.attempt.step(number - self.begun_at - 1)
            if part is None:
                return
            good, refused, is_saved = part
            mine = [sample(place) for place in good[self.rank :: self.ranks]]
            if bad := [Refused(each, "no answer") for each in mine if (each.epoch, each.shard, each.index) in refused]:
                self.quarantine(bad)
            kept = [each for each in mine if (each.epoch, each.shard, each.index) not in refused]
            counts = StepCounts(BATCH - len(refused), len(refused), BATCH, 1, 0, 0, TokenCounts(), is_saved)
            yield Step(number, counts, (), kept), kept

    def log(self, totals: Totals, step: Step, evaluation: dict[str, float]) -> None:
        if self.metrics:
            self.metrics.last = {"step": self.step}


class SimulatedJob(BetaKDJob):
    """A job without models and data."""

    def renderers(self) -> dict[str, Renderer]:
        made = object.__new__(Renderer)
        made.image_token_id, made.tokenizer = 0, SimpleNamespace(pad_token_id=0)
        return {"student": made}

    def _digests(self, renderers: dict[str, Renderer]) -> dict[str, str]:
        return {"student.init": "the student"}

    def _say_who_waits(self) -> None: ...


def ids(places: list[Place]) -> Any:
    """Return places as the ledger takes them."""
    return ids_of([Quarantined(*place, "", "") for place in places])
