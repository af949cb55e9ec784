"""The checks of a job on a cluster: an unfit teacher stops it before it trains, a fit one leaves a record."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from betakd_ray.data.pack import pack
from betakd_ray.errors import ModelUnfit
from betakd_ray.job import BetaKDJob
from betakd_ray.run.folder import CANARY, CHECKPOINTS, CHECKS, MODEL
from betakd_ray.spec import JobSpec, TeacherPoolSpec, TeacherSpec, parse_spec
from betakd_ray.teacher import pool as module
from betakd_ray.teacher.answers import GroupAnswer
from betakd_ray.teacher.canary import KnownAnswer, Replica, answer_canary
from betakd_ray.teacher.parts import Needs
from betakd_ray.teacher.pool import TeacherPool
from betakd_ray.teacher.scorer import TeacherScorer
from tests.sabotage import TOWER, changed, copied, of_part, zeroed
from tests.tiny import numbered_samples, save_tiny
from tests.unit.test_replicas import INPUTS

LOADED = "loaded"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_tiny(folder / "teacher", hidden=32, seed=1)
    save_tiny(folder / "student", hidden=16, seed=2)
    copied(folder / "teacher", folder / "sabotaged", changed(zeroed, of_part(TOWER, matrices=True)))
    pack(numbered_samples(32), str(folder / "shards"), samples_per_shard=8)
    return folder


def spec_of(home: Path, name: str, teacher: str, **teacher_fields: Any) -> JobSpec:
    return parse_spec(
        {
            "name": name,
            "data": {"train": str(home / "shards" / "*.tar")},
            "teacher": {"path": str(home / teacher), **teacher_fields},
            "student": {"init": {"kind": "checkpoint", "path": str(home / "student")}},
            "objective": {"energies": ["fkl"]},
            "training": {"global_batch_size": 8, "micro_batch_size": 4, "precision": "fp32", "log_every": 1},
            "output": str(home / "runs"),
            "tracking": {"progress": False},
        }
    )


@pytest.mark.timeout(300)
def test_a_sabotaged_teacher_stops_the_job_before_it_trains(ray_cluster: str, home: Path) -> None:
    job = BetaKDJob(spec_of(home, "sabotaged", "sabotaged"))
    with pytest.raises(ModelUnfit, match="teacher, weights"):
        job.fit()
    run = Path(job.run)
    noted = json.loads((run / CHECKS).read_text())["findings"]
    assert any(each["verdict"] == "fail" and each["check"] == "weights" for each in noted)
    assert not (run / CHECKPOINTS).exists()
    assert not (run / CANARY).exists()


@pytest.mark.timeout(400)
def test_an_honest_job_has_its_checks_in_its_files_and_in_the_card(ray_cluster: str, home: Path) -> None:
    job = BetaKDJob(spec_of(home, "honest", "teacher", check={"samples": 4, "answers": 8, "canary_every": 1}))
    result = job.fit()
    assert result.steps == 4
    noted = json.loads((Path(job.run) / CHECKS).read_text())
    assert {each["part"] for each in noted["findings"]} == {"teacher", "student"}
    assert not [each for each in noted["findings"] if each["verdict"] == "fail"]
    assert noted["origins"]["teacher"]
    assert noted["origins"]["version of torch"]
    assert (Path(job.run) / CANARY).exists()
    card = (Path(job.run) / MODEL / "README.md").read_text()
    assert "| teacher | parity |" in card
    assert "| student | weights |" in card


@pytest.mark.timeout(300)
def test_the_command_checks_without_a_run(ray_cluster: str, home: Path) -> None:
    job = BetaKDJob(spec_of(home, "command", "teacher", check={"samples": 4, "answers": 8}))
    found = job.check_models()
    assert {each.part for each in found} == {"teacher", "student"}
    assert not Path(job.run).exists()


class Odd(TeacherScorer):
    """Teacher of which the second to load answers differently."""

    def __init__(self, spec: Any, needs: Any) -> None:
        loaded = len(list(Path(spec.path).glob(f"{LOADED}-*")))
        (Path(spec.path) / f"{LOADED}-{loaded}").touch()
        self.is_odd = loaded == 1
        super().__init__(spec, needs)

    def score(self, inputs: Any) -> GroupAnswer:
        answer = super().score(inputs)
        if self.is_odd:
            answer.arrays["hidden"] = -answer.arrays["hidden"]
        return answer


class Pool(TeacherPool):
    """Pool of teachers of which the second differs."""

    def _engine(self) -> type[TeacherScorer]:
        return Odd


@pytest.mark.timeout(300)
def test_a_replica_on_the_cluster_that_differs_is_replaced(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TeacherSpec(path=save_tiny(tmp_path / "teacher", seed=1))
    pool = Pool(spec, Needs(frozenset({"hidden"})), TeacherPoolSpec(min=1, cpus=0.5), 0.0)
    pool.wait_until_ready(150.0)
    (first,) = pool.members().values()
    signal, replica = first.apply(answer_canary, INPUTS).result(60.0)
    assert isinstance(replica, Replica)
    said: list[str] = []
    pool.require_answer(KnownAnswer(INPUTS, signal, "float32", replica), 0, said.append)
    pool.lost(0, "for the test")
    deadline = time.monotonic() + 200
    while not pool.members():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert list(pool.members()) == [2]
    assert len(said) == 1
    assert module.MOST_DIFFERING > 1
