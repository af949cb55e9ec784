"""Two jobs submitted to a cluster of five logical nodes, from a folder outside of the repository."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobSubmissionClient
from tenacity import Retrying, stop_after_delay, wait_fixed

from betakd_ray.audit import audit
from betakd_ray.data.pack import pack
from betakd_ray.spec import StorageSpec
from tests.nodes import LABEL, Nodes, free_port, nodes
from tests.tiny import numbered_samples, save_tiny

REPOSITORY = Path(__file__).parents[2]
TEACHER, STUDENT, READER = "TeacherScorer", "RayTrainWorker", "ReadPlanSource"
POOLS = ("teacher", "student")


@dataclass
class Submitted:
    """Jobs that were submitted one soon after the other, and where their processes were seen."""

    folder: Path
    codes: dict[str, int]
    output: dict[str, str]
    places: dict[str, set[str]] = field(default_factory=dict)
    """Role → nodes."""


@dataclass
class Site:
    """The cluster, and a folder with data, models and the user's specs."""

    nodes: Nodes
    dashboard: str
    folder: Path

    def spec(self, name: str, epochs: int = 1, **cluster: Any) -> Path:
        """A job whose pools are those of cluster/pools.yaml, at this cluster's size."""
        pools = {
            pool: {"gpus": 1, "labels": {LABEL: pool}, "resources": {f"{pool}_slot": 1}, **cluster.get(pool, {})}
            for pool in POOLS
        }
        tree = {
            "name": name,
            "data": {"train": str(self.folder / "shards" / "*.tar")},
            "teacher": {"path": str(self.folder / "teacher")},
            "student": {"init": {"kind": "checkpoint", "path": str(self.folder / "student")}},
            "objective": {"energies": ["fkl"], "weighting": "task"},
            "training": {
                "epochs": epochs,
                "global_batch_size": 8,
                "micro_batch_size": 4,
                "workers": 2,
                "precision": "fp32",
            },
            # Where several clusters are on one machine, a submitted driver may find another one's address first.
            "cluster": {
                "address": self.nodes.address,
                **pools,
                "readers": {"gpus": 0, "labels": {LABEL: "cpu"}},
            },
            "output": str(self.folder / "runs"),
            "tracking": {"progress": False},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def submit(self, spec: Path, **environment: str) -> subprocess.Popen[str]:
        """`ray job submit`, which follows the job and ends as it does."""
        command = ["ray", "job", "submit", "--address", self.dashboard, "--working-dir", str(REPOSITORY)]
        command += ["--", "python", "jobs/distill.py", "--spec", str(spec)]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    save_tiny(folder / "teacher", hidden=32, seed=1)
    save_tiny(folder / "student", hidden=16, seed=2)
    pack(numbered_samples(100), str(folder / "shards"), samples_per_shard=20)
    port = free_port()
    head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    with nodes({pool: 2 for pool in POOLS}, gpus=1, **head) as started:
        dashboard = f"http://127.0.0.1:{port}"
        Retrying(stop=stop_after_delay(120), wait=wait_fixed(1), reraise=True)(_submit_nothing, dashboard)
        yield Site(started, dashboard, folder)


def _submit_nothing(dashboard: str) -> None:
    """Raises until the cluster takes jobs, which is some seconds after its nodes are up."""
    JobSubmissionClient(dashboard).submit_job(entrypoint="true")


@pytest.fixture(scope="module")
def submitted(site: Site) -> Submitted:
    """The second job is submitted while the first one trains."""
    running = {"first": site.submit(site.spec("first", epochs=10))}
    places: dict[str, set[str]] = {role: set() for role in (TEACHER, STUDENT, READER)}
    begin = time.monotonic()
    while any(job.poll() is None for job in running.values()):
        for role, found in places.items():
            found.update(site.nodes.processes(role).values())
        if places[STUDENT] and "second" not in running:
            running["second"] = site.submit(site.spec("second"))
        time.sleep(0.2)
    print(f"two jobs, one after the other: {time.monotonic() - begin:.0f} s")
    output = {name: job.communicate()[0] for name, job in running.items()}
    return Submitted(site.folder, {name: job.returncode for name, job in running.items()}, output, places)


@pytest.mark.timeout(600)
def test_a_job_submitted_with_the_token_runs_to_its_end(submitted: Submitted) -> None:
    assert submitted.codes["first"] == 0, submitted.output["first"]
    assert audit(str(submitted.folder / "runs" / "first"), StorageSpec()).problems == []


@pytest.mark.timeout(600)
def test_a_second_job_waits_for_the_first_ones_places_and_ends_well(submitted: Submitted) -> None:
    assert submitted.codes["second"] == 0, submitted.output["second"]
    assert audit(str(submitted.folder / "runs" / "second"), StorageSpec()).problems == []


@pytest.mark.timeout(600)
def test_each_process_is_on_a_node_of_its_pool(submitted: Submitted) -> None:
    assert submitted.places[TEACHER]
    assert submitted.places[TEACHER] <= {"teacher-0", "teacher-1"}
    assert submitted.places[STUDENT] == {"student-0", "student-1"}
    assert submitted.places[READER] == {"head"}


@pytest.mark.timeout(120)
def test_a_job_that_finds_no_place_is_refused_before_any_teacher_starts(site: Site) -> None:
    spec = site.spec("greedy", teacher={"gpus": 2})
    timed = "\n".join(
        [
            "import sys, time",
            "from betakd_ray.errors import ClusterError",
            "from betakd_ray.job import BetaKDJob",
            "job, begin = BetaKDJob.from_yaml(sys.argv[1]), time.monotonic()",
            "try: job.fit()",
            "except ClusterError as error: print(f'{time.monotonic() - begin:.1f} s: {error}')",
        ]
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", timed, str(spec)],
        cwd=site.folder,
        env={**os.environ, "RAY_ADDRESS": site.nodes.address, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    teachers: set[int] = set()
    while driver.poll() is None:
        teachers |= site.nodes.processes(TEACHER).keys()
        time.sleep(0.1)
    said = driver.communicate()[0]
    print(said)
    assert re.search(r"cluster\.teacher: .*2 GPUs.*label betakd\.io/pool=teacher", said)
    assert not teachers


@pytest.mark.timeout(120)
def test_a_job_submitted_without_the_token_is_refused(site: Site, tmp_path: Path) -> None:
    job = site.submit(site.spec("stranger"), RAY_AUTH_TOKEN="0" * 64, HOME=str(tmp_path))
    said = job.communicate()[0]
    assert job.returncode != 0
    assert re.search(r"auth|token|401|403", said, re.IGNORECASE), said
    assert not (site.folder / "runs" / "stranger").exists()
