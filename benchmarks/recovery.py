"""How long a death holds a job up: `python -m benchmarks.recovery`, some five minutes on two cores.

The easy-VQA job; a teacher is killed, then a student worker, each a while after a checkpoint. A step's time is when it
was logged for good: steps after the last checkpoint are done again when a worker dies, never when a teacher does.
"""

import contextlib
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from betakd_ray.cluster import connected
from betakd_ray.job import BetaKDJob
from betakd_ray.spec import load_spec
from betakd_ray.tracking import read_metrics
from betakd_ray.train.checkpoint import CheckpointStore
from jobs.easy_vqa.data import SETS, SHARDS, pack_once

RUN = Path("runs/benchmarks")
SPEC = Path(__file__).parents[1] / "jobs/easy_vqa/distill.yaml"
DATA = "noisy"
"""The set of questions that the spec trains on."""
OVERRIDES = [
    "name=recovery",
    f"output={RUN}",
    "training.max_steps=260",
    "training.checkpoint_every=60",
    "training.log_every=1",
    "training.global_batch_size=32",
    "training.micro_batch_size=32",
    "tracking.progress=false",
]
AFTER_S = 3.0
"""Seconds from a checkpoint to the kill, so that there are steps to do again."""


@dataclass(frozen=True)
class Kill:
    """A process of the job, and what it was doing."""

    role: str
    time: float
    reborn: float
    """When another process took the role: the death was noticed, and a place found."""


def main(miniature: bool = False) -> None:
    """Run, kill, and print where the time went. In miniature, without a cluster: check the job, print made-up times."""
    spec = load_spec(SPEC, OVERRIDES)
    if DATA not in SETS or not all(f"{SHARDS}/{DATA}-" in str(each) for each in spec.data.train):
        raise ValueError(f"{SPEC} trains on {spec.data.train}, and not on what is packed here: {DATA}")
    if miniature:
        _print(0.0, {step: float(step) for step in range(1, 9)}, [Kill("TeacherScorer", time=2.5, reborn=4.5)])
        return
    pack_once(DATA)
    shutil.rmtree(RUN / "recovery", ignore_errors=True)
    job = BetaKDJob(spec)
    with connected(job.spec), ThreadPoolExecutor(max_workers=1) as executor:
        begin = time.time()
        running = executor.submit(job.fit)
        kills = [_kill("TeacherScorer", job, after=0), _kill("RayTrainWorker", job, after=60)]
        running.result()
    steps = {record["step"]: record["time"] for record in read_metrics(job.run, spec.output.storage)}
    _print(begin, steps, kills)


def _kill(role: str, job: BetaKDJob, after: int) -> Kill:
    """One process of that role, some time after the first checkpoint beyond step `after`."""
    store = CheckpointStore(job.run, job.spec.output.storage)
    while (newest := store.latest()) is None or newest.step <= after:
        time.sleep(0.1)
    time.sleep(AFTER_S)
    victim, *_ = _processes(role)
    psutil.Process(victim).send_signal(signal.SIGKILL)
    killed = time.time()
    while not _processes(role) - {victim}:
        time.sleep(0.1)
    return Kill(role, killed, time.time())


def _processes(role: str) -> set[int]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has gone meanwhile
            if role in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


def _print(begin: float, steps: dict[int, float], kills: list[Kill]) -> None:
    gaps = sorted(later - earlier for earlier, later in zip(steps.values(), list(steps.values())[1:], strict=False))
    table = Table("what", "seconds")
    table.add_row("from fit() to the first step", f"{steps[1] - begin:.1f}")
    table.add_row("a step, median", f"{gaps[len(gaps) // 2]:.3f}")
    for kill in kills:
        step = min(at for at in steps.values() if at > kill.reborn)
        table.add_row(f"{kill.role} killed, to the next step", f"{step - kill.time:.1f}")
        table.add_row("  until another process has its role", f"{kill.reborn - kill.time:.1f}")
        table.add_row("  until that has loaded, and done its part of a step", f"{step - kill.reborn:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
