"""A SIGTERM to a driver that waits: it ends at once with exit code 75, whatever it waits for."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from betakd_ray.data.pack import pack
from betakd_ray.spec import parse_spec
from tests.nodes import title
from tests.tiny import numbered_samples, save_tiny

REPOSITORY = Path(__file__).parents[2]
STARTED = {"teacher": "SlowToLoad", "students": "TrainController"}
"""What the driver waits for → a process that runs by then."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    for seed, model in enumerate(("teacher", "student")):
        save_tiny(folder / model, seed=seed)
    pack(numbered_samples(16), str(folder / "shards"))
    return folder


@contextmanager
def _taken(cpus: int) -> Iterator[None]:
    """Take logical CPUs of the cluster."""

    class Holder:
        pass

    holder: Any = ray.remote(Holder).options(num_cpus=cpus).remote()
    ray.get(holder.__ray_ready__.remote())
    yield
    ray.kill(holder)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("waits_for", STARTED)
def test_a_driver_that_waits_ends_with_75(ray_cluster: str, home: Path, tmp_path: Path, waits_for: str) -> None:
    engine = {"engine": "tests.plugins:SlowToLoad"} if waits_for == "teacher" else {}
    tree = {
        "name": "waiting",
        "data": {"train": str(home / "shards" / "*.tar")},
        "teacher": {"path": str(home / "teacher"), **engine},
        "student": {"init": {"kind": "checkpoint", "path": str(home / "student")}},
        "objective": {"energies": ["fkl"]},
        "training": {"global_batch_size": 8, "micro_batch_size": 8, "precision": "fp32"},
        # Six of eight: there is room for it in the cluster, but not beside what is taken.
        "cluster": {"student": {"cpus": 6}, "start_timeout_s": 3600},
        "output": str(tmp_path / "runs"),
        "tracking": {"progress": False},
    }
    file = tmp_path / "waiting.yaml"
    file.write_text(parse_spec(tree).model_dump_json())
    command = [sys.executable, str(REPOSITORY / "jobs" / "distill.py"), "--spec", str(file)]
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster, "PYTHONPATH": str(REPOSITORY)}
    with (
        _taken(cpus=3),
        subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True) as driver,
    ):
        before = _processes()
        while not any(STARTED[waits_for] in role for pid, role in _processes().items() if pid not in before):
            assert driver.poll() is None
            time.sleep(0.2)
        time.sleep(2.0)  # by now it waits
        driver.terminate()
        _, said = driver.communicate(timeout=120)
    assert driver.returncode == os.EX_TEMPFAIL, said
    assert "was asked to stop, and lost nothing" in said
    assert "Traceback" not in said


def _processes() -> dict[int, str]:
    return {process.pid: title(process) for process in psutil.Process().children(recursive=True)}
