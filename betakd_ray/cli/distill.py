"""The command that runs a job: from a spec, or from flags for a first run."""

import re
import sys
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from betakd_ray.cli.app import Overrides, app, exit_codes
from betakd_ray.errors import SpecError
from betakd_ray.spec import JobSpec, load_spec, parse_spec, set_field
from betakd_ray.spec.loading import apply_overrides
from betakd_ray.spec.origin import FieldPath, Origin

Flag = str | None


@app.command()
def distill(
    spec: Annotated[
        str | None,
        typer.Argument(help="YAML spec: path, URL, or - for standard input; without it, give flags", metavar="SPEC"),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    teacher: Annotated[Flag, typer.Option(help="large model: a folder, a hub id or a URL", metavar="MODEL")] = None,
    student: Annotated[Flag, typer.Option(help="small model to be trained", metavar="MODEL")] = None,
    data: Annotated[list[str], typer.Option(help="shards, with * and {0..9}; may be repeated")] = [],  # noqa: B006
    name: Annotated[Flag, typer.Option(help="name of the job; default: made of the models' names")] = None,
    template: Annotated[str, typer.Option(help="chat template: chat, vicuna_v1, plain")] = "chat",
    epochs: Annotated[int, typer.Option(help="passes over the data")] = 1,
    max_steps: Annotated[int | None, typer.Option(help="stop after so many steps")] = None,
    batch_size: Annotated[int, typer.Option(help="samples in a step, of all workers together")] = 16,
    output: Annotated[str, typer.Option(help="folder or URL; the run goes to OUTPUT/NAME")] = "runs",
    only_print: Annotated[bool, typer.Option("--print", help="print the spec of the flags, and run nothing")] = False,
) -> None:
    """Run a distillation job (or fine-tuning, without a teacher) to the end; resumes by name.

    For a first run without a spec, give --student, --data and --teacher. The spec that they make is printed.
    """
    with exit_codes():
        if spec is not None:
            _refuse_flags(teacher, student, data)
            _run(load_spec(spec, overrides))
            return
        given = {"name": name, "data.train": data, "data.template": template, "teacher.path": teacher,
                 "student.init.path": student, "training.epochs": epochs, "training.max_steps": max_steps,
                 "training.global_batch_size": batch_size, "output": output}  # fmt: skip
        tree = tree_of_flags(given)
        origin = apply_overrides(tree, overrides, _origin(given))
        parsed = parse_spec(tree, JobSpec, origin)
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        print(text, end="", file=sys.stdout if only_print else sys.stderr)
        if not only_print:
            _run(parsed)


FLAGS = {
    "name": "--name",
    "data.train": "--data",
    "data.template": "--template",
    "teacher.path": "--teacher",
    "student.init.path": "--student",
    "training.epochs": "--epochs",
    "training.max_steps": "--max-steps",
    "training.global_batch_size": "--batch-size",
    "output": "--output",
}
"""Field of a spec → the flag that sets it."""


def tree_of_flags(given: dict[str, Any]) -> dict[str, Any]:
    """Return the spec of a first run, from field → value; None and [] are not given. Raises SpecError."""
    missing = [FLAGS[field] for field in ("student.init.path", "data.train") if not given[field]]
    if missing:
        raise SpecError(
            f"give a SPEC, or the flags of a first run: {' and '.join(missing)} is missing. `betakd init` prints a "
            "spec to start from."
        )
    teacher, student = given["teacher.path"], given["student.init.path"]
    tree: dict[str, Any] = {"name": given["name"] or _name(student, teacher)}
    for field, value in given.items():
        if value is not None and field != "name":
            set_field(tree, field, value)
    tree["student"]["init"] = {"kind": "checkpoint", **tree["student"]["init"]}
    # One β for the energy: it needs no image, so it fits every model.
    energies = {"energies": ["fkl"], "weighting": "task"} if teacher else {"energies": [], "weighting": "equal"}
    training = tree.pop("training")
    return tree | {"objective": energies, "training": training}


def _name(student: str, teacher: str | None) -> str:
    parts = [path.rstrip("/").rpartition("/")[2] for path in (student, teacher) if path]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-from-".join(parts)).lstrip("._-") or "first-run"


def _origin(given: dict[str, Any]) -> Origin:
    typed: dict[FieldPath, str] = {tuple(field.split(".")): f"{FLAGS[field]} {value}" for field, value in given.items()}
    return Origin("the flags", options=typed)


def _refuse_flags(teacher: Flag, student: Flag, data: list[str]) -> None:
    flags = {"--teacher": teacher, "--student": student, "--data": data}
    if both := [flag for flag, value in flags.items() if value]:
        raise SpecError(
            f"{both[0]} is for a first run without a spec, but a SPEC is given: change its fields with --set, e.g. "
            "--set teacher.path=…"
        )


def run_job(spec: str, overrides: list[str]) -> None:
    """Run the job of a spec and print its result."""
    _run(load_spec(spec, overrides))


def _run(spec: JobSpec) -> None:
    from betakd_ray.job import BetaKDJob

    result = BetaKDJob(spec).fit()
    Console().print_json(data={"model": result.model, "steps": result.steps, "consumed": result.consumed,
                               "quarantined": result.quarantined, "tail": result.tail,
                               "loss": result.metrics.get("loss")})  # fmt: skip
