"""Metrics are written beside the training, in parts, and count once however often a run begins again."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from fsspec.implementations.local import LocalFileSystem

from betakd_ray import tracking
from betakd_ray.run import metrics as stored
from betakd_ray.run.folder import METRICS
from betakd_ray.run.folder import METRICS_PARTS as PARTS
from betakd_ray.run.metrics import from_jsonl, read_metrics
from betakd_ray.spec import JobSpec, parse_spec
from betakd_ray.tracking import MetricsWriter
from betakd_ray.train import loop
from betakd_ray.train.loop import Worker
from betakd_ray.train.micro_batches import Step


def spec(folder: Path, *trackers: str) -> JobSpec:
    return parse_spec(
        {
            "name": "run",
            "data": {"train": "unused.tar"},
            "student": {"init": {"kind": "checkpoint", "path": "unused"}},
            "objective": {"weighting": "equal"},
            "output": {"path": str(folder)},
            "tracking": {"trackers": list(trackers)},
        }
    )


def begin(folder: Path, reference: str | None = None) -> MetricsWriter:
    metrics = MetricsWriter(spec(folder), str(folder / "run"))
    metrics.restore(reference)
    return metrics


def log(metrics: MetricsWriter, *steps: int, loss: float = 0.5) -> None:
    for step in steps:
        metrics.log({"step": step, "loss": loss})


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(str(folder / "run"))]


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / PARTS).iterdir())


def test_what_was_logged_is_read_while_the_run_goes_on_and_when_it_is_done(tmp_path: Path) -> None:
    assert steps(tmp_path) == []
    metrics = begin(tmp_path)
    log(metrics, 1, 2)
    metrics.flush()
    log(metrics, 3)
    metrics.flush()
    assert steps(tmp_path) == [1, 2, 3]
    assert not (tmp_path / "run" / METRICS).exists()
    log(metrics, 4)
    metrics.close()
    assert steps(tmp_path) == [1, 2, 3, 4]
    written = from_jsonl((tmp_path / "run" / METRICS).read_text())
    assert [record["step"] for record in written] == [1, 2, 3, 4]
    assert metrics.last == {"step": 4, "loss": 0.5}


def test_a_part_has_only_what_is_new(tmp_path: Path) -> None:
    metrics = begin(tmp_path)
    for number in range(1, 4):
        log(metrics, number)
        metrics.flush()
    sizes = [(tmp_path / "run" / PARTS / name).read_text().count("\n") for name in parts(tmp_path)]
    assert sizes == [1, 1, 1, 1]  # the first says where the attempt begins


def test_parts_are_written_without_being_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FLUSH_S", 0.05)
    metrics = begin(tmp_path)
    log(metrics, 1)
    deadline = time.monotonic() + 30
    while steps(tmp_path) != [1]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Counted(dict[str, Any]):
    """A record that counts how many of its kind are alive."""

    alive = most = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self) -> None:
        Counted.alive -= 1


MANY = 100_000


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    """Let every record that is read count as alive, too."""
    Counted.alive = Counted.most = 0
    for name in ("stream_metrics", "stream_parts"):
        real = getattr(tracking, name)
        monkeypatch.setattr(tracking, name, lambda *where, real=real: map(Counted, real(*where)))
    return Counted


def test_a_writer_holds_few_records_however_many_it_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: type[Counted]
) -> None:
    monkeypatch.setattr(tracking, "FLUSH_S", 3600.0)
    monkeypatch.setattr(tracking, "MOST_S", 3600.0)
    metrics = begin(tmp_path)
    for first in range(0, MANY, 100):
        for step in range(first, first + 100):
            metrics.log(Counted({"step": step, "loss": 0.5}))
        metrics._do(lambda: None)  # the thread has taken them
    assert counted.most <= tracking.MAX_PART_RECORDS + 110
    reference = metrics.reference()
    assert json.loads(reference)["records"] == MANY
    metrics.flush()

    counted.most = counted.alive
    metrics = begin(tmp_path, reference)
    assert metrics.last["step"] == MANY - 1
    metrics.close()
    assert counted.most <= 2 * tracking.MAX_PART_RECORDS + 10
    assert (tmp_path / "run" / METRICS).read_bytes().count(b"\n") == MANY
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_reading_holds_few_parts_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = begin(tmp_path)
    for step in range(100):
        log(metrics, step)
        metrics.flush()
    seen, real = [], stored._read_part
    monkeypatch.setattr(stored, "_read_part", lambda *part: seen.append(part) or real(*part))
    stream = stored.stream_metrics(LocalFileSystem(), str(tmp_path / "run"))
    assert next(stream)["step"] == 0
    assert len(seen) <= stored._READERS + 1  # and the first part of the one attempt
    assert len(list(stream)) == 99


def test_a_copy_of_old_metrics_that_was_cut_off_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "MAX_PART_RECORDS", 2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / METRICS).write_text("".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in range(1, 6)))
    reference = json.dumps({"step": 5, "records": 5})
    with monkeypatch.context() as patch:
        real = MetricsWriter._store_part

        def dies(self: Any, number: int, attempt: str, lines: str) -> None:
            if number == 3:
                raise OSError("no space left")
            real(self, number, attempt, lines)

        patch.setattr(MetricsWriter, "_store_part", dies)
        with pytest.raises(OSError, match="no space"):
            begin(tmp_path, reference)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    begin(tmp_path, reference).close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    first = begin(tmp_path)
    log(first, 1, 2)
    first.flush()
    reference = first.reference()
    log(first, 3, 4, loss=9.0)
    first.flush()  # and dies; step 3 is done again
    second = begin(tmp_path, reference)
    assert second.last["step"] == 2
    assert steps(tmp_path) == [1, 2]
    log(second, 3)
    log(first, 5, loss=9.0)
    first.flush()  # a process that was given up, and did not notice yet
    second.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(str(tmp_path / "run"))] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.5),
    ]


def test_a_resume_that_takes_long_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint takes minutes to load; meanwhile nothing may be written that begins the metrics again."""
    metrics = begin(tmp_path)
    log(metrics, 1, 2, 3)
    reference = metrics.reference()
    metrics.flush()
    monkeypatch.setattr(tracking, "FLUSH_S", 0.01)
    metrics = MetricsWriter(spec(tmp_path), str(tmp_path / "run"))
    time.sleep(0.3)
    assert steps(tmp_path) == [1, 2, 3]
    metrics.restore(reference)
    log(metrics, 4)
    metrics.close()
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_run_that_begins_again_without_a_checkpoint_begins_its_metrics_again(tmp_path: Path) -> None:
    first = begin(tmp_path)
    log(first, 1, 2)
    first.flush()
    begin(tmp_path)
    assert steps(tmp_path) == []


def test_a_run_that_died_after_it_was_done_goes_on_from_its_parts(tmp_path: Path) -> None:
    first = begin(tmp_path)
    log(first, 1, 2)
    first.flush()
    reference = first.reference()
    log(first, 3)
    first.close()
    second = begin(tmp_path, reference)
    assert steps(tmp_path) == [1, 2]
    log(second, 3)
    second.close()
    assert steps(tmp_path) == [1, 2, 3]


def test_a_run_whose_metrics_are_one_file_without_parts_keeps_what_it_had_logged(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / METRICS).write_text("".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in (1, 2, 3, 4)))
    for _ in range(2):  # and again, as the first attempt may die
        metrics = begin(tmp_path, json.dumps({"step": 3, "records": 3}))
        log(metrics, 4, 5)
        metrics.flush()
        assert steps(tmp_path) == [1, 2, 3, 4, 5]
    metrics.close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_metrics_that_are_missing_are_said_to_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begin(tmp_path, json.dumps({"step": 2, "records": 2}))
    assert "2 records up to step 2 were logged, but 0 are there" in caplog.text


def test_logging_waits_for_nothing_and_an_error_of_the_store_comes_with_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = begin(tmp_path)
    asked, answer = threading.Event(), threading.Event()

    def refused(self: Any, path: str, *arguments: Any, **options: Any) -> None:
        asked.set()
        answer.wait(30)
        raise PermissionError("Access Denied")

    monkeypatch.setattr(LocalFileSystem, "pipe_file", refused)
    monkeypatch.setattr(tracking, "FLUSH_S", 0.0)
    monkeypatch.setattr(tracking, "MOST_S", 0.0)
    log(metrics, 1)
    metrics.write("skipped.jsonl", "")
    assert asked.wait(30)
    begun = time.perf_counter()
    log(metrics, *range(2, 1000))
    assert time.perf_counter() - begun < 1
    answer.set()
    with pytest.raises(PermissionError, match="Access Denied"):
        metrics.flush()
    with pytest.raises(PermissionError, match="Access Denied"):
        log(metrics, 1000)


def test_the_list_of_skipped_steps_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written whole at each skip, and into each checkpoint."""
    monkeypatch.setattr(loop.checkpoint, "gather", lambda mine, group: [mine])
    sample = SimpleNamespace(epoch=0, shard=0, index=0, key="k")
    step = mock.create_autospec(Step, instance=True, samples=[sample, sample])
    written: list[str] = []
    worker = SimpleNamespace(
        config=SimpleNamespace(plan=SimpleNamespace(shards=[SimpleNamespace(url="/a.tar")])),
        learner=SimpleNamespace(host_group=None),
        metrics=SimpleNamespace(write=lambda name, content: written.append(content)),
        training=SimpleNamespace(global_batch_size=30_000),
        skips=[],
        step=0,
    )
    for worker.step in range(1, 10):
        Worker.note_skip(worker, step)  # type: ignore[arg-type]
    assert [skip["step"] for skip in worker.skips] == [7, 8, 9]
    assert [skip["step"] for skip in from_jsonl(written[-1])] == [7, 8, 9]
    worker.training.global_batch_size = 10**6
    Worker.note_skip(worker, step)  # type: ignore[arg-type]
    assert [skip["step"] for skip in worker.skips] == [9]
