"""The command that scores answers files: score."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from betakd_ray.cli.app import Anonymous, Endpoint, Region, app, exit_codes, storage_of
from betakd_ray.cli.console import print_scored
from betakd_ray.spec import StorageSpec
from betakd_ray.spec.base import is_plugin

if TYPE_CHECKING:
    from betakd_ray.evaluation.scoring import Scored


@dataclass(frozen=True)
class Request:
    """What is to be scored, and how."""

    benchmarks: tuple[str, ...]
    answers: tuple[str, ...]
    """Answers files, or folders of them, one for each model."""
    data: str
    storage: StorageSpec = StorageSpec()
    rule: str | None = None
    ocr: bool | None = None
    limit: int | None = None
    output: str | None = None
    markdown: bool = False

    def file(self, answers: str, benchmark: str) -> str:
        """Return the answers file of a model on a benchmark."""
        if "{benchmark}" in answers:
            return answers.replace("{benchmark}", benchmark)
        return answers if len(self.benchmarks) == 1 else f"{answers.rstrip('/')}/{benchmark}.jsonl"


@app.command()
def score(
    benchmark: Annotated[
        str, typer.Argument(help="scienceqa, textvqa, gqa, pope, mme, mmbench, chartqa, seed or module:name; or a list")
    ],
    answers: Annotated[
        list[str],
        typer.Option(help="answers file, or for several benchmarks a folder with BENCHMARK.jsonl; one for each model"),
    ],
    data: Annotated[str, typer.Option(help="folder with the benchmark's files, or with such folders; also s3://…")],
    output: Annotated[str | None, typer.Option(help="file for the scores as JSON")] = None,
    rule: Annotated[str | None, typer.Option(help="how a letter is found in a text, for mmbench and seed")] = None,
    ocr: Annotated[
        bool | None, typer.Option("--ocr/--no-ocr", help="refuse TextVQA answers asked without, or with, OCR tokens")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="score only this number of first questions")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print the tables as Markdown")] = False,
    endpoint_url: Endpoint = None,
    region: Region = None,
    anonymous: Anonymous = False,
) -> None:  # fmt: skip
    """Score answers files of any tool as the public scorers do, with intervals; compare several models."""
    names = (benchmark,) if is_plugin(benchmark) else tuple(name for name in benchmark.split(",") if name)
    with exit_codes():
        storage = storage_of(endpoint_url, region, anonymous)
        run_score(Request(names, tuple(answers), data, storage, rule, ocr, limit, output, markdown))


def run_score(request: Request) -> None:
    """Score, print the tables, and write the JSON if a file is named."""
    writable = request.storage.model_copy(update={"anonymous": False})
    print_scored(_scored(request), request.output, writable, markdown=request.markdown)


def _scored(request: Request) -> "list[Scored]":
    from betakd_ray.evaluation.answer_file import read_answers
    from betakd_ray.evaluation.benchmark import Options
    from betakd_ray.evaluation.question_files import DataFolder
    from betakd_ray.evaluation.registry import find_benchmark
    from betakd_ray.evaluation.scoring import Scoring, read_questions, rules_of
    from betakd_ray.evaluation.scoring import score as score_file

    folder, options = DataFolder(request.data, request.storage), Options(ocr=request.ocr)
    benchmarks = [find_benchmark(name) for name in request.benchmarks]
    rules = rules_of(benchmarks, request.rule)
    files = {
        answers: [read_answers(request.file(answers, benchmark.name), request.storage) for benchmark in benchmarks]
        for answers in request.answers
    }
    labels = _labels({answers: {file.label for file in own} for answers, own in files.items()})
    found = []
    for position, benchmark in enumerate(benchmarks):
        scoring = Scoring(rules[benchmark.name], options, request.limit)
        questions = read_questions(benchmark, folder, options)
        for answers, own in files.items():
            found.append(replace(score_file(benchmark, questions, own[position], scoring), model=labels[answers]))
    return found


def _labels(models: dict[str, set[str]]) -> dict[str, str]:
    """Return a name for each of the given answers: the model that they name, or else what was typed."""
    names = {answers: next(iter(own)) for answers, own in models.items() if len(own) == 1}
    unique = {name for name, count in Counter(names.values()).items() if count == 1}
    return {answers: names[answers] if names.get(answers) in unique else answers for answers in models}
