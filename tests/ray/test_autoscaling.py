"""A job on a cluster that grows for it from one head node and shrinks back to it, under Ray's own autoscaler."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from betakd_ray.data.pack import pack
from betakd_ray.run.metrics import read_metrics
from tests.autoscaler import autoscaled
from tests.nodes import LABEL
from tests.tiny import numbered_samples, save_tiny

HERE = Path(__file__).parent
TEACHERS = 2


@pytest.mark.timeout(600)
def test_the_cluster_grows_with_the_teachers_and_is_a_head_again_in_the_end(tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher", seed=1)
    save_tiny(tmp_path / "student", seed=2)
    pack(numbered_samples(200), str(tmp_path / "shards"))
    pools = {
        pool: {"gpus": 1, "labels": {LABEL: pool}, "resources": {f"{pool}_slot": 1}} for pool in ("teacher", "student")
    }
    tree = {
        "name": "grown",
        "data": {"train": str(tmp_path / "shards" / "*.tar")},
        "teacher": {"path": str(tmp_path / "teacher"), "batch_tokens": 200, "check": "off"},
        "student": {"init": {"kind": "checkpoint", "path": str(tmp_path / "student")}},
        "objective": {"energies": ["fkl"], "weighting": "task"},
        "training": {"epochs": 60, "global_batch_size": 8, "micro_batch_size": 4, "precision": "fp32", "log_every": 5},
        "cluster": {
            "teacher": {**pools["teacher"], "min": 1, "max": TEACHERS},
            "student": pools["student"],
            "readers": {"gpus": 0, "labels": {LABEL: "cpu"}},
        },
        "output": str(tmp_path / "runs"),
        "tracking": {"progress": False},
    }
    spec = tmp_path / "grown.yaml"
    spec.write_text(yaml.safe_dump(tree))
    with autoscaled({"teacher": TEACHERS, "student": 1}) as address:
        driver = subprocess.run(
            [sys.executable, str(HERE / "slow_teacher.py"), str(spec), str(tmp_path / "nodes.jsonl")],
            env={**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(HERE.parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
    assert driver.returncode == 0, driver.stderr
    seen = [json.loads(line) for line in (tmp_path / "nodes.jsonl").read_text().splitlines()]
    waits = _waits(tmp_path / "runs" / "grown")
    _print(seen, waits)
    teachers = [counts["teacher"] for counts in seen]
    assert (teachers[0], seen[0]["student"]) == (0, 0)
    assert max(teachers) == TEACHERS
    assert max(counts["student"] for counts in seen) == 1
    last_student = max(number for number, counts in enumerate(seen) if counts["student"])
    assert 1 in teachers[teachers.index(TEACHERS) : last_student]  # shrunk while the job went on
    assert (teachers[-1], seen[-1]["student"]) == (0, 0)
    assert waits[0] > 0.3 > 3 * waits[-1]


def _waits(run: Path) -> list[float]:
    """Return the share of its time that the student waited for the teachers, early and late in the job."""
    waits = [record["teacher_wait"] for record in read_metrics(str(run))]
    quarter = len(waits) // 4
    return [fmean(waits[1 : 1 + min(quarter, 6)]), fmean(waits[-quarter:])]


def _print(seen: list[dict[str, float]], waits: list[float]) -> None:
    begin, before = seen[0]["time"], (0, 0)
    for counts in seen:
        now = (counts["teacher"], counts["student"])
        if now != before:
            print(f"{counts['time'] - begin:5.0f} s: {now[0]} teacher nodes, {now[1]} student nodes")
        before = now
    print(f"the student waited {waits[0]:.0%} of its time early, {waits[1]:.0%} late")
