"""evaluation.json: what counts as the result of an evaluation, and what does not."""

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from betakd_ray.data.shards import Shard
from betakd_ray.errors import Interrupted, OutputError
from betakd_ray.evaluation import result as module
from betakd_ray.evaluation.result import RESULT, Result, Subject, read_result
from betakd_ray.evaluation.run import Evaluation
from betakd_ray.spec import EvaluationSpec, StorageSpec, parse_spec

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


@pytest.mark.parametrize("small", [True, False], ids=["by content", "by time"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "adapter.safetensors"])
def test_another_model_in_the_same_folder_is_another_subject(model, monkeypatch, small, file):
    monkeypatch.setattr(module, "SMALL_BYTES", 1 << 20 if small else 0)
    before = Subject.of(spec(model), SHARDS)
    assert Subject.of(spec(model), SHARDS) == before
    (model / file).write_bytes(b"x" * 100)
    os.utime(model / file, (1, 1))
    assert Subject.of(spec(model), SHARDS).models != before.models


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
