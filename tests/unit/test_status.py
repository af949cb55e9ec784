"""`betakd status` and `betakd logs` of a run, from its folder; and what is unusual about the size of a job."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from typer.testing import CliRunner

from betakd_ray.cli import app
from betakd_ray.data.plan import Plan
from betakd_ray.data.shards import Shard
from betakd_ray.on_ray.submission import newest_lines
from betakd_ray.run import metrics as stored
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.claim import claim
from betakd_ray.run.folder import RESULT, SPEC
from betakd_ray.run.lease import held_lease
from betakd_ray.run.metrics import newest_records
from betakd_ray.run.plan import write_plan
from betakd_ray.run.result import JobResult
from betakd_ray.run.status import status_of
from betakd_ray.sigterm import StopRequest
from betakd_ray.spec import JobSpec, StorageSpec, parse_spec
from betakd_ray.spec.advice import advice
from betakd_ray.tracking import MetricsWriter

LOCAL = StorageSpec()
BEGUN = time.time() - 1000
"""Time of step 0 of the run: a step takes a second."""


def spec(folder: Path | str, **training: Any) -> JobSpec:
    return parse_spec(
        {
            "name": "run",
            "data": {"train": "unused.tar"},
            "student": {"init": {"kind": "checkpoint", "path": "unused"}},
            "objective": {"weighting": "equal"},
            "training": {"global_batch_size": 10, **training},
            "output": {"path": str(folder)},
        }
    )


def log(metrics: MetricsWriter, *steps: int) -> None:
    for step in steps:
        record = {"step": step, "time": BEGUN + step, "loss": 0.5, "samples_per_second": 10.0}
        metrics.log(record | {"beta/fkl": 1.5, "data_wait": 0.1, "teacher_wait": 0.0})


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Begin a run of 100 steps, log 30 of them and commit a checkpoint at step 20."""
    url = str(tmp_path / "run")
    job = spec(tmp_path)
    claim(url, job)
    write_plan(url, LOCAL, Plan((Shard("/a.tar", 1000, 9, "7"),), 1, 0, False))
    metrics = MetricsWriter(job, url)
    metrics.restore(None)
    for step in range(1, 31):
        log(metrics, step)
        if step % 10 == 0:
            metrics.flush()
    metrics.end_trackers()
    store, files = CheckpointStore(url, LOCAL), tmp_path / "files"
    files.mkdir()
    (files / SPEC).write_text(job.model_dump_json())
    store.commit(store.manifest("step-00000020-a", 20, 1, store.upload(files, "step-00000020-a")))
    return url


def betakd(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def test_a_run_that_goes_on_has_its_step_time_left_loss_and_checkpoint(run: str, tmp_path: Path) -> None:
    with held_lease(run, LOCAL, StopRequest(""), waits=False):
        text = betakd("status", run)
    rows = dict(line.split(maxsplit=1) for line in text.replace("last checkpoint", "last-checkpoint").splitlines())
    assert rows["state"].startswith("running, driver ")
    assert str(os.getpid()) in rows["state"]
    assert rows["step"] == "30 of 100 (30%)"
    assert rows["loss"] == "0.5000"
    assert rows["beta"] == "fkl 1.5"
    assert rows["speed"] == "10 samples/s"
    assert rows["waits"] == "data 10% teacher 0%"
    assert rows["ETA"] == "0:01:10"
    assert rows["last-checkpoint"] == f"step 20, {run}/checkpoints/step-00000020-a"


def test_a_run_that_has_stopped_or_ended_has_no_time_left(run: str) -> None:
    with held_lease(run, LOCAL, StopRequest(""), waits=False):
        pass
    text = betakd("status", run)
    assert "stopped: run the same command again to go on" in text
    assert "ETA" not in text
    Path(run, RESULT).write_text(json.dumps(asdict(JobResult("run", run, "model", {}, 100, 1000, 1000, 0, 0, 0))))
    assert betakd("status", run).splitlines()[0].split() == ["state", "finished"]


def test_a_run_that_has_logged_nothing_yet_has_a_status(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    claim(url, spec(tmp_path))
    status = status_of(url, LOCAL)
    assert status.state == "not begun"
    assert dict(status.rows())["step"] == "none is logged yet, of an unknown number"
    assert dict(status.rows())["last checkpoint"] == "none"


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    for command in ("status", "logs"):
        done = CliRunner().invoke(app, [command, str(tmp_path)])
        assert done.exit_code == 2
        assert "no such file. Give the folder of a run" in done.output


def test_logs_of_a_folder_are_the_lines_of_its_metrics(run: str) -> None:
    for command in (("logs", run), ("logs", run, "--follow")):  # it has no driver, so there is nothing to wait for
        lines = betakd(*command).splitlines()
        assert len(lines) == 30
        assert lines[-1] == (
            "run: step 30/100 (30%), loss 0.5000, beta fkl 1.5, 10 samples/s, waits data 10% teacher 0%, ETA 0:01:10"
        )


def test_the_newest_records_need_only_the_newest_parts(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = [], stored._read_part
    monkeypatch.setattr(stored, "_read_part", lambda *part: read.append(part) or real(*part))
    records = newest_records(LocalFileSystem(), run, 5)
    assert [record["step"] for record in records] == [26, 27, 28, 29, 30]
    assert len(read) == 2  # the first of the attempt, and the last one


def test_a_submitted_job_s_newest_step_and_checkpoint_are_found_in_its_log() -> None:
    log = "run: step 10/100 (10%), loss 1\nrun: checkpoint at step 10\nrun: step 20/100 (20%), loss 1\nother\n"
    assert newest_lines(log) == ["run: step 20/100 (20%), loss 1", "run: checkpoint at step 10"]
    assert newest_lines("Traceback") == []


@pytest.mark.parametrize(
    ("training", "samples", "said"),
    [
        ({}, 100_000, []),
        ({}, 200, ["only 20 steps"]),
        ({"max_steps": 50}, 100_000, ["only 50 steps"]),
        (
            {"global_batch_size": 1000, "epochs": 200, "checkpoint_every": 100},
            1_019 * 200,
            ["takes 98% of an epoch of 1019"],
        ),
        ({"global_batch_size": 700}, 1_300, ["only 1 steps", "600 of 1300 samples (46%) are left over", "takes 54%"]),
        ({"checkpoint_every": 500}, 2_000, ["checkpoint_every is 500, and the job has 200 steps"]),
        ({"micro_batch_size": 8, "workers": 4}, 100_000, ["only 3 samples for each of 4 workers"]),
    ],
)
def test_what_is_unusual_about_a_job_is_said(training: Any, samples: int, said: list[str], tmp_path: Path) -> None:
    found = advice(spec(tmp_path, **training), samples)
    assert len(found) == len(said)
    assert all(part in text for part, text in zip(said, found, strict=True))
