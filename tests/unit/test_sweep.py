"""Grids: their cells, and the table over seeds. tests/ray runs a whole sweep."""

import errno
import math
import os
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError

import betakd_ray.evaluation.run as evaluation
import betakd_ray.sweep as module
from betakd_ray.cli import print_table
from betakd_ray.data.shards import Shard
from betakd_ray.errors import DataError, Interrupted, OutputError, SpecError, TrainingError
from betakd_ray.evaluation.result import RESULT, Result, Subject
from betakd_ray.job import JobResult
from betakd_ray.run.metrics import from_jsonl
from betakd_ray.sigterm import SIGNALS
from betakd_ray.spec import SweepSpec, load_spec
from betakd_ray.spec.grid import short_name
from betakd_ray.sweep import ROWS, Sweep

JOBS = Path(__file__).parents[2] / "jobs"
TEMPLATE = {
    "name": "template",
    "data": {"train": "/data/a.tar"},
    "teacher": {"path": "org/teacher"},
    "student": {"init": {"path": "org/student", "kind": "checkpoint"}},
    "objective": {"energies": "fkl"},
}
AXES = {
    "objective.energies": ["fkl", ["rkl", "fd"]],
    "objective.weighting": ["equal", {"kind": "task", "d": 2.0}],
}


@pytest.fixture
def grid(tmp_path):
    (tmp_path / "template.yaml").write_text(yaml.safe_dump(TEMPLATE))

    def make(**changes):
        tree = {"name": "grid", "template": str(tmp_path / "template.yaml"), "axes": AXES, "output": str(tmp_path)}
        return Sweep(SweepSpec(**{**tree, **changes}))

    return make


@pytest.mark.parametrize(
    ("name", "cells"), [("table1", 13), ("table2", 48), ("table3", 48), ("seeds", 72), ("share", 24), ("weighting", 15)]
)
def test_every_cell_of_a_shipped_grid_is_a_job(name, cells, monkeypatch):
    monkeypatch.chdir(JOBS.parent)
    sweep = Sweep(load_spec(JOBS / f"easy_vqa/grids/{name}.yaml", kind=SweepSpec))
    assert len(sweep.cells) == cells
    assert all(cell.job.teacher and cell.job.teacher.cache for cell in sweep.cells)


def test_cells_are_the_product_of_the_axes_and_the_seeds(grid, tmp_path):
    cells = grid(seeds=[0, 3], fixed={"training.max_steps": 7}).cells
    assert len(cells) == 2 * 2 * 2
    assert [cell.seed for cell in cells[:2]] == [0, 3]
    assert {cell.job.training.seed for cell in cells} == {0, 3}
    assert {cell.job.training.max_steps for cell in cells} == {7}
    assert cells[0].job.objective.channels == ("fkl",)
    assert cells[-1].job.objective.channels == ("rkl", "fd")
    assert cells[-1].job.name == "rkl-fd_task-d-2.0_seed3"
    assert cells[-1].job.output.path == str(tmp_path / "grid")


def test_a_wrong_cell_is_an_error_before_any_is_run(grid):
    with pytest.raises(SpecError, match=r"cell fkl_qual_seed0.*weighting"):
        grid(axes={**AXES, "objective.weighting": ["equal", "qual"]})
    with pytest.raises(SpecError, match="two cells have the name fkl_seed0"):
        grid(axes={"objective.energies": ["fkl", ["fkl"]]})


@pytest.mark.parametrize("field", ["training.seed", "name", "output", "output.path"])
@pytest.mark.parametrize("place", ["fixed", "axes"])
def test_what_the_sweep_sets_itself_is_no_axis(grid, place, field):
    value = 1 if place == "fixed" else [1, 2]
    with pytest.raises(ValidationError, match=f"{field}: "):
        grid(**{place: {field: value}})


@pytest.mark.parametrize(
    ("axes", "fixed"),
    [
        ({"objective": [{"energies": ["fkl"]}], "objective.weighting": ["task"]}, {}),
        ({"objective.weighting": ["task"]}, {"objective.weighting": "equal"}),
        ({"objective.weighting.kind": ["task"]}, {"objective": {"energies": ["fkl"]}}),
        ({"training": [{"seed": 3}]}, {}),
    ],
)
def test_no_field_is_set_twice(grid, axes, fixed):
    with pytest.raises(ValidationError, match=r"name each field once|sets training\.seed"):
        grid(axes=axes, fixed=fixed)


def test_the_table_has_mean_and_standard_deviation_over_seeds(grid):
    sweep = grid(axes={"objective.energies": ["fkl", "rkl"]}, seeds=[0, 1])
    rows = [
        {"objective.energies": name, "seed": seed, "accuracy": accuracy}
        for name, seed, accuracy in [("fkl", 0, 0.5), ("fkl", 1, 0.7), ("rkl", 0, 0.25)]
    ]
    assert sweep.table(rows) == [
        ["objective.energies", "seeds", "accuracy"],
        ["fkl", "2 of 2", "0.6 ± 0.14"],
        ["rkl", "1 of 2", "0.25"],
    ]
    rows[0]["accuracy"] = math.nan
    assert sweep.table(rows)[1] == ["fkl", "2 of 2", "nan"]
    assert sweep.table([]) == [["objective.energies", "seeds"]]


def test_a_wide_table_is_whole_in_a_log(capsys):
    line = [f"instance,features=teacher_vision,d={number}" for number in range(8)]
    print_table([[f"objective.weighting.{number}" for number in range(8)], line])
    printed = capsys.readouterr().out.splitlines()
    assert sum(all(cell in row for cell in line) for row in printed) == 1


def test_values_have_short_names():
    assert short_name({"kind": "instance", "features": ["teacher_answer"]}) == "instance,features=teacher_answer"
    assert short_name(["fkl", {"kind": "fd"}]) == "fkl+fd"
    assert short_name([]) == "none"
    assert short_name(0.5) == "0.5"
    assert short_name("s3://bucket/noisy/") == "noisy"
    assert short_name(["shards/clean-*.tar"]) == "clean-*.tar"
    assert short_name("") == "none"
    assert short_name("Answer yes/no.") == "Answer yes/no."


@pytest.mark.parametrize("prompts", [["", "Answer yes/no."], ["-", "."], ["a" * 300, "a" * 300 + "b"]])
def test_a_cell_has_a_name_that_a_folder_can_have(grid, prompts):
    names = [cell.job.name for cell in grid(axes={"data.system_prompt": prompts}).cells]
    assert len(set(names)) == 2
    assert all(len(name) <= 200 for name in names)


# ---- what becomes of the cells, with jobs that are none ------------------------------------------------------------


class Job:
    """Fake BetaKDJob."""

    def __init__(self, name, end, begun):
        self.name, self.end, self.begun = name, end, begun
        self.stopped = threading.Event()
        self.stop = self.stopped.set

    def fit(self, _teachers):
        self.begun.append(self.name)
        self.end(self.stopped)
        return JobResult(self.name, "run", "model", {"loss": 1.0}, 1, 1, 1, 0, 0, 0)


def stopped(event):
    assert event.wait(20)
    raise Interrupted("saved")


def failing(error):
    def end(_):
        raise error

    return end


@pytest.fixture
def sweep(grid, monkeypatch):
    """Return a function that makes a sweep of five cells, two at a time, and the list of started cells.

    Its keywords map the name of a cell to the cell's action.
    """

    def make(evaluation=None, **ends):
        begun = []
        monkeypatch.setattr(
            module, "BetaKDJob", lambda spec: Job(spec.name, ends.get(spec.name, lambda _: None), begun)
        )
        monkeypatch.setattr(module, "connected", lambda *_: nullcontext())
        axes = {"objective.energies": ["fkl", "rkl", "js", "tvd", "sfkl"]}
        return grid(axes=axes, parallel=2, evaluation=evaluation), begun

    return make


def test_rows_are_in_the_order_of_the_grid_whichever_cell_ends_first(sweep, tmp_path):
    others = threading.Event()
    made, begun = sweep(fkl_seed0=lambda _: others.wait(20), sfkl_seed0=lambda _: others.set())
    rows = made.run()
    assert [row["objective.energies"] for row in rows] == ["fkl", "rkl", "js", "tvd", "sfkl"]
    assert from_jsonl((tmp_path / "grid" / ROWS).read_text()) == rows
    assert len(begun) == 5


def test_rows_of_a_run_that_was_stopped_stand_until_their_cells_have_been_looked_at(sweep, tmp_path):
    file = tmp_path / "grid" / ROWS
    first = sweep()[0].run()
    before = file.stat().st_mtime_ns

    def fail_when_another_is_stored(_):
        while file.stat().st_mtime_ns == before:
            time.sleep(0.01)
        raise DataError("no shard")

    with pytest.raises(DataError):
        sweep(rkl_seed0=fail_when_another_is_stored)[0].run()
    assert from_jsonl(file.read_text()) == first
    smaller, _ = sweep()
    smaller.cells = smaller.cells[:2]
    assert smaller.run() == first[:2]
    assert from_jsonl(file.read_text()) == first[:2]


def test_a_cell_that_fails_is_named_when_the_others_are_done(sweep, tmp_path):
    made, begun = sweep(rkl_seed0=failing(TrainingError("died")))
    with pytest.raises(TrainingError, match=r"^cell rkl_seed0: died\. The other 4 cells are in .*table\.md\.$"):
        made.run()
    assert len(begun) == 5
    assert len(from_jsonl((tmp_path / "grid" / ROWS).read_text())) == 4


def test_a_cell_that_fails_has_no_row_of_an_earlier_run(sweep, tmp_path):
    first = sweep()[0].run()
    made, _ = sweep(**{f"{name}_seed0": failing(TrainingError("died")) for name in ("fkl", "sfkl")})
    with pytest.raises(TrainingError, match="The other 3 cells are in"):
        made.run()
    assert from_jsonl((tmp_path / "grid" / ROWS).read_text()) == first[1:4]


def test_a_cell_is_asked_again_where_the_questions_are_others(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    asked = asking(monkeypatch)
    for checksum, count in (("a", 1), ("a", 1), ("b", 2)):
        shards = [Shard("test.tar", 1, 1, checksum)]
        monkeypatch.setattr(module, "find_shards", lambda *_, shards=shards: shards)
        monkeypatch.setattr(evaluation, "find_shards", lambda *_, shards=shards: shards)
        made, _ = sweep(evaluation={"data": {"train": "test.tar"}})
        made.cells = made.cells[:1]
        assert made.run()[0]["accuracy"] == 0.5
        assert len(asked) == count


def asking(monkeypatch):
    """Let every model score 0.5. Return the list of the evaluations that were run."""
    asked = []

    class Asked(evaluation.Evaluation):
        def run(self):
            asked.append(self.folder)
            subject = Subject.of(self.spec, evaluation.find_shards())
            result = Result({"student": {"accuracy": 0.5}}, subject)
            self._store({RESULT: result.to_json()})
            return result.scores

    monkeypatch.setattr(module, "Evaluation", Asked)
    return asked


def other_weights(path):
    (path.parents[2] / "model" / "model.safetensors").write_bytes(b"other")


SPOILT = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "garbage": lambda path: path.write_bytes(b"\xff\xfe{"),
    "of an older version": lambda path: path.write_text('{"student": {"accuracy": 0.9}}'),
    "without the label": lambda path: path.write_text(path.read_text().replace('"student": {', '"other": {')),
    "of other weights": other_weights,
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_result_that_is_not_whole_or_of_another_model_is_made_again_with_a_warning(
    sweep, tmp_path, monkeypatch, caplog, case
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"first")
    asked = asking(monkeypatch)
    for where in (module, evaluation):
        monkeypatch.setattr(where, "find_shards", lambda *_: [Shard("test.tar", 1, 1, "a")])
    for _ in range(2):
        made, _ = sweep(evaluation={"data": {"train": "test.tar"}})
        made.cells = made.cells[:1]
        made.run()
    assert len(asked) == 1
    (path,) = tmp_path.rglob(RESULT)
    SPOILT[case](path)
    for _ in range(2):
        assert made.run()[0]["accuracy"] == 0.5
    assert len(asked) == 2
    (record,) = caplog.records
    assert RESULT in record.getMessage()


@pytest.mark.parametrize("case", ["cut", "empty", "garbage", "a line of no row", "a list as value"])
def test_rows_that_are_not_whole_are_made_again_with_a_warning(sweep, tmp_path, caplog, case):
    file = tmp_path / "grid" / ROWS
    first = sweep()[0].run()
    lines = {"a line of no row": "[1]\n", "a list as value": '{"objective.energies": ["fkl"], "seed": 0}\n'}
    if case in lines:
        file.write_text(lines[case] + file.read_text())
    else:
        SPOILT[case](file)
    assert sweep()[0].run() == first
    assert from_jsonl(file.read_text()) == first
    assert len(caplog.records) == (case != "empty")
    assert all(str(file) in record.getMessage() for record in caplog.records)


def test_rows_before_a_cut_stand_until_their_cells_have_run(sweep, tmp_path):
    file = tmp_path / "grid" / ROWS
    first = sweep()[0].run()
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]) + '{"objective.ener')
    made, _ = sweep(**{f"{name}_seed0": failing(DataError("no shard")) for name in ("fkl", "rkl")})
    assert [made._stored()[at] for at in range(3)] == first[:3]


def test_a_full_disk_ends_the_sweep_and_is_named(sweep, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made, _ = sweep()
    monkeypatch.setattr(LocalFileSystem, "pipe_file", full)
    with pytest.raises(OutputError, match=rf"disk is full: free some space in {tmp_path}/grid"):
        made.run()


def test_what_the_user_must_mend_ends_the_sweep_and_the_cell_beside_it_saves(sweep):
    made, begun = sweep(fkl_seed0=stopped, rkl_seed0=failing(DataError("no shard")))
    with pytest.raises(DataError, match="no shard"):
        made.run()
    assert sorted(begun) == ["fkl_seed0", "rkl_seed0"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_has_the_cells_that_run_save_and_begins_no_others(sweep, number):
    def end(event):
        os.kill(os.getpid(), number)
        stopped(event)

    made, begun = sweep(fkl_seed0=stopped, rkl_seed0=end)
    with pytest.raises(Interrupted):
        made.run()
    assert sorted(begun) == ["fkl_seed0", "rkl_seed0"]
