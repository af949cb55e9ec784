"""Commands that help to write a spec: init, schema."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import typer

from betakd_ray.cli.app import app, exit_codes
from betakd_ray.errors import OutputError
from betakd_ray.spec.loading import KINDS

STARTERS = ("easy-vqa", "llava", "qwen2.5-vl", "smollm", "text")
"""Names of the specs to start from."""
SCHEMA = "{}.schema.json"
"""Name of the file with the schema of a kind of spec, which the first line of a starter names."""
Starter = Literal["easy-vqa", "llava", "qwen2.5-vl", "smollm", "text"]
Kind = Literal["job", "pack", "evaluation", "benchmarks", "sweep"]


@app.command()
def init(
    starter: Annotated[Starter, typer.Argument(help="what the job is about")] = "llava",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="new file for the spec; its schema for editors goes beside it")
    ] = None,
) -> None:
    """Print a commented spec to start from; with --out, write it and its schema, with which editors complete fields."""
    text = starter_text(starter)
    if out is None:
        print(text, end="")
        return
    with exit_codes():
        _write(out, text)
        schema_file = out.with_name(SCHEMA.format("job"))
        if not schema_file.exists():
            _write(schema_file, schema_text("job"))
    print(f"{out}: change its paths, then: betakd plan {out}; betakd distill {out}")


@app.command()
def schema(kind: Annotated[Kind, typer.Argument(help="kind of spec")] = "job") -> None:
    """Print the JSON schema of a kind of spec, for editors."""
    print(schema_text(kind), end="")


def starter_text(name: str) -> str:
    """Return a spec to start from, as YAML with comments."""
    return files("betakd_ray.spec").joinpath("starters", f"{name}.yaml").read_text(encoding="utf-8")


def schema_text(kind: str) -> str:
    """Return the JSON schema of a kind of spec."""
    return json.dumps(KINDS[kind].model_json_schema(), indent=2) + "\n"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputError(f"{path}: is there already, and is not overwritten. Name another file.") from None
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}). Name another file.") from error
