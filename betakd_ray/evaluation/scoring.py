"""Scores of an answers file: metrics with intervals, counts of what is wrong with the answers, and comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from betakd_ray.errors import DataError, SpecError, did_you_mean
from betakd_ray.evaluation.answer_file import Answered, AnswerFile, joined
from betakd_ray.evaluation.benchmark import AS_IN_THE_FILE, Benchmark, Options, Question, Verdict, first_of
from betakd_ray.evaluation.intervals import Array, Compared, Tally, compare, interval, resampled
from betakd_ray.evaluation.question_files import DataFolder

AVERAGE = {"mme": "perception", "gqa": "accuracy", "textvqa": "accuracy", "pope": "f1", "mmbench": "accuracy",
           "scienceqa": "image_accuracy"}  # fmt: skip
"""Benchmarks of the paper's average, with the metric that each gives; MME's points are divided by 20."""


@dataclass(frozen=True)
class Scored:
    """Scores of one model on one benchmark."""

    benchmark: Benchmark
    model: str
    rule: str
    metrics: dict[str, float]
    """Metric → per cent, or points for MME."""
    intervals: dict[str, tuple[float, float]]
    """Metric → ends of its 95% interval."""
    counts: dict[str, int]
    """Numbers of questions, and of answers that are missing, unanswered, repeated or unparsable."""
    notes: tuple[str, ...]
    """Sentences that a reader of the scores has to know."""
    tally: Tally
    primary: Array
    """Resampled values of the primary metric."""

    def flat(self) -> dict[str, float]:
        """Return metrics, ends of intervals and counts under one name each, as they are in the JSON."""
        ends = {
            f"{name}{end}": value
            for name, both in self.intervals.items()
            for end, value in zip((".low", ".high"), both, strict=True)
        }
        return self.metrics | ends | self.counts


def read_questions(benchmark: Benchmark, folder: DataFolder, options: Options) -> list[Question]:
    """Return a benchmark's questions, in the order of their file. Raises DataError if there are none."""
    questions = benchmark.questions(folder.of(benchmark.folders), options)
    if not questions:
        raise DataError(f"{folder.url}: the question file of {benchmark.name} has no questions")
    return questions


@dataclass(frozen=True)
class Scoring:
    """What can be chosen in how answers are scored."""

    rule: str | None = None
    """One of the benchmark's rules; None for its first."""
    options: Options = AS_IN_THE_FILE
    """How the questions were asked."""
    limit: int | None = None
    """Number of first questions that are scored, in whole groups; None for all."""
    seed: int = 0


def score(
    benchmark: Benchmark,
    every: Sequence[Question],
    file: AnswerFile,
    scoring: Scoring = Scoring(),
) -> Scored:
    """Score an answers file. Raises SpecError for an unknown rule, DataError for answers to other questions."""
    rule = checked_rule(benchmark, scoring.rule)
    questions = first_of(every, scoring.limit)
    answered = joined(benchmark, questions, file, every)
    verdicts = [
        Verdict(0.0, answered=False) if text is None else benchmark.judge(question, text, rule)
        for question, text in zip(questions, answered.texts, strict=True)
    ]
    tally = tally_of(benchmark, questions, verdicts)
    draws = resampled(tally, benchmark.metrics, seed=scoring.seed)
    metrics = {name: float(value) for name, value in tally.metrics(benchmark.metrics).items()}
    ends = {name: interval(draws[name]) for name in metrics}
    return Scored(
        benchmark,
        file.label,
        rule,
        metrics,
        {name: both for name, both in ends.items() if both is not None},
        _counts(questions, answered, verdicts),
        _notes(benchmark, questions, answered, scoring.options, rule),
        tally,
        draws[benchmark.primary] if benchmark.primary in draws else np.array([]),
    )


def tally_of(benchmark: Benchmark, questions: Sequence[Question], verdicts: Sequence[Verdict]) -> Tally:
    """Return the counts of each unit of questions."""
    members: dict[str, list[int]] = {}
    for position, question in enumerate(questions):
        members.setdefault(question.group, []).append(position)
    counts = [
        benchmark.count([questions[each] for each in unit], [verdicts[each] for each in unit])
        for unit in members.values()
    ]
    return Tally.of(list(members), counts, [questions[unit[0]].stratum for unit in members.values()])


def rules_of(benchmarks: Sequence[Benchmark], rule: str | None) -> dict[str, str]:
    """Return the rule of each benchmark, by its name: the given one for those that have it, or else their default.

    Raises SpecError if none of them has it.
    """
    if rule is not None and not any(rule in benchmark.rules for benchmark in benchmarks):
        for benchmark in sorted(benchmarks, key=lambda each: -len(each.rules)):
            checked_rule(benchmark, rule)
    return {each.name: rule if rule in each.rules else each.rules[0] for each in benchmarks}


def checked_rule(benchmark: Benchmark, rule: str | None) -> str:
    """Return the rule, or the benchmark's default. Raises SpecError if the benchmark has no such rule."""
    if rule is None:
        return benchmark.rules[0]
    if rule not in benchmark.rules:
        known = ", ".join(name for name in benchmark.rules if name)
        hint = did_you_mean(rule, benchmark.rules)
        raise SpecError(
            f"rule: {benchmark.name} has no rule {rule!r}" + (hint and f"; {hint}")
            + (f" It has {known}." if known else " It has one way of scoring: leave the rule out.")
        )  # fmt: skip
    return rule


def comparisons(scored: Sequence[Scored], *, seed: int = 0) -> list[Compared]:
    """Compare each model with each one before it, on each benchmark that both have."""
    by_name: dict[str, list[Scored]] = {}
    for each in scored:
        by_name.setdefault(each.benchmark.name, []).append(each)
    found = []
    for name, group in by_name.items():
        benchmark = group[0].benchmark
        for first, second in combinations(group, 2) if benchmark.primary in group[0].metrics else ():
            pair = compare(first.tally, second.tally, benchmark.metrics, benchmark.primary, seed=seed)
            found.append(Compared.of(name, second.model, first.model, pair))
    return found


def average(scored: Sequence[Scored]) -> tuple[float, tuple[float, float]] | None:
    """Return the paper's average of one model and its 95% interval; None unless all six benchmarks are there."""
    by_name = {each.benchmark.name: each for each in scored}
    if not all(metric in by_name[name].metrics for name, metric in AVERAGE.items() if name in by_name):
        return None
    if not AVERAGE.keys() <= by_name.keys():
        return None
    parts = [by_name[name] for name in AVERAGE]
    value = np.mean([each.metrics[each.benchmark.primary] * each.benchmark.share for each in parts])
    draws = np.mean([each.primary * each.benchmark.share for each in parts], axis=0)
    return float(value), interval(draws) or (float(value), float(value))


def _counts(questions: Sequence[Question], answered: Answered, verdicts: Sequence[Verdict]) -> dict[str, int]:
    return {
        "questions": len(questions),
        "missing": answered.missing,
        "unanswered": answered.unanswered,
        "repeated": answered.repeated,
        "unparsable": sum(not verdict.parsed for verdict in verdicts),
    }


def _notes(
    benchmark: Benchmark, questions: Sequence[Question], answered: Answered, options: Options, rule: str
) -> tuple[str, ...]:
    lines: Sequence[Mapping[str, Any]] = answered.lines
    said = [*benchmark.remarks(questions), *(benchmark.describe(lines, options) if lines else ())]
    return (*([f"rule {rule}"] if rule else []), *said)
