"""Delay of a job by deaths and checkpoints: `python -m benchmarks.recovery`, about eight minutes on two cores.

The job runs twice: as it did without spare processes, with Ray Train's own pause between looks for dead workers, and
as it does now. In the easy-VQA job a teacher is killed, and then a student worker, each some seconds after a
checkpoint. The time of a step is that of its last log record: steps after the last checkpoint are repeated if a worker
dies, but not if a teacher dies.
"""

import contextlib
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
from rich.console import Console
from rich.table import Table

from betakd_ray.job import BetaKDJob
from betakd_ray.on_ray.backend import LOOK_INTERVAL
from betakd_ray.on_ray.cluster import connected
from betakd_ray.on_ray.spares import SETTLED_S as SPARES_SETTLED_S
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.metrics import MetricsRecord, read_metrics
from betakd_ray.spec import JobSpec, load_spec
from jobs.easy_vqa.data import SETS, SHARDS, pack_once

RUN = Path("runs/benchmarks")
SPEC = Path(__file__).parents[1] / "jobs/easy_vqa/distill.yaml"
DATA = "noisy"
"""Name of the question set that the spec trains on."""
OVERRIDES = [
    "name=recovery",
    f"output={RUN}",
    "training.max_steps=1500",
    "training.checkpoint_every=60",
    "training.log_every=1",
    "training.global_batch_size=32",
    "training.micro_batch_size=32",
    "tracking.progress=false",
]
BEFORE = ["cluster.teacher.spares=false", "cluster.student.spares=false"]
AFTER_S = 1.5
"""Seconds between a checkpoint and the kill, so that there are steps to repeat."""
SETTLED_S = SPARES_SETTLED_S + 15
"""Seconds of work before each kill, after which a spare process has imported everything."""


@dataclass(frozen=True)
class Kill:
    """Kill of one process of the job."""

    role: str
    time: float
    """Time of the kill, in seconds since the epoch."""
    reborn: float
    """Time when another process had the role, in seconds since the epoch: the death was noticed, and a place found."""


def main(miniature: bool = False) -> None:
    """Run the job, kill its processes, and print the delays.

    In miniature, without a cluster, check the job and print invented times.
    """
    spec = load_spec(SPEC, OVERRIDES)
    if DATA not in SETS or not all(f"{SHARDS}/{DATA}-" in str(each) for each in spec.data.train):
        raise ValueError(f"{SPEC} trains on {spec.data.train}, and not on what is packed here: {DATA}")
    if miniature:
        times = ({"step": step, "time": float(step), "time_max/save": 0.1, "checkpoint_s": 1.0} for step in range(1, 9))
        rows = _rows(0.0, list(times), [Kill("TeacherScorer", time=2.5, reborn=4.5)])
        _print(rows, rows)
        return
    pack_once(DATA)
    os.environ[LOOK_INTERVAL] = "2"
    before = _run(load_spec(SPEC, OVERRIDES + BEFORE))
    del os.environ[LOOK_INTERVAL]
    _print(before, _run(spec))


def _run(spec: JobSpec) -> dict[str, float]:
    shutil.rmtree(RUN / "recovery", ignore_errors=True)
    job = BetaKDJob(spec)
    with connected(job.spec), ThreadPoolExecutor(max_workers=1) as executor:
        begin = time.time()
        running = executor.submit(job.fit)
        kills = [_kill("TeacherScorer", job), _kill("RayTrainWorker", job)]
        running.result()
    return _rows(begin, read_metrics(job.run, spec.output.storage), kills)


def _kill(role: str, job: BetaKDJob) -> Kill:
    """Kill one process of that role when all have worked for a while, `AFTER_S` seconds after a checkpoint."""
    store = CheckpointStore(job.run, job.spec.output.storage)
    for wait_s in (SETTLED_S, AFTER_S):
        before = store.latest()
        while store.latest() == before:
            time.sleep(0.1)
        time.sleep(wait_s)
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


def _rows(begin: float, records: list[MetricsRecord], kills: list[Kill]) -> dict[str, float]:
    """Return the seconds of each row of the table."""
    steps = {record["step"]: record["time"] for record in records}
    gaps = sorted(later - earlier for earlier, later in zip(steps.values(), list(steps.values())[1:], strict=False))
    # Of the slowest rank. A save is in the record of the step after it.
    waits = [record["time_max/save"] for record in records if record["time_max/save"] > 0]
    commits = {record["checkpoint_s"] for record in records if record["checkpoint_s"] > 0}
    rows = {
        "from fit() to the first step": steps[1] - begin,
        "a step, median": gaps[len(gaps) // 2],
        "a checkpoint: the training waits, median": median(waits),
        "a checkpoint: until it is committed, median": median(commits),
    }
    for kill in kills:
        step = min(at for at in steps.values() if at > kill.reborn)
        rows |= {
            f"{kill.role} killed, to the next step": step - kill.time,
            f"{kill.role}: until another process has its role": kill.reborn - kill.time,
            f"{kill.role}: until that has loaded, and done its part of a step": step - kill.reborn,
        }
    return rows


def _print(before: dict[str, float], after: dict[str, float]) -> None:
    table = Table("seconds", "before", "now")
    for what, seconds in before.items():
        table.add_row(what, f"{seconds:.2f}", f"{after[what]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
