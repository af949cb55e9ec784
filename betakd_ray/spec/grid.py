"""The grid of a sweep: one job for each combination of values and each seed."""

import hashlib
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from betakd_ray.errors import SpecError, shortened
from betakd_ray.spec.job import JobSpec
from betakd_ray.spec.loading import parse_spec, read_spec, set_field
from betakd_ray.spec.tasks import SweepSpec

LONGEST_NAME = 200
"""Largest number of characters in a job's name. The name of a folder may have at most 255 bytes."""


@dataclass(frozen=True)
class Cell:
    """One job of the grid."""

    values: dict[str, str]
    """Axis → the value's short name."""
    seed: int
    job: JobSpec

    @property
    def key(self) -> tuple[Any, ...]:
        """Return the values that identify the cell in its row."""
        return (*self.values.values(), self.seed)


def cells_of(spec: SweepSpec, folder: str) -> list[Cell]:
    """Return the jobs of a grid, whose runs go to `folder`. Raises SpecError, which names the cell."""
    cells = list(_cells(spec, folder))
    names = [cell.job.name for cell in cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SpecError(f"axes: two cells have the name {sorted(twice)[0]}; give values with different names")
    return cells


def _cells(spec: SweepSpec, folder: str) -> Iterator[Cell]:
    template, origin = read_spec(spec.template)
    for values in product(*spec.axes.values()):
        names = {axis: short_name(value) for axis, value in zip(spec.axes, values, strict=True)}
        for seed in spec.seeds:
            tree = deepcopy(template)
            given = {**spec.fixed, **dict(zip(spec.axes, values, strict=True)), "training.seed": seed}
            for path, value in given.items():
                set_field(tree, path, value)
            tree["name"] = _job_name("_".join([*names.values(), f"seed{seed}"]))
            tree["output"] = {"path": folder, "storage": spec.output.storage.model_dump()}
            cell = f"{spec.name}, cell {tree['name']}"
            options = {tuple(path.split(".")): f"{cell}: {path} = {shortened(value)}" for path, value in given.items()}
            where = replace(origin, name=f"{cell}: {origin.name}", options=options)
            yield Cell(names, seed, parse_spec(tree, source=where))


def short_name(value: Any) -> str:
    """Return the name of a value in a table and in a job's name: its kind, if it has one; of a path, its last part."""
    if isinstance(value, dict):
        rest = [f"{key}={short_name(inner)}" for key, inner in value.items() if key != "kind"]
        return ",".join([*([str(value["kind"])] if "kind" in value else []), *rest])
    if isinstance(value, list | tuple):
        return "+".join(short_name(inner) for inner in value) or "none"
    text = str(value) or "none"
    return text if " " in text else text.rstrip("/").rpartition("/")[2]


def _job_name(text: str) -> str:
    """Return `text` as a valid folder name. If it is too long, it is cut and ends with a hash of the whole text."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", text)
    if not name[0].isalnum():
        name = f"x{name}"
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return name
