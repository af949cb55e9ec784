"""The code under test, with the simulation in place of the machine, the cluster, the data and the models."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import tenacity
import tenacity.nap

from betakd_ray import job, sigterm
from betakd_ray.data.plan import Pass
from betakd_ray.on_ray import monitor, source
from betakd_ray.run import checkpoint, claim, lease
from betakd_ray.train import checkpoint as saving
from betakd_ray.train import export, loop, students, worker
from tests.simulation.cluster import RAY, Clock, Distributed, OneAtATime, threading_of
from tests.simulation.folders import folder
from tests.simulation.job import SHARDS, Rows, SimulatedWorker
from tests.simulation.schedule import Schedule
from tests.simulation.scheduler import Scheduler


@contextmanager
def patched() -> Iterator[Callable[[int], Schedule]]:
    """Yield a function that runs the schedule of a seed."""
    with pytest.MonkeyPatch.context() as patch:
        _replace_what_stays(patch)
        logging.disable(logging.CRITICAL)

        def run(seed: int) -> Schedule:
            schedule = Schedule(seed)
            with pytest.MonkeyPatch.context() as inner:
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
    patch.setattr(saving, "in_background", _at_once)
    patch.setattr(saving, "os", SimpleNamespace(environ={"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}))
    patch.setattr(checkpoint, "ThreadPoolExecutor", OneAtATime)
    # Cached, as both take longer than a whole checkpoint here.
    patch.setattr(claim, "version", lru_cache(claim.version))
    patch.setattr(export, "_student_state", lambda engine, spec: {})
    patch.setattr(export, "_save", lambda student, state, spec, folder: None)
    patch.setattr(export, "student_processor", lambda spec: SimpleNamespace(save_pretrained=lambda folder: None))
    patch.setattr(export, "takes_images", lambda student: True)
    patch.setattr(export, "model_card", lambda *args, **options: "a model")


def _at_once(call: Callable[[], Any], name: str) -> Future[Any]:
    """Call a function, whose errors are the caller's: in the simulation a step waits until a checkpoint is stored."""
    done: Future[Any] = Future()
    done.set_result(call())
    return done


def _replace_of_schedule(patch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    scheduler = schedule.scheduler
    clock, ranks = Clock(scheduler), Distributed(scheduler)
    for module in (lease, sigterm, monitor, loop, saving, tenacity, tenacity.nap):
        patch.setattr(module, "time", clock)
    for module in (saving, export, loop):
        patch.setattr(module, "dist", ranks)
    patch.setattr(job, "train_students", schedule.train)
    patch.setattr(lease, "threading", threading_of(scheduler))
    patch.setattr(lease, "secrets", SimpleNamespace(token_hex=lambda n: scheduler.random.randbytes(n).hex()))
    patch.setattr(monitor, "os", SimpleNamespace(urandom=scheduler.random.randbytes))
    patch.setattr(lease, "os", SimpleNamespace(getpid=lambda: scheduler.thread.process.number))
    patch.setattr(lease, "socket", SimpleNamespace(gethostname=lambda: scheduler.thread.process.machine))
    patch.setattr(lease, "_machine", lambda: scheduler.thread.process.machine)
    patch.setattr(lease, "_start_of", lambda number: _start_of(scheduler, number))


def _start_of(scheduler: Scheduler, number: int) -> str | None:
    """Return when a process of this machine began; None if it has ended."""
    process = scheduler.processes[number]
    is_here = process.machine == scheduler.thread.process.machine
    return f"{number}" if is_here and not process.is_dead else None
