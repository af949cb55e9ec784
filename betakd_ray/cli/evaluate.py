"""The command that asks models: evaluate."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from betakd_ray.cli.app import Anonymous, Endpoint, Overrides, Region, app, exit_codes, storage_of
from betakd_ray.cli.console import print_result, print_scored, write_json
from betakd_ray.errors import SpecError
from betakd_ray.run.folder import MODEL
from betakd_ray.sigterm import on_sigterm
from betakd_ray.spec import BenchmarksSpec, EvaluationSpec, JobSpec, ModelSpec, StorageSpec, parse_spec, set_field
from betakd_ray.spec.loading import apply_overrides, kind_of, read_spec
from betakd_ray.spec.origin import FieldPath, Origin
from betakd_ray.spec.tasks import label_of
from betakd_ray.storage import join

Targets = Annotated[
    list[str],
    typer.Argument(
        metavar="SPEC|MODEL...",
        help="models, each a folder, hub id or URL, also as LABEL=MODEL; or the YAML of an evaluation or of a job",
    ),
]


@dataclass(frozen=True)
class Shown:
    """Where the scores go besides the evaluation's own folder."""

    output: str | None = None
    """File for the scores as JSON."""
    markdown: bool = False
    storage: StorageSpec = StorageSpec()


@app.command()
def evaluate(
    targets: Targets,
    benchmarks: Annotated[
        str | None, typer.Option(help="scienceqa,textvqa,gqa,pope,mme,mmbench, … or module:name, between commas")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="folder with the benchmarks' files, or packed shards; also s3://…")
    ] = None,
    out: Annotated[str | None, typer.Option(help="folder for answers and scores [default: runs/evaluation]")] = None,
    limit: Annotated[int | None, typer.Option(help="ask only this number of first questions of each")] = None,
    rule: Annotated[str | None, typer.Option(help="how an option's letter is found: MMBench has several")] = None,
    ocr: Annotated[bool | None, typer.Option("--ocr/--no-ocr", help="TextVQA with or without OCR tokens")] = None,
    template: Annotated[str | None, typer.Option(help="vicuna_v1, chat, plain or module:name")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="instead of each benchmark's own limit")] = None,
    batch_size: Annotated[int | None, typer.Option(help="questions at a time")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs for each copy of a model")] = None,
    output: Annotated[str | None, typer.Option(help="file for the scores as JSON, as `betakd score` has it")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print the tables as Markdown")] = False,
    endpoint_url: Endpoint = None,
    region: Region = None,
    anonymous: Anonymous = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Ask models the questions of benchmarks or packed shards, and score the answers; goes on after a kill."""
    given = {"benchmarks": benchmarks.split(",") if benchmarks else None, "data": data, "out": out, "limit": limit,
             "rule": rule, "ocr": ocr, "template": template, "max_new_tokens": max_new_tokens,
             "batch_size": batch_size, "gpus": gpus, "endpoint_url": endpoint_url, "region": region,
             "anonymous": anonymous or None}  # fmt: skip
    with exit_codes():
        tree, origin = tree_of(targets, {name: value for name, value in given.items() if value is not None})
        _run(tree, origin, overrides, Shown(output, markdown, storage_of(endpoint_url, region)))


def run_evaluation(spec: str, overrides: list[str]) -> None:
    """Evaluate as a YAML says, and print the table."""
    _run(*read_spec(spec), overrides)


def _run(tree: dict[str, Any], origin: Origin, overrides: list[str], shown: Shown = Shown()) -> None:
    origin = apply_overrides(tree, overrides, origin)
    if kind_of(tree) == "benchmarks":
        _run_benchmarks(parse_spec(tree, BenchmarksSpec, origin), shown)
    else:
        _run_packed(parse_spec(tree, EvaluationSpec, origin), shown)


def _run_benchmarks(spec: BenchmarksSpec, shown: Shown) -> None:
    from betakd_ray.evaluation.suite import Suite

    suite = Suite(spec)
    with on_sigterm(suite.stop):
        scored = suite.run()
    print_scored(scored, shown.output, shown.storage, markdown=shown.markdown)
    print(f"Answers and scores: {suite.folder}", file=sys.stderr)


def _run_packed(spec: EvaluationSpec, shown: Shown) -> None:
    from betakd_ray.evaluation.run import Evaluation
    from betakd_ray.on_ray.cluster import connected

    evaluation = Evaluation(spec)  # names what is wrong before a cluster starts
    with on_sigterm(evaluation.stop), connected(spec):
        result = evaluation.result()
    if shown.output:
        write_json(shown.output, shown.storage, result.to_json())
    print_result(result, markdown=shown.markdown)
    print(f"Answers and scores: {evaluation.folder}", file=sys.stderr)


def tree_of(targets: list[str], given: dict[str, Any]) -> tuple[dict[str, Any], Origin]:
    """Return the mapping of an evaluation, and where its values come from. Raises SpecError.

    `given` has the values of options by their names, with `_` for `-`. They go before what a YAML says.
    """
    if not any(_is_yaml(target) for target in targets):
        models = {label: {"path": path} for label, path in map(_labelled, targets)}
        if len(models) < len(targets):
            raise SpecError(f"two models have one label among {', '.join(models)}; give each its own as LABEL=MODEL")
        tree, origin = {"models": models}, Origin("the options")
    elif len(targets) > 1:
        raise SpecError(f"give one YAML, or models, but not both: {' '.join(targets)}")
    else:
        tree, origin = read_spec(targets[0])
        if kind_of(tree) == "job":
            job = parse_spec(tree, JobSpec, origin)
            model = {"path": join(job.output.path, job.name, MODEL), "storage": job.output.storage.model_dump()}
            tree, origin = {"models": {job.name: model}}, Origin(targets[0])
    if "data" not in tree and "data" not in given:
        raise SpecError(
            "to evaluate a model, name what it is asked: --benchmarks gqa,pope and --data with the folder of their "
            "files; --data with packed shards; or give the YAML of an evaluation"
        )
    is_packed = "benchmarks" not in tree and "benchmarks" not in given
    if is_packed and "data" in given and "train" not in tree.get("data", {}):
        tree |= {"name": label_of(targets[0])} | {"data": _trained_with(tree["models"])}
    options: dict[FieldPath, str] = {
        path: _typed(name, value) for name, value in given.items() for path in _set(tree, name, value, is_packed)
    }
    return tree, Origin(origin.name, origin.node, options)


def _set(tree: dict[str, Any], name: str, value: Any, is_packed: bool) -> Iterator[FieldPath]:
    """Set what an option says; yield the paths of its fields."""
    if name == "out":
        parent, _, folder = value.rstrip("/").rpartition("/")
        values = {"name": folder, "output.path": parent or ("/" if value.startswith("/") else ".")}
    elif name in ("endpoint_url", "region", "anonymous"):
        values = {f"data.storage.{name}": value}
        # Not by their paths in the tree, because a label may have a dot.
        for model in tree.get("models", {}).values():
            if isinstance(model, dict) and "://" in str(model.get("path")):
                model.setdefault("storage", {})[name] = value
        # Nothing can be written without credentials.
        if name != "anonymous" and "://" in tree.get("output", {}).get("path", ""):
            values[f"output.storage.{name}"] = value
    else:
        of_packed = {"data": "data.train", "template": "data.template"} if is_packed else {"data": "data.path"}
        values = {({"gpus": "cluster.student.gpus"} | of_packed).get(name, name): value}
    for field, each in values.items():
        if field.startswith("data.") and not isinstance(tree.get("data", {}), dict):
            tree["data"] = {"path": tree["data"]}
        set_field(tree, field, each)
        yield tuple(field.split("."))


def _typed(name: str, value: Any) -> str:
    """Return an option as it was typed."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return option if value else f"--no-{name}"
    return f"{option} {','.join(value) if isinstance(value, list) else value}"


def _trained_with(models: dict[str, Any]) -> dict[str, Any]:
    """Return the data settings with which models of jobs were trained; nothing for other models. Raises SpecError."""
    from betakd_ray.evaluation.asking import trained_with

    found = {label: trained_with(parse_spec(model, ModelSpec, label)) or {} for label, model in models.items()}
    first, *others = found
    for other in others:
        if found[other] != found[first]:
            raise SpecError(
                f"{first} and {other} were trained with other settings of `data`, e.g. another template; evaluate each "
                "by itself"
            )
    return found[first]


def _labelled(target: str) -> tuple[str, str]:
    """Return label and path of LABEL=MODEL, or of a model alone."""
    label, separator, path = target.partition("=")
    if separator and "/" not in label:
        return label, path
    return label_of(target), target


def _is_yaml(target: str) -> bool:
    return target == "-" or target.endswith((".yaml", ".yml"))
