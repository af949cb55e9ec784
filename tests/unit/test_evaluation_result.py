"""evaluation.json: what counts as the result of an evaluation, and what does not."""

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import save_file

from betakd_ray.data.shards import Shard
from betakd_ray.errors import Interrupted, ModelError, OutputError
from betakd_ray.evaluation import result as module
from betakd_ray.evaluation.result import RESULT, Result, Subject, read_result
from betakd_ray.evaluation.run import Evaluation
from betakd_ray.models import identity
from betakd_ray.spec import EvaluationSpec, StorageSpec, parse_spec
from betakd_ray.storage import S3
from tests.s3 import served

SHARDS = [Shard("/data/test-0.tar", 10, 999, "aa")]
STORAGE = StorageSpec()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(100))
    return folder


def spec(model: Path, **changed: object) -> EvaluationSpec:
    tree = {"name": "e", "models": {"a": {"path": str(model)}}, "data": {"train": "/data/test-*.tar"}}
    return parse_spec(tree | {"output": str(model.parent)} | changed, EvaluationSpec)


def test_a_result_of_the_same_models_and_questions_counts(model, tmp_path, caplog):
    assert read_result(str(tmp_path), STORAGE, Subject.of(spec(model), SHARDS)) is None
    scores = {"a": {"accuracy": 0.5, "loss": float("nan")}}
    (tmp_path / RESULT).write_text(Result(scores, Subject.of(spec(model), SHARDS)).to_json())
    found = read_result(str(tmp_path), STORAGE, Subject.of(spec(model), SHARDS))
    assert repr(found) == repr(scores)
    assert not caplog.records


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "adapter.safetensors"])
def test_another_model_in_the_same_folder_is_another_subject(model, file):
    before = Subject.of(spec(model), SHARDS)
    assert Subject.of(spec(model), SHARDS) == before
    times = (model / "config.json").stat()
    (model / file).write_bytes(b"x" * 100)
    os.utime(model / file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Subject.of(spec(model), SHARDS).models != before.models


def test_a_large_model_of_equal_size_and_time_is_another_subject(model, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE_BYTES", 1000)
    seen = []
    for value in (0.0, 1.0):
        save_file({"a": torch.full((9999,), value), "b": torch.zeros(9999)}, model / "model.safetensors")
        os.utime(model / "model.safetensors", (1, 1))
        seen.append(Subject.of(spec(model), SHARDS).models)
    assert seen[0] != seen[1]


def test_a_copy_of_a_local_model_in_its_place_and_files_that_are_not_read_are_the_same_subject(model):
    before = Subject.of(spec(model), SHARDS)
    content = (model / "config.json").read_bytes()
    (model / "config.json").unlink()
    (model / "config.json").write_bytes(content)
    (model / "trainer.log").write_text("step 1")
    assert Subject.of(spec(model), SHARDS) == before


def test_a_model_of_a_url_is_told_from_another_without_a_copy(monkeypatch):
    with served() as s3:
        filesystem, url = s3.filesystem(), f"s3://{s3.bucket}/model"
        storage = {"endpoint_url": s3.endpoint_url, "region": "us-east-1"}
        monkeypatch.setattr(S3, "_get_file", None)  # what copies
        seen = []
        for content in (b"{}", b"{}", b"[]"):
            if not seen or content == b"[]":
                filesystem.pipe_file(f"{s3.bucket}/model/config.json", content)
            remote = spec(Path("/x/m"), models={"a": {"path": url, "storage": storage}})
            seen.append(Subject.of(remote, SHARDS).models)
    assert seen[0] == seen[1] != seen[2]


def test_a_model_that_is_not_there_is_an_error_of_the_model():
    empty = spec(Path("/x/m"), models={"a": {"path": "memory://none"}})
    with pytest.raises(ModelError, match="memory://none: no files there"):
        Subject.of(empty, SHARDS)


def header_of(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8,
        bytes(8),
        header_of("[" * 8),
        header_of('{"a": {"b": 0}}'),
        header_of('{"a": {"data_offsets": [-99999, 1' + "0" * 30 + "]}}"),
        header_of('{"a": {"data_offsets": [1e999, 1]}}'),
    ],
)
def test_a_large_file_with_a_damaged_header_has_a_digest_and_is_left_to_whoever_loads_it(model, monkeypatch, header):
    monkeypatch.setattr(identity, "WHOLE_BYTES", 1000)
    seen = []
    for filling in (b"a", b"b"):
        (model / "model.safetensors").write_bytes(header + filling * 9999)
        seen.append(Subject.of(spec(model), SHARDS).models)
    assert seen[0] != seen[1]


def test_a_result_of_a_version_with_another_digest_is_done_again_with_a_message(model, tmp_path, caplog):
    subject = Subject.of(spec(model), SHARDS)
    former = Subject({"a": "0" * 32}, subject.questions)
    (tmp_path / RESULT).write_text(Result({"a": {"accuracy": 0.5}}, former).to_json())
    assert read_result(str(tmp_path), STORAGE, subject) is None
    assert "or of a version that told them apart in another way. It is evaluated again." in caplog.text


@pytest.mark.parametrize("change", [{"limit": 3}, {"max_new_tokens": 2}, {"data": {"train": "/data/a.tar"}}])
def test_other_questions_are_another_subject(model, change):
    before = Subject.of(spec(model), SHARDS)
    assert Subject.of(spec(model, **change), SHARDS).questions != before.questions
    assert Subject.of(spec(model), [Shard("/data/test-0.tar", 10, 999, "bb")]).questions != before.questions


def test_a_changed_benchmark_is_another_subject(model, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for threshold in (1, 2):
        (tmp_path / "scoring.py").write_text(f"def score(answers):\n    return {{'accuracy': {threshold}.0}}\n")
        sys.modules.pop("scoring", None)
        module.source_of.__globals__["inspect"].linecache.clearcache()
        digests.append(Subject.of(spec(model, benchmark="scoring:score"), SHARDS).questions)
    sys.modules.pop("scoring", None)
    assert digests[0] != digests[1]


def test_a_result_is_written_whole_and_a_full_disk_is_named(model, tmp_path, monkeypatch):
    evaluation = Evaluation(spec(model))
    evaluation._store({RESULT: "before"})
    calls = []

    def full(self: LocalFileSystem, path: str, content: bytes, **options: object) -> None:
        calls.append(path)
        Path(path).write_bytes(content[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalFileSystem, "pipe_file", full)
    with pytest.raises(OutputError, match=rf"disk is full: free some space in {tmp_path}/e"):
        evaluation._store({RESULT: "afterwards"})
    assert calls
    assert {path.name: path.read_text() for path in (tmp_path / "e").iterdir()} == {RESULT: "before"}


def test_an_evaluation_that_is_to_stop_ends_and_cancels_what_it_asked(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, cancelled = [], []

    class Task:
        def options(self, **_: Any) -> "Task":
            return self

        def remote(self, *arguments: Any) -> str:
            asked.append("task")
            return "task"

    fake = SimpleNamespace(
        remote=lambda function: Task(),
        wait=lambda pending, timeout: (evaluation.stop(), ([], pending))[1],  # a SIGTERM while it waits
        cancel=lambda task, force: cancelled.append(task),
        cluster_resources=lambda: {"GPU": 0.0},
    )
    monkeypatch.setattr("betakd_ray.evaluation.run.ray", fake)
    monkeypatch.setattr("betakd_ray.evaluation.run._gpus", lambda asked: 0.0)
    evaluation = Evaluation(spec(model))
    with pytest.raises(Interrupted, match="asked to stop"):
        evaluation._answer([])
    assert cancelled == asked == ["task"]
