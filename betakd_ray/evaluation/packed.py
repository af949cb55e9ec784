"""How sure the scores of a packed question set are: intervals for each model, and a comparison of every two."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from betakd_ray.evaluation.benchmark import Sums, ratio
from betakd_ray.evaluation.exact_match import ModelAnswer, agree
from betakd_ray.evaluation.intervals import Compared, Intervals, Tally, compare, interval, resampled
from betakd_ray.evaluation.result import Result
from betakd_ray.evaluation.score_table import comparison_rows

ACCURACY, AGREEMENT = "accuracy", "agreement"
_RIGHT = " right"
"""Ending of the name of the count of right answers of a part."""


def tally_of(answers: Sequence[ModelAnswer], others: Sequence[ModelAnswer] | None = None) -> Tally:
    """Return the counts of each question, for `exact_match` and for the agreement with the answers of another model."""
    counts = []
    for position, answer in enumerate(answers):
        parts = {ACCURACY: answer.correct}
        if answer.type is not None:
            parts[f"{ACCURACY}[{answer.type}]"] = answer.correct
        if others is not None:
            parts[AGREEMENT] = agree(answer.text, others[position].text)
        counts.append(dict.fromkeys(parts, 1.0) | {f"{name}{_RIGHT}": float(value) for name, value in parts.items()})
    return Tally.of([str(position) for position in range(len(answers))], counts, [""] * len(answers))


def shares(sums: Sums) -> dict[str, object]:
    """Return the share of right answers of each part, from 0 to 1."""
    parts = [name for name in sums if not name.endswith(_RIGHT)]
    return {part: ratio(sums[f"{part}{_RIGHT}"], sums[part]) for part in parts}


def intervals_of(answers: Mapping[str, Sequence[ModelAnswer]], reference: str | None) -> dict[str, Intervals]:
    """Return label of a model → metric → ends of its 95% interval; `reference` is the model of the agreement."""
    found: dict[str, Intervals] = {}
    for label, own in answers.items():
        others = answers[reference] if reference is not None and reference != label else None
        draws = resampled(tally_of(own, others), shares, seed=0)
        ends = {name: interval(values) for name, values in draws.items()}
        found[label] = {name: both for name, both in ends.items() if both is not None}
    return found


def comparisons_of(answers: Mapping[str, Sequence[ModelAnswer]]) -> list[Compared]:
    """Compare the accuracy of each model with that of each one before it, on the same questions."""
    tallies = {label: tally_of(own) for label, own in answers.items()}
    return [
        Compared.of("", second, first, compare(tallies[first], tallies[second], shares, ACCURACY, seed=0))
        for first, second in combinations(tallies, 2)
    ]


def tables_of(result: Result) -> list[list[list[str]]]:
    """Return the tables of a packed question set, each with its header: the models' scores, and their comparisons.

    `unanswerable` has a column only if there is such a sample.
    """
    scores = result.scores
    names = list(dict.fromkeys(name for metrics in scores.values() for name in metrics))
    if not any(metrics.get("unanswerable") for metrics in scores.values()):
        names = [name for name in names if name != "unanswerable"]
    rows = [["model", *names]]
    for label, metrics in scores.items():
        ends = result.intervals.get(label, {})
        rows.append([label, *(_share(metrics.get(name), ends.get(name)) for name in names)])
    return [rows, comparison_rows(result.comparisons)] if result.comparisons else [rows]


def _share(value: float | None, ends: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")
