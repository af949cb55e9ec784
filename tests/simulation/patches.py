"""The code under test, with the simulation in place of the machine, the cluster, the data and the models."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import fsspec.core
import pytest
import tenacity
import tenacity.nap

from betakd_ray import holder, job, sigterm
from betakd_ray.data.plan import Pass
from betakd_ray.on_ray import monitor, source
from betakd_ray.run import audit, checkpoint, claim, lease
from betakd_ray.run.files import SPEC_FILE
from betakd_ray.run.folder import MODEL_RECORD
from betakd_ray.run.manifest import Manifest
from betakd_ray.run.records import ModelRecord
from betakd_ray.spec import DataSpec
from betakd_ray.teacher import client, pool, signals, starting
from betakd_ray.train import checkpoint as saving
from betakd_ray.train import export, loop, students, worker
from tests.simulation.answers import Executor, TeacherSchedule
from tests.simulation.cluster import RAY, Background, Clock, Distributed, OneAtATime, threading_of
from tests.simulation.folders import folder
from tests.simulation.job import SHARDS, Rows, SimulatedWorker
from tests.simulation.schedule import Schedule
from tests.simulation.scheduler import Scheduler

RUN, TEACHERS = "run", "teachers"
"""What a schedule is about."""


@contextmanager
def patched() -> Iterator[Callable[..., Schedule | TeacherSchedule]]:
    """Yield a function that runs the schedule of a seed: of a run, or with `TEACHERS` of teachers and their clients."""
    with pytest.MonkeyPatch.context() as patch:
        _replace_what_stays(patch)
        logging.disable(logging.CRITICAL)

        def run(seed: int, kind: str = RUN) -> Schedule | TeacherSchedule:
            with pytest.MonkeyPatch.context() as inner:
                if kind == TEACHERS:
                    schedule = TeacherSchedule(seed)
                    _replace_of_teachers(inner, schedule.scheduler)
                else:
                    schedule = Schedule(seed)
                    _replace_of_schedule(inner, schedule)
                schedule.run()
            return schedule

        try:
            yield run
        finally:
            logging.disable(logging.NOTSET)


def _replace_what_stays(patch: pytest.MonkeyPatch) -> None:
    for module in (job, source, loop, worker, students, monitor):
        patch.setattr(module, "ray", RAY)
    patch.setattr(source, "stream", Rows.of)
    patch.setattr(loop, "Worker", SimulatedWorker)
    patch.setattr(worker, "remove_temporary", lambda: None)
    for name, value in (
        ("find_passes", lambda data: [Pass(shard, shard.samples) for shard in SHARDS]),
        ("connected", lambda spec: nullcontext()),
        ("on_sigterm", lambda stop: nullcontext()),
        ("on_driver_node", lambda: None),
    ):
        patch.setattr(job, name, value)
    for module in (saving, export):
        patch.setattr(module, "temporary_folder", folder)
    patch.setattr(saving, "owned", folder)
    patch.setattr(saving, "os", SimpleNamespace(environ={"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}))
    patch.setattr(checkpoint, "ThreadPoolExecutor", OneAtATime)
    # Cached, because these take longer than all else here. They depend on their arguments alone.
    patch.setattr(claim, "version", lru_cache(claim.version))
    patch.setattr(fsspec.core, "url_to_fs", lru_cache(fsspec.core.url_to_fs))
    patch.setattr(Manifest, "parse", lru_cache(Manifest.parse))
    for module in (audit, claim):
        patch.setattr(module, "SPEC_FILE", replace(SPEC_FILE, parse=lru_cache(SPEC_FILE.parse)))
    patch.setattr(export, "_student_state", lambda engine, spec: {})
    patch.setattr(export, "_save", lambda student, state, spec, folder: None)
    patch.setattr(export, "student_processor", lambda spec: None)
    patch.setattr(export, "generation_settings", lambda *_: None)
    patch.setattr(export, "save_prompt", _save_record)
    patch.setattr(export, "takes_images", lambda student: True)
    patch.setattr(export, "Snippet", SimpleNamespace(of=lambda *_, **__: None))
    patch.setattr(export, "model_card", lambda *args, **options: "a model")


def _save_record(folder: Path, processor: None, data: DataSpec, record: ModelRecord) -> ModelRecord:
    (folder / MODEL_RECORD).write_text(json.dumps(asdict(record)))
    return record


def _replace_of_schedule(patch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    scheduler = schedule.scheduler
    clock, ranks = Clock(scheduler), Distributed(scheduler)
    for module in (lease, sigterm, monitor, loop, saving, tenacity, tenacity.nap):
        patch.setattr(module, "time", clock)
    for module in (saving, export, loop):
        patch.setattr(module, "dist", ranks)
    patch.setattr(saving, "in_background", partial(Background, scheduler))
    patch.setattr(job, "train_students", schedule.train)
    patch.setattr(lease, "threading", threading_of(scheduler))
    patch.setattr(lease, "secrets", SimpleNamespace(token_hex=lambda n: scheduler.random.randbytes(n).hex()))
    patch.setattr(monitor, "os", SimpleNamespace(urandom=scheduler.random.randbytes))
    patch.setattr(holder, "os", SimpleNamespace(getpid=lambda: scheduler.thread.process.number))
    patch.setattr(holder, "socket", SimpleNamespace(gethostname=lambda: scheduler.thread.process.machine))
    patch.setattr(holder, "_machine", lambda: scheduler.thread.process.machine)
    patch.setattr(holder, "_start_of", lambda number: _start_of(scheduler, number))


def _replace_of_teachers(patch: pytest.MonkeyPatch, scheduler: Scheduler) -> None:
    clock, threads = Clock(scheduler), threading_of(scheduler)
    for module in (client, pool, signals, starting):
        patch.setattr(module, "time", clock)
    for module in (client, signals):
        patch.setattr(module, "threading", threads)
    # Fields of these call the clock with which they were defined.
    made, leased = client.Pulse, pool.Lease
    patch.setattr(client, "Pulse", lambda: made(scheduler.clock()))
    patch.setattr(pool, "Lease", lambda holder, starting: leased(holder, starting, scheduler.clock()))
    patch.setattr(client, "os", SimpleNamespace(urandom=scheduler.random.randbytes))
    patch.setattr(signals, "ThreadPoolExecutor", partial(Executor, scheduler))
    patch.setattr(pool, "ray", SimpleNamespace(cluster_resources=dict))


def _start_of(scheduler: Scheduler, number: int) -> str | None:
    """Return when a process of this machine began; None if it has ended."""
    process = scheduler.processes[number]
    is_here = process.machine == scheduler.thread.process.machine
    return f"{number}" if is_here and not process.is_dead else None
