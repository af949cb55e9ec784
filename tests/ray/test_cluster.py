"""Two jobs submitted to a cluster of five logical nodes, from a folder outside of the repository."""

import json
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
from ray.job_submission import JobStatus, JobSubmissionClient
from tenacity import Retrying, stop_after_delay, wait_fixed
from typer.testing import CliRunner

from betakd_ray.cli import app
from betakd_ray.data.pack import pack
from betakd_ray.run.audit import audit
from betakd_ray.run.folder import RESULT
from betakd_ray.spec import StorageSpec
from tests.nodes import LABEL, Nodes, free_port, nodes
from tests.tiny import numbered_samples, save_tiny

REPOSITORY = Path(__file__).parents[2]
TEACHER, STUDENT, READER = "TeacherScorer", "RayTrainWorker", "ReadPlanSource"
POOLS = ("teacher", "student")
PLANNED: dict[str, dict[str, Any]] = {"fits": {}, "greedy": {"teacher": {"gpus": 2}}}


@dataclass
class Submitted:
    """Jobs that were submitted one after the other, and the nodes on which their processes were seen."""

    folder: Path
    codes: dict[str, int]
    output: dict[str, str]
    status: dict[str, str]
    """Output of `betakd status` for the newest job, and for the stopped one."""
    logs: str
    """Output of `betakd logs` for the stopped job."""
    places: dict[str, set[str]] = field(default_factory=dict)
    """Role of a process → the nodes where it was seen."""


@dataclass
class Site:
    """The cluster, and a folder with data, models and the user's specs."""

    nodes: Nodes
    dashboard: str
    folder: Path

    def spec(self, name: str, epochs: int = 1, **cluster: Any) -> Path:
        """Write the spec of a job with the pools of cluster/pools.yaml, at this cluster's size."""
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
                "checkpoint_every": 25,
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

    def submit(self, spec: Path, submission_id: str, **environment: str) -> subprocess.Popen[str]:
        """Run `ray job submit`, which follows the job and ends with the job's exit code."""
        command = ["ray", "job", "submit", "--address", self.dashboard, "--working-dir", str(REPOSITORY)]
        command += ["--submission-id", submission_id, "--", "python", "jobs/distill.py", "--spec", str(spec)]
        return self._run(command, environment)

    def stop(self, submission_id: str) -> None:
        """Stop a job as `ray job stop` does, and wait until it has ended."""
        client = JobSubmissionClient(self.dashboard)
        assert client.stop_job(submission_id)
        while not client.get_job_status(submission_id).is_terminal():
            time.sleep(0.5)

    def plan(self, spec: Path) -> subprocess.Popen[str]:
        """Run `betakd plan` for this cluster."""
        return self._run(
            ["betakd", "plan", str(spec), "--address", self.nodes.address], {"PYTHONPATH": str(REPOSITORY)}
        )

    def _run(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def said(self, command: str, *submission_id: str) -> str:
        """Return the output of `betakd status` or `betakd logs`."""
        return CliRunner().invoke(app, [command, *submission_id, "--address", self.dashboard]).output


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    save_tiny(folder / "teacher", hidden=32, seed=1)
    save_tiny(folder / "student", hidden=16, seed=2)
    pack(numbered_samples(100), str(folder / "shards"), samples_per_shard=20)
    port = free_port()
    head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "300")  # read by the nodes; Ray's own 3 s are too short to save in
    with nodes({pool: 2 for pool in POOLS}, gpus=1, **head) as started:
        dashboard = f"http://127.0.0.1:{port}"
        Retrying(stop=stop_after_delay(120), wait=wait_fixed(1), reraise=True)(_run_nothing, dashboard)
        yield Site(started, dashboard, folder)
    patch.undo()


def _run_nothing(dashboard: str) -> None:
    """Raise until the cluster runs jobs from this folder: a new cluster refuses its first job, or never starts it."""
    client = JobSubmissionClient(dashboard)
    job = client.submit_job(entrypoint="true", runtime_env={"working_dir": str(REPOSITORY)})
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.2)
    assert status == JobStatus.SUCCEEDED, client.get_job_info(job).message


@pytest.fixture(scope="module")
def submitted(site: Site) -> Submitted:
    """Submit a second job while the first one trains; then stop the first job and submit it again."""
    spec = site.spec("first", epochs=20)
    running, status = {"first": site.submit(spec, "first")}, {}
    places: dict[str, set[str]] = {role: set() for role in (TEACHER, STUDENT, READER)}
    begin = time.monotonic()
    while any(job.poll() is None for job in running.values()):
        for role, found in places.items():
            found.update(site.nodes.processes(role).values())
        if places[STUDENT] and "second" not in running:
            running["second"] = site.submit(site.spec("second"), "second")
            status["newest"] = site.said("status")
        if "again" not in running and [*(site.folder / "runs" / "first").glob("checkpoints/*/manifest.json")]:
            site.stop("first")
            status["first"] = site.said("status", "first")
            running["again"] = site.submit(spec, "again")
        time.sleep(0.2)
    print(f"two jobs, the first of them in two parts: {time.monotonic() - begin:.0f} s")
    output = {name: job.communicate()[0] for name, job in running.items()}
    assert running.keys() == {"first", "second", "again"}, "\n".join(output.values())
    codes = {name: job.returncode for name, job in running.items()}
    return Submitted(site.folder, codes, output, status, site.said("logs", "first"), places)


@pytest.mark.timeout(900)
def test_a_job_that_is_stopped_saves_first_and_goes_on_when_it_is_submitted_again(submitted: Submitted) -> None:
    assert re.match(r"(first|second): (PENDING|RUNNING)", submitted.status["newest"])
    assert submitted.status["first"].startswith("first: STOPPED")
    saved = re.search(r"has saved its state at step (\d+) of (\d+)", submitted.logs)
    assert saved, submitted.logs
    print(saved[0])
    assert 0 < int(saved[1]) < int(saved[2])
    assert submitted.codes["again"] == 0, submitted.output["again"]
    result = json.loads((submitted.folder / "runs" / "first" / RESULT).read_text())
    assert result["steps"] == int(saved[2])
    assert audit(str(submitted.folder / "runs" / "first"), StorageSpec()).problems == []


@pytest.mark.timeout(120)
def test_the_plan_says_whether_this_cluster_has_room(site: Site) -> None:
    plans = {name: site.plan(site.spec(name, **pools)) for name, pools in PLANNED.items()}
    said = {name: plan.communicate()[0] for name, plan in plans.items()}
    assert (plans["fits"].returncode, plans["greedy"].returncode) == (0, 2)
    assert f"cluster at {site.nodes.address}" in said["fits"]
    assert re.search(r"teacher +1 × \(1 GPUs.*\) with label betakd\.io/pool=teacher: has room", said["fits"])
    assert re.search(r"student +2 × .*: has room", said["fits"])
    assert "memory of a student rank" in said["greedy"]
    assert re.search(r"betakd: cluster\.teacher: asks for 1 × \(2 GPUs.*room for 0 of them", said["greedy"])


@pytest.mark.timeout(900)
def test_a_second_job_waits_for_the_first_ones_places_and_ends_well(submitted: Submitted) -> None:
    assert submitted.codes["second"] == 0, submitted.output["second"]
    assert audit(str(submitted.folder / "runs" / "second"), StorageSpec()).problems == []


@pytest.mark.timeout(900)
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
    job = site.submit(site.spec("stranger"), "stranger", RAY_AUTH_TOKEN="0" * 64, HOME=str(tmp_path))
    said = job.communicate()[0]
    assert job.returncode != 0
    assert re.search(r"auth|token|401|403", said, re.IGNORECASE), said
    assert not (site.folder / "runs" / "stranger").exists()


@pytest.mark.timeout(600)
def test_the_submit_line_of_the_readme_works_from_any_folder_and_with_a_token(site: Site, tmp_path: Path) -> None:
    found = re.search(r"<!-- test: submit -->\n```\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert found
    token = tmp_path / "auth_token"
    token.write_text(os.environ["RAY_AUTH_TOKEN"])
    line = found[1].replace("http://HEAD:8265", site.dashboard).replace("~/.ray/auth_token", str(token))
    line = line.replace("s3://BUCKET/job.yaml", str(site.spec("anywhere")))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        ["bash", "-ec", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert audit(str(site.folder / "runs" / "anywhere"), StorageSpec()).problems == []
