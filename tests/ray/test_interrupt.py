"""Ctrl-C at any moment of a job: it saves, says where, and goes on; the second one ends it at once.

The signal goes to the whole process group, as from a terminal: Ray's processes on this machine get it too.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from betakd_ray.data.pack import pack
from betakd_ray.run.audit import audit
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.files import required
from betakd_ray.run.records import RESULT_FILE
from betakd_ray.sigterm import ENDED_AT_ONCE
from betakd_ray.spec import StorageSpec
from tests.tiny import numbered_samples, save_tiny

REPOSITORY = Path(__file__).parents[2]
MOMENTS = 10
SEED = 20_261_130
LOCAL = StorageSpec()
SAID = (
    r"has saved its state at step (\d+) of \d+, in .*checkpoints",
    r"lost nothing: its last checkpoint, of step (\d+), is in .*checkpoints",
    r"lost nothing: no step was done",
    r"before its first step, so there was nothing to save",
    r"was asked to stop, and lost nothing",
    r"was asked to stop, with nothing to save",
    r"was asked to stop while it connected to Ray",
)
"""What a job that was interrupted says: one of these."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    for seed, model in enumerate(("teacher", "student")):
        save_tiny(folder / model, seed=seed)
    pack(numbered_samples(2000), str(folder / "shards"), samples_per_shard=100)
    return folder


def write_spec(home: Path, name: str, epochs: int = 1) -> Path:
    tree = {
        "name": name,
        "data": {"train": str(home / "shards" / "*.tar")},
        "teacher": {"path": str(home / "teacher")},
        "student": {"init": {"kind": "checkpoint", "path": str(home / "student")}},
        "objective": {"energies": ["fkl"], "weighting": "task"},
        "training": {
            "epochs": epochs,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "precision": "fp32",
            "zero_stage": 0,
            "log_every": 10,
            "checkpoint_every": 60,
        },
        "output": str(home / "runs"),
    }
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@dataclass
class Ended:
    """A command that has ended: its exit code, what it said, and how long it took."""

    code: int
    said: str
    seconds: float


def distill(spec: Path, log: Path, interrupts: list[float]) -> Ended:
    """Run `betakd distill`; press Ctrl-C after each of `interrupts` seconds since the one before."""
    command = [sys.executable, "-m", "betakd_ray", "distill", str(spec)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(REPOSITORY)}
    begun = time.monotonic()
    with log.open("w") as said:
        job = subprocess.Popen(
            command, cwd=spec.parent, env=environment, stderr=said, stdout=said, start_new_session=True
        )
        for seconds in interrupts:
            try:
                job.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGINT)
        job.wait(600)
    return Ended(job.returncode, log.read_text(), time.monotonic() - begun)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ctrl_c_at_ten_random_moments_loses_nothing(home: Path, tmp_path: Path) -> None:
    whole = distill(write_spec(home, "whole"), tmp_path / "whole.txt", [])
    assert whole.code == 0, whole.said
    drawn = random.Random(SEED)
    spec, run, done, last = write_spec(home, "interrupted", epochs=MOMENTS), home / "runs" / "interrupted", 0, 0
    for number in range(10 * MOMENTS):
        moment = drawn.uniform(0.5, whole.seconds)
        ended = distill(spec, tmp_path / f"{number}.txt", [moment])
        print(f"Ctrl-C after {moment:.1f} s: exit code {ended.code}: {ended.said.strip().splitlines()[-2:]}")
        if ended.code == 0:  # it was at its end: go on with the same run, which may grow
            spec = write_spec(home, "interrupted", epochs=(number + 2) * MOMENTS)
            continue
        assert ended.code == os.EX_TEMPFAIL, ended.said
        assert "Traceback" not in ended.said
        found = next((match for match in (re.search(text, ended.said) for text in SAID) if match), None)
        assert found, ended.said
        assert "To go on: python -m betakd_ray distill" in ended.said or "with nothing to save" in found[0]
        newest = CheckpointStore(str(run), LOCAL).latest()
        step = newest.step if newest else 0
        if found.groups():
            assert step == int(found[1])
        assert step >= last  # a resume never loses a checkpoint
        if newest:
            assert audit(str(run), LOCAL).problems == []
        last, done = step, done + 1
        if done == MOMENTS:
            break
    assert done == MOMENTS
    ended = distill(spec, tmp_path / "end.txt", [])
    assert ended.code == 0, ended.said
    result = required(str(run), LOCAL, RESULT_FILE)
    assert result.consumed + result.quarantined + result.tail == result.planned
    assert audit(str(run), LOCAL).problems == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_second_ctrl_c_ends_it_at_once_and_the_next_start_goes_on(home: Path, tmp_path: Path) -> None:
    spec = write_spec(home, "at-once")
    log = tmp_path / "first.txt"
    whole = distill(write_spec(home, "measured"), tmp_path / "whole.txt", [])
    ended = distill(spec, log, [0.8 * whole.seconds, 0.05])
    if ended.code != 0:  # it was not done yet
        assert ended.code in (ENDED_AT_ONCE, os.EX_TEMPFAIL), ended.said
        if ended.code == ENDED_AT_ONCE:
            assert "ended at once" in ended.said
    again = distill(spec, tmp_path / "second.txt", [])
    assert again.code == 0, again.said
    assert audit(str(home / "runs" / "at-once"), LOCAL).problems == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_that_is_done_may_grow(home: Path, tmp_path: Path) -> None:
    """`training.epochs` grows after the job was finished: the run goes on from its last checkpoint."""
    run = home / "runs" / "grown"
    for epochs in (1, 2):
        ended = distill(write_spec(home, "grown", epochs=epochs), tmp_path / f"{epochs}.txt", [])
        assert ended.code == 0, ended.said
        result = required(str(run), LOCAL, RESULT_FILE)
        assert result.steps == epochs * 2000 // 8
        assert audit(str(run), LOCAL).problems == []
    assert "goes on to step 500" in ended.said
    shrunk = distill(write_spec(home, "grown", epochs=1), tmp_path / "shrunk.txt", [])
    assert shrunk.code == 2
    assert "training.epochs was 2 and is 1" in shrunk.said
