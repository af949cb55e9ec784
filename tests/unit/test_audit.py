"""The audit: a run that kept its promise has no problem, and each way to break it is one, with figures and places."""

import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from typer.testing import CliRunner

from betakd_ray.cli import app
from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Plan, Quarantined, ids_of
from betakd_ray.data.shards import Shard
from betakd_ray.errors import OutputError
from betakd_ray.on_ray.source import _done
from betakd_ray.run.audit import audit
from betakd_ray.run.checkpoint import CheckpointStore, Manifest
from betakd_ray.run.folder import CHECKPOINTS, LEDGER, PLAN, QUARANTINE, TAIL
from betakd_ray.run.metrics import to_jsonl
from betakd_ray.run.plan import tail_of, write_plan, write_tail
from betakd_ray.spec import StorageSpec, parse_spec

LOCAL = StorageSpec()
SHARDS = (Shard("/data/a.tar", 5, 10240, "0000000a"), Shard("/data/b.tar", 3, 10240, "0000000b"))
A_PLAN = Plan(SHARDS, epochs=2, seed=0, shuffle=True)
EVERYTHING = [
    (epoch, shard, index) for epoch in range(2) for shard in range(2) for index in range(SHARDS[shard].samples)
]
UNREADABLE = Quarantined(0, 0, 4, "04", "its image cannot be decoded")
UNANSWERED = Quarantined(1, 1, 0, "00", "the teacher's output is not finite")
LEFT = [(1, 0, 3), (1, 0, 4), (1, 1, 2)]
CONSUMED = [place for place in EVERYTHING if place not in [(0, 0, 4), (1, 1, 0), *LEFT]]
NAME = "step-00000003-abcdef01"


def ledger_of(places: list[tuple[int, int, int]], plan: Plan = A_PLAN) -> Ledger:
    ledger = plan.empty_ledger()
    ledger.add(ids_of([Quarantined(*place, key="", reason="") for place in places]))
    return ledger


@dataclass(frozen=True)
class Run:
    """A finished run of three steps of four samples, in which each field is the content of one file.

    16 samples are planned, 11 consumed, 2 quarantined (one of them dropped from a step), and 3 left over.
    """

    training: dict[str, Any] = field(default_factory=lambda: {"global_batch_size": 4, "micro_batch_size": 4})
    plan: Plan = A_PLAN
    step: int | None = 3
    ledger: Ledger = field(default_factory=lambda: ledger_of(CONSUMED))
    quarantined: tuple[Quarantined, ...] = (UNREADABLE, UNANSWERED)
    dropped: int = 1
    logged: tuple[int, ...] = (1, 2, 3)
    result: dict[str, int] | None = field(
        default_factory=lambda: {"steps": 3, "planned": 16, "consumed": 11, "quarantined": 2, "tail": 3}
    )
    noted: tuple[Quarantined, ...] = (UNREADABLE, UNANSWERED)
    tail: tuple[tuple[int, int, int], ...] = tuple(LEFT)

    def write(self, folder: Path) -> str:
        """Write the files into `folder`/run, as a job would; return this folder."""
        run = folder / "run"
        run.mkdir()
        (run / "spec.json").write_text(spec(folder, {"epochs": self.plan.epochs, **self.training}))
        write_plan(str(run), LOCAL, self.plan)
        (run / "metrics.jsonl").write_text(to_jsonl({"step": step, "loss": 1.0} for step in self.logged))
        if self.step is not None:
            self._commit(run, folder / "local")
        if self.result is not None:
            places = [{"epoch": e, "shard": self.plan.shards[s].url, "index": i} for e, s, i in self.tail]
            write_tail(str(run), LOCAL, places)
            (run / "quarantine.jsonl").write_text(to_jsonl(map(asdict, self.noted)))
            rest = {"name": "run", "path": str(run), "model": f"{run}/model", "metrics": {"loss": 1.0}}
            (run / "result.json").write_text(json.dumps({**rest, "skipped_steps": 0, **self.result}))
        return str(run)

    def _commit(self, run: Path, local: Path) -> None:
        local.mkdir()
        (local / LEDGER).write_text(self.ledger.to_json())
        (local / QUARANTINE).write_text(to_jsonl(map(asdict, self.quarantined)))
        counts = {"samples": 12, "dropped": self.dropped, "skipped": 0, "skipped_in_a_row": 0}
        (local / "progress.json").write_text(json.dumps(counts))
        store = CheckpointStore(str(run), LOCAL)
        assert self.step is not None
        store.commit(Manifest(NAME, self.step, 1, store.upload(local, NAME)))


def spec(folder: Path, training: dict[str, Any]) -> str:
    tree = {
        "name": "run",
        "data": {"train": "/data/*.tar"},
        "student": {"init": {"path": "org/student", "kind": "checkpoint"}},
        "training": training,
        "output": str(folder),
    }
    return parse_spec(tree).model_dump_json()


def problems(folder: Path, **changes: Any) -> list[str]:
    return audit(Run(**changes).write(folder), LOCAL).problems


# -------------------------------------------------------------------------------------------- what adds up


@pytest.fixture
def listings(monkeypatch) -> list[str]:
    """Return the folders of checkpoints that are listed: each listing of a store costs a request."""
    listed, find = [], LocalFileSystem.find

    def counted(self, path, *arguments, **options):
        if path.endswith(CHECKPOINTS):
            listed.append(path)
        return find(self, path, *arguments, **options)

    monkeypatch.setattr(LocalFileSystem, "find", counted)
    return listed


def test_an_audit_and_a_start_of_the_rows_list_the_checkpoints_once(tmp_path, listings):
    run = Run().write(tmp_path)
    listings.clear()
    audit(run, LOCAL)
    assert len(listings) == 1
    store = CheckpointStore(run, LOCAL)
    assert _done(store, A_PLAN)[0] == NAME
    assert len(listings) == 2


def test_a_start_of_the_rows_that_rejects_a_checkpoint_tells_of_it(tmp_path, listings):
    run = Run().write(tmp_path)
    store = CheckpointStore(run, LOCAL)
    (tmp_path / "run/checkpoints" / NAME / LEDGER).write_text("{}")
    later = Manifest(NAME.replace("3", "4"), 4, 1, store.upload(tmp_path / "local", NAME.replace("3", "4")))
    store.commit(later)
    (tmp_path / "run/checkpoints" / later.name / QUARANTINE).write_text("?")
    earlier = Manifest(NAME.replace("3", "2"), 2, 1, store.upload(tmp_path / "local", NAME.replace("3", "2")))
    store.commit(earlier)
    listings.clear()
    name, _, _, loss = _done(store, A_PLAN)
    assert name == earlier.name
    assert re.search(rf"{NAME}.*goes on from {earlier.name}.*The 2 steps after it are done again", loss, re.DOTALL)
    assert len(listings) == 3  # one for each that was read


def test_a_finished_run_that_kept_its_promise_has_no_problem(tmp_path):
    found = audit(Run().write(tmp_path), LOCAL)
    assert found.problems == []
    assert found.is_finished
    assert found.step == 3
    assert found.totals == {"planned": 16, "consumed": 11, "quarantined": 2, "open": 3}
    assert found.samples["open"].tolist() == [[0, 0], [2, 1]]
    assert found.samples["quarantined"].tolist() == [[1, 0], [0, 1]]


def test_open_samples_of_an_unfinished_run_are_still_to_do_and_no_problem(tmp_path):
    found = audit(Run(result=None, step=1, ledger=ledger_of(CONSUMED[:3])).write(tmp_path), LOCAL)
    assert found.problems == []
    assert not found.is_finished
    assert found.totals == {"planned": 16, "consumed": 3, "quarantined": 2, "open": 11}


def test_without_a_checkpoint_everything_is_still_to_do(tmp_path):
    found = audit(Run(result=None, step=None, logged=()).write(tmp_path), LOCAL)
    assert found.problems == []
    assert found.step == 0
    assert found.totals == {"planned": 16, "consumed": 0, "quarantined": 0, "open": 16}


def test_a_job_that_max_steps_ended_may_leave_much(tmp_path):
    run = Run(
        training={"global_batch_size": 4, "micro_batch_size": 4, "max_steps": 1},
        step=1,
        ledger=ledger_of(CONSUMED[:3]),
        logged=(1,),
        result={"steps": 1, "planned": 16, "consumed": 3, "quarantined": 2, "tail": 11},
        tail=(),
    )
    assert audit(run.write(tmp_path), LOCAL).problems == []


def test_the_newest_committed_checkpoint_is_what_counts(tmp_path):
    run = Run(result=None).write(tmp_path)
    torn = Path(run) / "checkpoints" / "step-00000009-abcdef01"
    torn.mkdir()
    (torn / LEDGER).write_text("{")
    assert audit(run, LOCAL).step == 3


def test_the_table_has_a_line_an_epoch_or_a_line_a_shard(tmp_path):
    found = audit(Run().write(tmp_path), LOCAL)
    assert found.table(by_shard=False) == [
        ["epoch", "planned", "consumed", "quarantined", "open"],
        ["0", "8", "7", "1", "0"],
        ["1", "8", "4", "1", "3"],
        ["total", "16", "11", "2", "3"],
    ]
    assert found.table(by_shard=True)[1:] == [
        ["0", "a.tar", "5", "4", "1", "0"],
        ["0", "b.tar", "3", "3", "0", "0"],
        ["1", "a.tar", "5", "3", "0", "2"],
        ["1", "b.tar", "3", "1", "1", "1"],
        ["total", "", "16", "11", "2", "3"],
    ]


# ------------------------------------------------------------------------------------------- what does not


def test_a_ledger_of_another_plan_is_a_problem_and_tells_nothing(tmp_path):
    found = audit(Run(ledger=Ledger([5, 4])).write(tmp_path), LOCAL)
    assert found.problems == [
        f"{NAME}: its ledger and plan.json differ in the size of 1 shards: /data/b.tar with 4 samples, not 3"
    ]
    assert found.totals == dict.fromkeys(("planned", "consumed", "quarantined", "open"), 0)
    assert len(found.table(by_shard=True)) == len(found.table(by_shard=False)) == 2


def test_a_ledger_with_another_number_of_shards_is_a_problem(tmp_path):
    assert problems(tmp_path, ledger=Ledger([5])) == [f"{NAME}: its ledger has 1 shards, but plan.json has 2"]


def test_a_sample_that_counts_without_a_step_is_a_problem(tmp_path):
    (found,) = problems(tmp_path, ledger=ledger_of([*CONSUMED, LEFT[0]]), result=None)
    assert found == (
        f"{NAME}: 1 samples count as done, but were not in any step: "
        "3 steps of 4 took 12; 12 are consumed and 1 dropped"
    )


def test_a_sample_in_two_steps_is_a_problem(tmp_path):
    (found,) = problems(tmp_path, ledger=ledger_of(CONSUMED[2:]), result=None)
    assert found == f"{NAME}: 2 samples were in two steps: 3 steps of 4 took 12; 9 are consumed and 1 dropped"


def test_a_dropped_sample_that_is_not_quarantined_is_a_problem(tmp_path):
    (found,) = problems(tmp_path, ledger=ledger_of(CONSUMED[2:]), dropped=3, result=None)
    assert found == f"{NAME}: 3 samples were dropped from steps, but only 2 are quarantined"


def test_a_sample_consumed_in_an_epoch_that_is_not_planned_is_a_problem(tmp_path):
    (found,) = problems(tmp_path, ledger=ledger_of([*CONSUMED[1:], (2, 1, 1)]), result=None)
    assert found == f"{NAME}: 1 samples are consumed in epochs after the last of 2"


def test_a_sample_both_consumed_and_quarantined_is_a_problem(tmp_path):
    (found,) = problems(tmp_path, ledger=ledger_of([*CONSUMED[1:], (0, 0, 4)]), result=None)
    assert found == f"{NAME}/quarantine.jsonl: 1 samples are also consumed: sample 4 of /data/a.tar in epoch 0"


def test_a_quarantined_sample_listed_twice_is_a_problem(tmp_path):
    again = replace(UNANSWERED, reason="another")
    (found,) = problems(tmp_path, quarantined=(UNREADABLE, UNANSWERED, again), result=None)
    assert found == f"{NAME}/quarantine.jsonl: 1 samples are listed twice: sample 0 of /data/b.tar in epoch 1"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"epoch": 2}, "sample 4 of /data/a.tar in epoch 2"),
        ({"shard": 2}, "sample 4 of shard 2 in epoch 0"),
        ({"index": 5}, "sample 5 of /data/a.tar in epoch 0"),
        ({"index": -1}, "sample -1 of /data/a.tar in epoch 0"),
    ],
)
def test_a_quarantined_sample_outside_of_the_plan_is_a_problem(tmp_path, change, name):
    (found,) = problems(tmp_path, quarantined=(replace(UNREADABLE, **change), UNANSWERED), result=None)
    assert found == f"{NAME}/quarantine.jsonl: 1 samples are not in the plan: {name}"


def test_a_step_logged_twice_is_a_problem(tmp_path):
    assert problems(tmp_path, logged=(1, 2, 3, 2, 3)) == [
        "metrics.jsonl: 1 steps are logged twice or out of order: step 2 after step 3"
    ]


@pytest.mark.parametrize("name", ["steps", "planned", "consumed", "quarantined", "tail"])
def test_a_result_that_says_another_number_than_the_files_is_a_problem(tmp_path, name):
    right = Run().result or {}
    assert problems(tmp_path, result={**right, name: 99}) == [
        f"result.json: {name} is 99, but according to {NAME} it is {right[name]}"
    ]


def test_a_result_without_a_checkpoint_is_a_problem(tmp_path):
    found = problems(tmp_path, step=None)
    assert "result.json: steps is 3, but according to checkpoints (none is committed) it is 0" in found


def test_an_open_sample_that_the_tail_lacks_is_a_problem(tmp_path):
    assert problems(tmp_path, tail=tuple(LEFT[1:])) == [
        "tail.jsonl: 1 samples are missing: sample 3 of /data/a.tar in epoch 1"
    ]


def test_a_tail_with_a_sample_that_is_not_open_or_one_twice_is_a_problem(tmp_path):
    assert problems(tmp_path, tail=(*LEFT, LEFT[0], (0, 0, 0))) == [
        "tail.jsonl: 2 samples should not be there: sample 3 of /data/a.tar in epoch 1; "
        "sample 0 of /data/a.tar in epoch 0"
    ]


def test_a_whole_step_left_over_is_a_problem_unless_max_steps_ended_the_job(tmp_path):
    (found,) = problems(
        tmp_path,
        step=2,
        ledger=ledger_of(CONSUMED[:7]),
        result={"steps": 2, "planned": 16, "consumed": 7, "quarantined": 2, "tail": 7},
        tail=(),
        training={"global_batch_size": 4, "micro_batch_size": 4, "max_steps": 3},
    )
    assert found == (
        "result.json: 7 samples are left over, enough for another step of 4, but training.max_steps did not end the job"
    )


def test_a_quarantine_that_is_not_the_last_checkpoints_is_a_problem(tmp_path):
    assert problems(tmp_path, noted=(UNREADABLE, replace(UNANSWERED, reason="another"))) == [
        "quarantine.jsonl: 1 samples are missing: sample 0 of /data/b.tar in epoch 1 "
        "(the teacher's output is not finite)",
        "quarantine.jsonl: 1 samples should not be there: sample 0 of /data/b.tar in epoch 1 (another)",
    ]


# ------------------------------------------------------------------------------------------- a run's files


@pytest.mark.parametrize("name", ["spec.json", PLAN])
def test_a_folder_without_a_runs_files_is_an_error_that_names_the_file(tmp_path, name):
    run = Run().write(tmp_path)
    (Path(run) / name).unlink()
    with pytest.raises(OutputError, match=rf"run/{name}: no such file"):
        audit(run, LOCAL)


@pytest.mark.parametrize("name", ["spec.json", PLAN, TAIL, "result.json", "quarantine.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("content", ["{", '{"other": 1}', "[1]"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, name, content):
    run = Run().write(tmp_path)
    (Path(run) / name).write_text(content)
    with pytest.raises(OutputError, match=rf"run/{name}: is not what a job of this version writes"):
        audit(run, LOCAL)


@pytest.mark.parametrize("name", [LEDGER, QUARANTINE, "progress.json", "manifest.json"])
def test_a_damaged_checkpoint_is_an_error(tmp_path, name):
    run = Run().write(tmp_path)
    (Path(run) / "checkpoints" / NAME / name).write_text("{")
    with pytest.raises(OutputError, match=r"run/checkpoints.*(is not what a job of this version writes|is damaged)"):
        audit(run, LOCAL)


def test_a_plan_is_written_once(tmp_path):
    write_plan(str(tmp_path), LOCAL, A_PLAN)
    written = (tmp_path / PLAN).stat()
    tree = json.loads((tmp_path / PLAN).read_text())
    assert (tree["epochs"], tree["seed"], tree["shuffle"]) == (2, 0, True)
    assert [(shard["url"], shard["samples"]) for shard in tree["shards"]] == [("/data/a.tar", 5), ("/data/b.tar", 3)]
    write_plan(str(tmp_path), LOCAL, A_PLAN)
    assert (tmp_path / PLAN).stat() == written


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            {"shards": (SHARDS[0], replace(SHARDS[1], samples=4))},
            r"shard 1 was /data/b.tar \(3 samples, .*\) and is /data/b.tar \(4 samples, ",
        ),
        ({"shards": (SHARDS[0], replace(SHARDS[1], checksum="1"))}, r"shard 1 was .* 0000000b\) and is .* crc32 1\)"),
        (
            {"shards": (*SHARDS, Shard("/data/c.tar", 1, 1, "0"))},
            r"shard 2, /data/c.tar, is new \(2 .* before, 3 now\)",
        ),
        ({"shards": SHARDS[:1]}, r"shard 1, /data/b.tar, is gone \(2 shards before, 1 now\)"),
        ({"seed": 1, "epochs": 3}, "epochs was 2 and is 3, seed was 0 and is 1"),
    ],
)
def test_a_plan_that_changed_under_the_run_is_an_error_that_names_the_first_difference(tmp_path, change, difference):
    write_plan(str(tmp_path), LOCAL, A_PLAN)
    before = (tmp_path / PLAN).read_bytes()
    with pytest.raises(OutputError, match=rf"{PLAN}: the data changed during the run: {difference}.*another `name`"):
        write_plan(str(tmp_path), LOCAL, replace(A_PLAN, **change))
    assert (tmp_path / PLAN).read_bytes() == before


def test_the_tail_is_what_is_neither_consumed_nor_quarantined_if_less_than_a_step(tmp_path):
    samples = tail_of(A_PLAN, ledger_of(CONSUMED), [UNREADABLE, UNANSWERED], len(LEFT) + 1)
    assert samples == [{"epoch": e, "shard": SHARDS[s].url, "index": i} for e, s, i in LEFT]
    assert tail_of(A_PLAN, ledger_of(CONSUMED), [UNREADABLE, UNANSWERED], len(LEFT)) == []
    write_tail(str(tmp_path), LOCAL, samples)
    assert [json.loads(line) for line in (tmp_path / TAIL).read_text().splitlines()] == samples


def test_a_plan_of_many_shards_is_audited(tmp_path):
    shards = tuple(Shard(f"/data/{number:06}.tar", 100, 1, "0") for number in range(2000))
    plan = Plan(shards, epochs=2, seed=0, shuffle=True)
    rng = np.random.default_rng(0)
    done = [(0, int(shard), index) for shard in rng.permutation(2000)[:100] for index in range(100)]
    run = Run(plan=plan, ledger=ledger_of(done, plan), step=2500, quarantined=(), dropped=0, result=None)
    found = audit(run.write(tmp_path), LOCAL)
    assert found.problems == []
    assert found.totals == {"planned": 400_000, "consumed": 10_000, "quarantined": 0, "open": 390_000}


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_exits_with_0_when_the_accounts_add_up(tmp_path):
    done = CliRunner().invoke(app, ["audit", Run().write(tmp_path)])
    assert done.exit_code == 0
    assert done.stderr == ""
    assert "finished at step 3" in done.stdout
    assert "a.tar" not in done.stdout


def test_the_command_lists_shards_when_asked(tmp_path):
    done = CliRunner().invoke(app, ["audit", Run().write(tmp_path), "--by-shard"])
    assert done.exit_code == 0
    assert done.stdout.count("a.tar") == 2


def test_the_command_exits_with_1_and_a_line_a_problem_when_they_do_not(tmp_path):
    done = CliRunner().invoke(app, ["audit", Run(logged=(1, 1), tail=()).write(tmp_path)])
    assert done.exit_code == 1
    assert [line[:22] for line in done.stderr.splitlines()] == ["betakd: metrics.jsonl:", "betakd: tail.jsonl: 3 "]


@pytest.mark.parametrize("run", ["nothing", "unknown://protocol"])
def test_the_command_exits_with_2_when_there_is_no_run(tmp_path, run):
    done = CliRunner().invoke(app, ["audit", run if "://" in run else str(tmp_path / run)])
    assert done.exit_code == 2
    assert done.stderr.startswith("betakd: ")
    assert run in done.stderr


# ------------------------------------------------------------------------------------------------- weights

WEIGHTED = Plan((SHARDS[0], SHARDS[0], SHARDS[1]), epochs=2, seed=0, shuffle=True, parts=((1, 2),))
"""Shard a once and two samples of it, shard b once: ten samples an epoch."""


def test_passes_over_one_shard_are_kept_apart(tmp_path):
    """Sample 4 of shard a is bad in its whole pass and in the part; two are left over, one of them of the part."""
    index = int(np.flatnonzero(WEIGHTED.members(0, 1) == WEIGHTED.members(0, 1)[0])[0])
    bad = (
        Quarantined(0, 0, int(WEIGHTED.members(0, 1)[0]), "k", "its image cannot be decoded"),
        Quarantined(0, 1, index, "k", "its image cannot be decoded"),
    )
    left = [(1, 1, 0), (1, 2, 2)]
    gone = {(each.epoch, each.shard, each.index) for each in bad} | set(left)
    everything = [(e, s, i) for e in range(2) for s in range(3) for i in range(int(WEIGHTED.sizes[s]))]
    run = Run(
        plan=WEIGHTED,
        step=4,
        ledger=ledger_of([place for place in everything if place not in gone], WEIGHTED),
        quarantined=bad,
        dropped=0,
        noted=bad,
        logged=(1, 2, 3, 4),
        result={"steps": 4, "planned": 20, "consumed": 16, "quarantined": 2, "tail": 2},
        tail=(),
    ).write(tmp_path)
    tail = tail_of(WEIGHTED, ledger_of([p for p in everything if p not in gone], WEIGHTED), bad, 4)
    assert tail == [
        {"epoch": 1, "shard": "/data/a.tar", "index": int(WEIGHTED.members(1, 1)[0]), "pass": 2},
        {"epoch": 1, "shard": "/data/b.tar", "index": 2},
    ]
    write_tail(run, LOCAL, tail)
    found = audit(run, LOCAL)
    assert found.problems == []
    assert found.samples["planned"].tolist() == [[5, 2, 3]] * 2
    assert found.shards == ("/data/a.tar", "/data/a.tar (pass 2)", "/data/b.tar")


def test_a_plan_comes_back_from_its_file_and_an_old_file_has_no_parts(tmp_path):
    write_plan(str(tmp_path), LOCAL, WEIGHTED)
    write_plan(str(tmp_path), LOCAL, WEIGHTED)
    tree = json.loads((tmp_path / PLAN).read_text())
    assert tree["parts"] == [[1, 2]]
    (tmp_path / PLAN).write_text(json.dumps({"shards": [asdict(shard) for shard in SHARDS], **OLD}))
    write_plan(str(tmp_path), LOCAL, A_PLAN)


OLD = {"epochs": 2, "seed": 0, "shuffle": True}


def test_a_weight_that_changed_under_a_run_is_said(tmp_path):
    write_plan(str(tmp_path), LOCAL, WEIGHTED)
    message = r"an epoch took 2 samples of shard 1, /data/a\.tar, and now takes 3: its weight in data\.train changed"
    with pytest.raises(OutputError, match=message):
        write_plan(str(tmp_path), LOCAL, replace(WEIGHTED, parts=((1, 3),)))


def test_the_command_prints_why_samples_are_in_quarantine(tmp_path):
    done = CliRunner().invoke(app, ["audit", Run().write(tmp_path), "--quarantined"])
    assert done.exit_code == 0
    for bad, shard in ((UNREADABLE, "/data/a.tar"), (UNANSWERED, "/data/b.tar")):
        (line,) = [line for line in done.stdout.splitlines() if bad.reason in line]
        assert bad.key in line
        assert shard in line
