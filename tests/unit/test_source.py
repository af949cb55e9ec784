"""The start of the workers: one checkpoint is subtracted from the plan, and the workers resume from that very one."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import ray
import ray.data

from betakd_ray.data.ledger import Ledger, SampleIds
from betakd_ray.data.plan import Plan, Quarantined
from betakd_ray.data.shards import Shard
from betakd_ray.errors import SampleRepeated
from betakd_ray.on_ray import source
from betakd_ray.on_ray.monitor import Monitor
from betakd_ray.run.checkpoint import CheckpointStore, Manifest
from betakd_ray.run.folder import LEDGER, QUARANTINE
from betakd_ray.run.metrics import to_jsonl
from betakd_ray.spec import StorageSpec, parse_spec
from tests.actors import Local

PLAN = Plan((Shard("/data/a.tar", 6, 100, "0a"), Shard("/data/b.tar", 6, 100, "0b")), 2, seed=0, shuffle=True)
BAD = Quarantined(1, 1, 5, "05", "no image")


def ids(*places: tuple[int, int, int]) -> SampleIds:
    return SampleIds(*np.array(places, np.int32).T)


def commit(run: Path, step: int, *places: tuple[int, int, int]) -> str:
    """Commit a checkpoint that has done these samples and quarantined one."""
    ledger = PLAN.empty_ledger()
    ledger.add(ids(*places))
    local = run.parent / f"local-{step}"
    local.mkdir()
    (local / LEDGER).write_text(ledger.to_json())
    (local / QUARANTINE).write_text(to_jsonl([asdict(BAD)]))
    (local / "progress.json").write_text(json.dumps({"samples": 0, "dropped": 0, "skipped": 0}))
    store, name = CheckpointStore(str(run), StorageSpec()), f"step-{step:08}-abcdef01"
    store.commit(Manifest(name, step, 1, store.upload(local, name)))
    return name


@pytest.fixture
def monitor() -> Monitor:
    return Monitor(PLAN.samples, [], max_failures=0)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitor: Monitor) -> Any:
    """Return a function that starts workers; it returns what is subtracted from the plan, and the monitor's reply."""
    (tmp_path / "run").mkdir()
    tree = {
        "name": "run",
        "data": {"train": "/data/*.tar"},
        "student": {"init": {"path": "org/student", "kind": "checkpoint"}},
        "output": str(tmp_path),
    }
    monkeypatch.setattr(source.ray, "get", lambda answer: answer)

    def begin(meanwhile: Any = None) -> tuple[Ledger, str | None]:
        seen: list[Ledger] = []

        def stream(reader: Any, plan: Plan, done: Ledger, *_: Any) -> ray.data.Dataset:
            seen.append(done)
            if meanwhile:
                meanwhile()
            return cast(Any, mock.create_autospec(ray.data.Dataset, instance=True))

        monkeypatch.setattr(source, "stream", stream)
        source.rows(ray.ObjectRef.from_random(), parse_spec(tree), str(tmp_path / "run"), PLAN, Local(monitor))
        return seen[0], monitor.starts_from().checkpoint

    return begin


def test_the_monitor_is_told_what_is_in_quarantine_in_the_checkpoint_of_the_rows(
    tmp_path: Path, start: Any, monitor: Monitor
) -> None:
    """It may have begun before a driver that was replaced committed this checkpoint, whose quarantine is left out."""
    commit(tmp_path / "run", 1, (0, 0, 0))
    start()
    assert monitor.quarantined() == [BAD]


def test_a_commit_between_the_stream_and_the_workers_trains_no_sample_twice(tmp_path: Path, start: Any) -> None:
    """The late commit has more samples than the stream leaves out: resumed from it, they would come a second time."""
    run = tmp_path / "run"
    before = [(0, 0, 0), (0, 0, 1), (0, 1, 4)]
    after = [(0, 0, 2), (0, 0, 3)]
    first = commit(run, 1, *before)
    done, told = start(lambda: commit(run, 2, *before, *after))
    store = CheckpointStore(str(run), StorageSpec())
    late = store.latest()
    assert late
    assert late.step == 2
    assert told == first
    named = next(manifest for manifest in store.committed() if manifest.name == told)

    streamed = [
        (epoch, shard, int(index))
        for epoch in range(2)
        for shard in range(2)
        for index in np.flatnonzero(~done.done(epoch, shard))
    ]
    resumed = store.ledger(named)
    resumed.add(ids(*streamed))  # raises if one is there
    resumed.add(ids((BAD.epoch, BAD.shard, BAD.index)))
    assert resumed.count == PLAN.samples
    with pytest.raises(SampleRepeated):
        store.ledger(late).add(ids(*streamed))


def test_the_next_start_goes_on_from_the_late_commit(tmp_path: Path, start: Any) -> None:
    commit(tmp_path / "run", 1, (0, 0, 0))
    start()
    late = commit(tmp_path / "run", 2, (0, 0, 0), (0, 0, 1))
    done, told = start()
    assert told == late
    assert done.count == 3


def test_without_a_checkpoint_the_workers_begin_at_the_beginning(start: Any) -> None:
    done, told = start()
    assert told is None
    assert done.count == 0
