"""Put a question set to several models: python jobs/evaluate.py --spec evaluation.yaml [--set limit=100 …]."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from betakd_ray.errors import UserError
from betakd_ray.evaluation.run import Evaluation
from betakd_ray.job import cluster
from betakd_ray.spec import EvaluationSpec, load_spec


def main(
    spec: Annotated[Path, typer.Option(help="YAML of an EvaluationSpec")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. limit=100; repeatable")] = None,
) -> None:
    """Evaluate the models of a spec and print their scores."""
    try:
        evaluation = load_spec(spec, overrides or [], EvaluationSpec)
        with cluster(evaluation):
            results = Evaluation(evaluation).run()
    except UserError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    Console().print(table(evaluation.name, results))


def table(title: str, results: dict[str, dict[str, float]]) -> Table:
    """One row a model, one column a metric."""
    metrics = list(dict.fromkeys(name for scores in results.values() for name in scores))
    grid = Table("model", *(name.replace("[", r"\[") for name in metrics), title=title)
    for label, scores in results.items():
        grid.add_row(label, *(_cell(name, scores.get(name)) for name in metrics))
    return grid


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if name == "unanswerable" else f"{value:.4f}"


if __name__ == "__main__":
    typer.run(main)
