"""What a user can get wrong is one clear error before anything is asked of a cluster. `check()` needs no Ray."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from ray.exceptions import ActorDiedError
from transformers import CLIPVisionConfig
from typer.testing import CliRunner

from betakd_ray import errors
from betakd_ray.cli import app
from betakd_ray.data.pack import pack
from betakd_ray.job import BetaKDJob, JobResult
from betakd_ray.on_ray.monitor import Monitor
from betakd_ray.on_ray.source import _done, _patience
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.sigterm import SIGNALS
from betakd_ray.spec import JobSpec, parse_spec
from betakd_ray.train import worker
from tests.actors import Local
from tests.tiny import job_tree, save_tiny

SAMPLES = 12
DONE = JobResult("job", "run", "model", {"loss": 1.0}, 1, 1, 1, 0, 0, 0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a teacher, a student and a dozen packed samples."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny(folder / "teacher", seed=1)
    save_tiny(folder / "student", seed=2)
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12)).save(buffer, "PNG")
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "This."}]
    samples = ({"id": str(n), "conversations": turns, "images": [buffer.getvalue()]} for n in range(SAMPLES))
    pack(samples, str(folder / "shards"), samples_per_shard=5)
    return folder


def spec(home: Path, output: Path, **changes: Any) -> JobSpec:
    return parse_spec({**job_tree(home, output), **changes})


def refused(job: JobSpec, kind: type[errors.UserError], match: str) -> None:
    """Check that `check()` raises this error and leaves no files."""
    with pytest.raises(kind, match=match):
        BetaKDJob(job).check()
    assert not Path(job.output.path).exists()


def test_a_job_that_can_work_is_checked_without_ray(home, tmp_path):
    plan, renderers = BetaKDJob(spec(home, tmp_path / "out")).check()
    assert plan.samples == SAMPLES
    assert list(renderers) == ["student"]  # teacher and student see samples alike


@pytest.mark.parametrize(("auto_steps", "said"), [(1, ""), (2, "auto_steps = 2, and the job has 2 steps")])
def test_weights_that_would_never_be_set_are_told_of(home, tmp_path, caplog, auto_steps, said):
    objective = {"energies": "fkl", "weighting": {"kind": "manual", "auto_steps": auto_steps}}
    training = {"max_steps": 2, "global_batch_size": 4, "micro_batch_size": 4}
    BetaKDJob(spec(home, tmp_path / "out", objective=objective, training=training)).check()
    assert said in caplog.text
    assert bool(said) == ("auto_steps" in caplog.text)


def test_no_shard_is_an_error(home, tmp_path):
    refused(spec(home, tmp_path / "out", data={"train": str(home / "none-*.tar")}), errors.DataError, "none-")


def test_a_shard_without_a_manifest_is_an_error_that_names_the_remedy(home, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "a.tar").write_bytes(next((home / "shards").glob("*.tar")).read_bytes())
    refused(spec(home, tmp_path / "out", data={"train": str(foreign / "a.tar")}), errors.DataError, "betakd index")


def test_a_store_that_nobody_answers_at_is_an_error(home, tmp_path, monkeypatch):
    monkeypatch.setattr("betakd_ray.data.manifest.PLANNING_ATTEMPTS", 1)
    data = {"train": "s3://bucket/a-*.tar", "storage": {"endpoint_url": "http://127.0.0.1:9", "anonymous": True}}
    refused(spec(home, tmp_path / "out", data=data), errors.DataError, r"127\.0\.0\.1:9|s3://bucket")


def test_fewer_samples_than_one_global_batch_are_an_error(home, tmp_path):
    training = {"global_batch_size": 64, "micro_batch_size": 4}
    match = rf"{SAMPLES} samples .* fewer than one training\.global_batch_size of 64"
    refused(spec(home, tmp_path / "out", training=training), errors.DataError, match)


def test_different_tokenizers_are_an_error_that_names_a_token(home, tmp_path):
    save_tiny(tmp_path / "other", seed=3)
    file = tmp_path / "other" / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tree))
    student = {"init": {"kind": "checkpoint", "path": str(tmp_path / "other")}}
    job = spec(home, tmp_path / "out", student=student)
    refused(job, errors.VocabularyMismatch, r"maps '[ab]' to id")


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_layer_that_a_model_does_not_have_is_an_error(home, tmp_path, role):
    layer = {"teacher": 1, "student": 1, role: 3}
    job = spec(home, tmp_path / "out", objective={"energies": [{"kind": "fd", "layer": layer}]})
    refused(job, errors.ModelError, rf"fd\.layer\.{role} is 3, but the {role}'s language model has 2 layers")


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_model_that_writes_no_text_is_an_error(home, tmp_path, role):
    CLIPVisionConfig().save_pretrained(tmp_path / "clip")
    path = {"path": str(tmp_path / "clip")}
    change = {"teacher": path} if role == "teacher" else {"student": {"init": {"kind": "checkpoint", **path}}}
    refused(spec(home, tmp_path / "out", **change), errors.ModelError, "clip.*neither a vision.language model")


def test_a_model_that_is_not_there_is_an_error(home, tmp_path):
    teacher = {"path": str(tmp_path / "nowhere")}
    refused(spec(home, tmp_path / "out", teacher=teacher), errors.ModelError, "nowhere")


def test_an_output_that_holds_another_job_is_an_error_and_is_left_alone(home, tmp_path):
    BetaKDJob(spec(home, tmp_path / "out")).check()
    before = (tmp_path / "out" / "job" / "spec.json").read_bytes()
    other = spec(home, tmp_path / "out", objective={"energies": "rkl"})
    with pytest.raises(errors.OutputError, match=r"holds another job.*objective"):
        BetaKDJob(other).check()
    assert (tmp_path / "out" / "job" / "spec.json").read_bytes() == before


def test_what_only_places_a_job_may_change_between_its_runs(home, tmp_path):
    BetaKDJob(spec(home, tmp_path / "out")).check()
    training = {"global_batch_size": 4, "micro_batch_size": 2, "workers": 2, "log_every": 3}
    BetaKDJob(spec(home, tmp_path / "out", training=training)).check()


def test_a_users_error_is_one_line_and_exit_code_2(home, tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(spec(home, tmp_path / "out", data={"train": str(home / "none.tar")}).model_dump_json())
    result = CliRunner().invoke(app, ["distill", str(file)])
    assert result.exit_code == 2
    phase, error = result.stderr.splitlines()
    assert phase == "job: checking the data and the models"
    assert error.startswith("betakd: ")
    script = Path(__file__).parents[2] / "jobs" / "distill.py"
    command = [sys.executable, str(script), "--spec", str(tmp_path / "absent.yaml")]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith("betakd: ")
    assert "absent.yaml" in process.stderr


def test_an_output_in_the_folder_that_ray_uploaded_is_an_error(home, tmp_path):
    """Where a relative path leads, under `ray job submit --working-dir`."""
    uploaded = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    refused(spec(home, uploaded / "runs"), errors.OutputError, "output.path.*ray job submit.*absolute path")
    assert not uploaded.exists()


def test_a_start_of_the_workers_waits_for_a_store_that_is_out(home, tmp_path, monkeypatch):
    """Ray Train would end the job for an error here."""
    job = BetaKDJob(spec(home, tmp_path / "out"))
    plan, _ = job.check()
    store = CheckpointStore(job.run, job.spec.output.storage)
    failures = [errors.OutputUnreachable("500"), errors.OutputUnreachable("500")]
    survey = CheckpointStore.survey
    monkeypatch.setattr(CheckpointStore, "survey", lambda self: _raised(failures.pop()) if failures else survey(self))
    assert _patience(job.spec, sleep=lambda _: None)(_done, store, plan)[1].count == 0
    assert not failures


def test_a_start_of_the_workers_gives_up_at_once_on_an_output_that_is_wrong(home, tmp_path, monkeypatch):
    job = BetaKDJob(spec(home, tmp_path / "out"))
    plan, _ = job.check()
    store = CheckpointStore(job.run, job.spec.output.storage)
    monkeypatch.setattr(CheckpointStore, "survey", lambda _: _raised(errors.OutputError("damaged")))
    with pytest.raises(errors.OutputError, match="damaged"):
        _patience(job.spec)(_done, store, plan)


@pytest.mark.parametrize(
    ("error", "is_pool_dead", "is_final"),
    [
        (errors.OutputUnreachable("the store"), False, False),
        (errors.DataUnreachable("the store"), False, False),
        (errors.OutputError("the store"), False, True),
        (ActorDiedError(), True, True),
        (ActorDiedError(), False, False),  # one of Ray's own actors, which a restart replaces
    ],
    ids=str,
)
def test_a_worker_notes_what_no_restart_will_mend(monkeypatch, error, is_pool_dead, is_final):
    monitor = Monitor(1, [], max_failures=0)
    config = object.__new__(worker.WorkerConfig)
    object.__setattr__(config, "monitor", Local(monitor))
    object.__setattr__(
        config, "pool", Local(SimpleNamespace(__ray_ready__=lambda: _raised(error if is_pool_dead else True)))
    )
    monkeypatch.setattr("betakd_ray.train.loop.Worker", lambda _: _raised(error))
    monkeypatch.setattr(worker.ray, "get", lambda answer: answer)
    with pytest.raises(type(error)):
        worker.train_worker({"worker": config})
    assert (monitor.failure() is not None) == is_final


def test_ray_s_own_actors_load_nothing_that_trains():
    """They unpickle this on every restart; transformers is some seconds and hundreds of megabytes."""
    names = "betakd_ray.on_ray.source, betakd_ray.train.worker"
    code = f"import sys, {names}; print({{'transformers', 'deepspeed'}} & {{*sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def _raised(outcome):
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


# ---- processes that watch over the job -----------------------------------------------------------------------------


@pytest.fixture
def attempts(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[BetaKDJob, list[int]]]:
    """Return a function that makes a job whose first `deaths` runs lose a process, and the list of its runs."""

    def make(deaths: int) -> tuple[BetaKDJob, list[int]]:
        began: list[int] = []
        job = BetaKDJob(spec(home, tmp_path))

        def run(*_: Any) -> JobResult:
            began.append(len(began))
            if len(began) <= deaths:
                raise ActorDiedError
            return DONE

        monkeypatch.setattr(job, "_run", run)
        monkeypatch.setattr("betakd_ray.job.connected", lambda _: nullcontext())
        return job, began

    return make


def test_a_job_that_loses_its_pool_or_monitor_begins_again(attempts: Any, caplog: pytest.LogCaptureFixture) -> None:
    job, began = attempts(deaths=2)
    assert job.fit() == DONE
    assert began == [0, 1, 2]
    assert caplog.text.count("job: restarts from its last checkpoint") == 2


@pytest.mark.parametrize("number", SIGNALS)
def test_a_job_that_is_to_end_while_its_teachers_load_asks_to_be_resumed(
    attempts: Any, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    job, _ = attempts(deaths=0)

    def load(*_: Any) -> JobResult:
        os.kill(os.getpid(), number)
        job._stop.pause(20.0)  # as every wait for teachers does
        return DONE

    monkeypatch.setattr(job, "_run", load)
    before = signal.getsignal(number)
    with pytest.raises(errors.Interrupted, match="lost nothing: no step was done"):
        job.fit()
    assert signal.getsignal(number) == before


def test_a_job_that_loses_them_again_and_again_says_so(attempts: Any) -> None:
    job, began = attempts(deaths=99)
    with pytest.raises(
        errors.TrainingError, match=r"job: control processes of the job died 4 times.*max_failures.* Run the job again"
    ):
        job.fit()
    assert began == [0, 1, 2, 3]


def test_a_job_that_gets_on_in_between_may_lose_them_more_often(attempts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job, began = attempts(deaths=9)
    monkeypatch.setattr("betakd_ray.job.require_same_origins", lambda *_: None)
    monkeypatch.setattr(CheckpointStore, "latest", lambda _: SimpleNamespace(step=len(began) // 3))
    assert job.fit() == DONE
    assert len(began) == 10
