"""Scores as tables and as JSON, with lmms-eval's names beside ours."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from betakd_ray.evaluation.intervals import Compared
from betakd_ray.evaluation.scoring import Scored, average

HEADER = ["model", "benchmark", "metric", "score", "95% interval", "in lmms-eval"]
WRONG = ("missing", "unanswered", "repeated", "unparsable")
COUNTS = ("questions", *WRONG)
"""Names of the numbers of questions and answers, which are no scores."""


def score_rows(scored: Sequence[Scored]) -> list[list[str]]:
    """Return a header and one row for each metric, and for the average of a model that has all its benchmarks."""
    rows = [HEADER]
    for each in scored:
        rows += [
            [each.model, each.benchmark.name, metric, _number(value), _ends(each.intervals.get(metric)),
             each.benchmark.lmms.get(metric, "")]
            for metric, value in each.metrics.items()
        ]  # fmt: skip
    for model, own in by_model(scored).items():
        if mean := average(own):
            rows.append([model, "average", "of six", _number(mean[0]), _ends(mean[1]), ""])
    return rows


def remark_lines(scored: Sequence[Scored]) -> list[str]:
    """Return a line for each model and benchmark: how many questions, what is wrong with the answers, and notes."""
    return [
        f"{each.model}, {each.benchmark.name}: {each.counts['questions']} questions; "
        + ", ".join(f"{each.counts[name]} {name}" for name in WRONG)
        + "".join(f"; {note}" for note in each.notes)
        for each in scored
    ]


def comparison_rows(pairs: Sequence[Compared]) -> list[list[str]]:
    """Return a header and one row for each two models on a benchmark."""
    named = any(each.benchmark for each in pairs)
    rows = [["benchmark", "metric", "model", "compared with", "difference", "95% interval", "p"]]
    rows += [
        [each.benchmark, each.metric, each.model, each.compared_with, *_difference(each), f"{each.p:.4f}"]
        for each in pairs
    ]
    return rows if named else [row[1:] for row in rows]


def _difference(found: Compared) -> tuple[str, str]:
    # Packed question sets have shares from 0 to 1, benchmarks have per cent.
    digits = 2 if found.benchmark else 4
    return f"{found.difference:+.{digits}f}", f"{found.low:+.{digits}f} to {found.high:+.{digits}f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, of which the first is the header, as a Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def report(scored: Sequence[Scored], pairs: Sequence[Compared]) -> str:
    """Return all tables and remarks as Markdown."""
    tables = [rows for rows in (score_rows(scored), comparison_rows(pairs)) if len(rows) > 1]
    remarks = "\n".join(f"- {line}" for line in remark_lines(scored))
    return "\n\n".join([*map(markdown, tables), remarks]) + "\n"


def as_json(scored: Sequence[Scored], pairs: Sequence[Compared]) -> str:
    """Return benchmark → metric → number; of several models, that by model, and the comparisons."""
    models = {model: _of_model(own) for model, own in by_model(scored).items()}
    if len(models) == 1:
        return json.dumps(next(iter(models.values())), indent=2)
    return json.dumps({"models": models, "comparisons": [asdict(each) for each in pairs]}, indent=2)


def by_model(scored: Sequence[Scored]) -> dict[str, list[Scored]]:
    """Return the scores of each model, in their order."""
    models: dict[str, list[Scored]] = {}
    for each in scored:
        models.setdefault(each.model, []).append(each)
    return models


def _of_model(scored: Sequence[Scored]) -> dict[str, Any]:
    content: dict[str, Any] = {each.benchmark.name: each.flat() for each in scored}
    if mean := average(scored):
        content["average"] = {"average": mean[0], "average.low": mean[1][0], "average.high": mean[1][1]}
    return content


def _number(value: float) -> str:
    return f"{value:.2f}"


def _ends(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"
