"""Grids: their cells, and the table over seeds. Running one is for tests/ray."""

from pathlib import Path

import pytest
import yaml

from betakd_ray.errors import SpecError
from betakd_ray.spec import SweepSpec, load_spec
from betakd_ray.sweep import Sweep, short_name

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
    ("name", "cells"), [("table1", 13), ("table2", 48), ("table3", 48), ("seeds", 72), ("weighting", 8)]
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
    with pytest.raises(SpecError, match="both called fkl_seed0"):
        grid(axes={"objective.energies": ["fkl", ["fkl"]]})


def test_the_table_has_mean_and_standard_deviation_over_seeds(grid):
    sweep = grid(axes={"objective.energies": ["fkl", "rkl"]}, seeds=[0, 1])
    rows = [
        {"objective.energies": name, "seed": seed, "accuracy": accuracy}
        for name, seed, accuracy in [("fkl", 0, 0.5), ("fkl", 1, 0.7), ("rkl", 0, 0.25)]
    ]
    assert sweep.table(rows) == [["objective.energies", "accuracy"], ["fkl", "0.6 ± 0.14"], ["rkl", "0.25"]]


def test_values_have_short_names():
    assert short_name({"kind": "instance", "features": ["teacher_answer"]}) == "instance,features=teacher_answer"
    assert short_name(["fkl", {"kind": "fd"}]) == "fkl+fd"
    assert short_name([]) == "none"
    assert short_name(0.5) == "0.5"
