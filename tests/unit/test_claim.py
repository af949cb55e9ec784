"""A run goes on only with the job, the data and the models that it was begun with, whatever files of it are lost."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from betakd_ray.data.pack import pack
from betakd_ray.errors import OutputError
from betakd_ray.job import BetaKDJob
from betakd_ray.models import identity
from betakd_ray.models.identity import model_digest
from betakd_ray.run import claim
from betakd_ray.run.audit import audit
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.claim import changes
from betakd_ray.run.extension import extend, is_extended
from betakd_ray.run.folder import LEDGER, MANIFEST, PLAN, PROGRESS, QUARANTINE, RESULT, SPEC
from betakd_ray.run.lease import Permit
from betakd_ray.run.result import JobResult as RunResult
from betakd_ray.spec import ModelSpec, StorageSpec, parse_spec
from tests.tiny import job_tree, numbered_samples, save_tiny


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "teacher", seed=1)
    save_tiny(tmp_path / "student", seed=2)
    pack(numbered_samples(12), str(tmp_path / "shards"), samples_per_shard=5)
    return tmp_path


def job(home: Path, **changes: Any) -> BetaKDJob:
    return BetaKDJob(parse_spec({**job_tree(home, home / "runs"), **changes}))


@pytest.fixture
def run(home: Path) -> Path:
    """Begin a run and commit a checkpoint of it."""
    begun = job(home)
    plan, _ = begun.check()
    store = CheckpointStore(begun.run, StorageSpec(), origins=begun.origins)
    files = home / "files"
    files.mkdir()
    (files / SPEC).write_text(begun.spec.model_dump_json())
    (files / LEDGER).write_text(plan.empty_ledger().to_json())
    (files / QUARANTINE).write_text("")
    (files / PROGRESS).write_text(json.dumps({"samples": 4, "dropped": 0, "skipped": 0, "skipped_in_a_row": 0}))
    name = "step-00000001-a"
    store.commit(store.manifest(name, 1, 1, store.upload(files, name)))
    return Path(begun.run)


def edit_tensor(folder: Path, name: str | None = None) -> None:
    """Change one number of a model's weights; the file keeps its size."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = name or min(tensors, key=lambda each: tensors[each].numel())
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})


def forget(run: Path) -> None:
    for name in (SPEC, PLAN):
        (run / name).unlink()


def test_a_run_goes_on_as_it_was_begun(home: Path, run: Path) -> None:
    job(home).check()
    forget(run)
    job(home, cluster={"start_timeout_s": 5.0}).check()  # may differ
    objective = job_tree(home, home / "runs").get("objective", {})
    job(home, objective={**objective, "chunk_rows": 7}).check()  # as may what does not change the result
    assert {path.name for path in run.iterdir()} >= {SPEC, PLAN}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training": {"global_batch_size": 4, "micro_batch_size": 4, "seed": 7}}, "training.seed was 0 and is 7"),
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr was 4e-05 and is 0.5"),
        ({"objective": {"energies": "rkl"}}, "objective.energies was "),
        ({"teacher": None, "objective": {}}, "teacher was "),
    ],
)
def test_another_job_is_refused_by_field_although_its_spec_and_plan_are_gone(
    home: Path, run: Path, change: Any, said: str
) -> None:
    forget(run)
    with pytest.raises(OutputError, match=rf"holds another job of this name: .*{said}"):
        job(home, **change).check()
    assert not (run / SPEC).exists()  # it was not claimed for the other job


def other_data(home: Path) -> None:
    pack(numbered_samples(12, broken=3), str(home / "shards"), samples_per_shard=5)


def other_vocabulary(home: Path) -> None:
    for model in ("teacher", "student"):
        file = home / model / "tokenizer.json"
        tree = json.loads(file.read_text())
        vocabulary = tree["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        file.write_text(json.dumps(tree))


REPLACED = {
    "plan": other_data,
    "student.init": lambda home: edit_tensor(home / "student"),
    "teacher": lambda home: edit_tensor(home / "teacher"),
    "rendering of the student": other_vocabulary,
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_was_replaced_behind_the_same_path_is_named(home: Path, run: Path, name: str) -> None:
    REPLACED[name](home)
    (run / PLAN).unlink()
    with pytest.raises(OutputError, match=rf"begun with another .*{name}.* replaced since step-00000001-a"):
        job(home).check()


def test_another_version_of_a_library_is_only_a_warning(
    home: Path, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(claim, "version", lambda name: "99.1")
    job(home).check()
    assert "goes on with another version of torch: 99.1" in caplog.text


def test_a_checkpoint_of_a_version_that_noted_nothing_goes_on(home: Path, run: Path) -> None:
    file = next(run.glob(f"checkpoints/*/{MANIFEST}"))
    tree = json.loads(file.read_text())
    del tree["origins"], tree["token"], tree["sha256"]
    file.write_text(json.dumps(tree))
    edit_tensor(home / "student")
    job(home).check()


def test_two_jobs_that_claim_a_folder_together_are_not_mixed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second writes its spec between the first one's look and its write."""
    looked = claim.was_here
    other = job(home, optimizer={"lr": 0.5})

    def late(run: str, spec: Any) -> bool:
        found = looked(run, spec)
        monkeypatch.setattr(claim, "was_here", looked)
        other.check()
        return found

    monkeypatch.setattr(claim, "was_here", late)
    with pytest.raises(OutputError, match="holds another job"):
        job(home).check()
    assert json.loads((Path(other.run) / SPEC).read_text())["optimizer"]["lr"] == 0.5


# ------------------------------------------------------------------------------------------- a job that grows


BATCHES = {"global_batch_size": 4, "micro_batch_size": 4}


def test_a_run_may_get_more_epochs_and_then_has_them_also_if_it_was_finished(home: Path, run: Path) -> None:
    result = RunResult("job", str(run), "model", {"loss": 1.0}, 3, 12, 12, 0, 0, 0)
    (run / RESULT).write_text(json.dumps(asdict(result)))
    longer = job(home, training={**BATCHES, "epochs": 3})
    plan, _ = longer.check()
    assert plan.samples == 36
    assert is_extended(longer.run, longer.spec)
    assert longer._finished() is None
    assert job(home)._finished() is not None  # nothing has changed until the run is this driver's
    extend(longer.run, longer.spec, plan, Permit(longer.run, StorageSpec()))
    assert not (run / RESULT).exists()
    assert not is_extended(longer.run, longer.spec)
    longer.check()
    assert audit(longer.run, StorageSpec()).problems == ["step-00000001-a: 4 samples were in two steps: 1 steps of 4 "
                                                         "took 4; 0 are consumed and 0 dropped"]  # fmt: skip
    with pytest.raises(OutputError, match=r"training\.epochs was 3 and is 1"):
        job(home).check()


@pytest.mark.parametrize(
    ("before", "now", "may"),
    [(2, 3, True), (2, None, True), (3, 2, False), (None, 2, False)],
)
def test_max_steps_may_grow_and_not_shrink(home: Path, before: int | None, now: int | None, may: bool) -> None:
    begun = job(home, training={**BATCHES, "max_steps": before})
    begun.check()
    then = job(home, training={**BATCHES, "max_steps": now})
    if may:
        then.check()
        assert is_extended(then.run, then.spec)
    else:
        with pytest.raises(OutputError, match=rf"training\.max_steps was {before} and is {now}"):
            then.check()


def test_a_job_that_grows_and_changes_is_refused_by_what_changed(home: Path, run: Path) -> None:
    with pytest.raises(OutputError, match=r"this name: training\.seed was 0 and is 5\. Restore"):
        job(home, training={**BATCHES, "epochs": 3, "seed": 5}).check()


def test_a_section_that_came_or_went_is_named_as_a_whole(home: Path) -> None:
    before, now = job(home).spec, job(home, teacher=None, objective={"weighting": "equal"}).spec
    named = [change.field for change in changes(before, now)]
    assert "teacher" in named
    assert not any(name.startswith("teacher.") for name in named)


# ------------------------------------------------------------------------------------------- digests of models


def test_a_copy_has_the_same_digest_and_every_tensor_counts(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "WHOLE_BYTES", 1000)  # as if the file were large
    before = model_digest(ModelSpec(path=str(home / "student")))
    assert before == model_digest(ModelSpec(path=str(shutil.copytree(home / "student", tmp_path / "copy"))))
    (file,) = (home / "student").glob("*.safetensors")
    for name in load_file(file):
        edit_tensor(tmp_path / "copy", name)
        assert model_digest(ModelSpec(path=str(tmp_path / "copy"))) != before
        shutil.copy(file, tmp_path / "copy")


def test_what_loading_does_not_read_may_change(home: Path) -> None:
    spec = ModelSpec(path=str(home / "student"))
    before = model_digest(spec)
    (home / "student" / "README.md").write_text("notes")
    torch.save({}, home / "student" / "optimizer.pt")
    Image.new("RGB", (4, 4)).save(home / "student" / "picture.png")
    assert model_digest(spec) == before
    (home / "student" / "chat_template.jinja").write_text("{{ messages }}")
    assert model_digest(spec) != before
