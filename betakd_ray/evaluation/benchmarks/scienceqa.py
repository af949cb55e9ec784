"""ScienceQA: multiple choice on school science, with and without images; the answer is an option's letter."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from betakd_ray.errors import DataError
from betakd_ray.evaluation.benchmark import OPTION_LETTER, Benchmark, Options, Question, Verdict
from betakd_ray.evaluation.question_files import DataFolder, numbered, with_truth

QUESTIONS, PROBLEMS, SPLITS = "llava_test_CQM-A.json", "problems.json", "pid_splits.json"
FOLDERS = ("sqa", "scienceqa", "ScienceQA")
LETTERS = "ABCDE"
_IMAGE = "<image>"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


@dataclass(frozen=True)
class Turn:
    value: str


@dataclass(frozen=True)
class Row:
    id: str
    conversations: list[Turn]
    image: str | None = None


@dataclass(frozen=True)
class Problem:
    question: str
    choices: list[str]
    answer: int
    hint: str | None = None
    image: str | None = field(default=None)


def questions(folder: DataFolder, options: Options) -> list[Question]:
    """Return the questions of the LLaVA file. Raises DataError unless they are those of the test split."""
    file = folder.find(QUESTIONS, source="LLaVA's eval.zip")
    rows = folder.json(file, TypeAdapter(list[Row]).validate_json)
    problems, splits = _annotations(folder)
    where = f"{file} and {problems[0]}"
    truths = with_truth(rows, problems[1], lambda row: row.id, where)
    _same(rows, splits[1].get("test", []), f"{file} and {splits[0]}")
    images = folder.look_for("images/test") or f"{folder.url}/images/test"
    keys = numbered([row.id for row in rows])
    return [_question(*each, images, where) for each in zip(keys, rows, truths, strict=True)]


def judge(question: Question, text: str, rule: str) -> Verdict:
    """Compare the letter in the text with the right one; a letter that no choice has is wrong."""
    found = letter(text)
    return Verdict(float(found == question.truth), parsed=found is not None)


def letter(text: str) -> str | None:
    """Return the option's letter that LLaVA's scorer reads in an answer; None if it reads none."""
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


def scienceqa_records(folder: DataFolder, images: DataFolder, split: str) -> Iterator[dict[str, Any]]:
    """Yield the problems of a split as LLaVA's records, asked as in the benchmark; `image` is a path or URL.

    Raises DataError for files that are missing or damaged, and for a split that there is not.
    """
    problems, splits = _annotations(folder.of(FOLDERS))
    if split not in splits[1]:
        raise DataError(f"{splits[0]}: has no split {split!r}; it has {', '.join(sorted(splits[1]))}")
    pids = splits[1][split]
    shown_in = images.of(FOLDERS).look_for(f"images/{split}", split) or images.url
    for pid, problem in zip(pids, with_truth(pids, problems[1], str, f"{splits[0]} and {problems[0]}"), strict=True):
        shown = {"image": f"{shown_in}/{pid}/{problem.image}"} if problem.image else {}
        asked = f"{_IMAGE}\n" if shown else ""
        asked += f"Context: {problem.hint}\n" if problem.hint else ""
        chosen = _right_letter(problem, f"{problems[0]}: {pid}")
        choices = "\n".join(f"{name}. {choice}" for name, choice in zip(LETTERS, problem.choices, strict=False))
        human = {"from": "human", "value": f"{asked}{problem.question}\n{choices}{OPTION_LETTER}"}
        yield {"id": pid} | shown | {"conversations": [human, {"from": "gpt", "value": chosen}]}


def scienceqa_image_records(folder: DataFolder, images: DataFolder, split: str) -> Iterator[dict[str, Any]]:
    """Yield those of `scienceqa_records` that have an image."""
    return (record for record in scienceqa_records(folder, images, split) if "image" in record)


def _annotations(folder: DataFolder) -> tuple[tuple[str, dict[str, Problem]], tuple[str, dict[str, list[str]]]]:
    source = "the ScienceQA repository, data/scienceqa"
    problems, splits = folder.find(PROBLEMS, source=source), folder.find(SPLITS, source=source)
    return (
        (problems, folder.json(problems, TypeAdapter(dict[str, Problem]).validate_json)),
        (splits, folder.json(splits, TypeAdapter(dict[str, list[str]]).validate_json)),
    )


def _same(rows: list[Row], test: list[str], where: str) -> None:
    """Raise DataError unless the question file has the questions of the test split, over which the accuracy is."""
    asked, wanted = {row.id for row in rows}, set(test)
    for extra, problem in (asked - wanted, "are not in the test split"), (wanted - asked, "of it are not asked"):
        if extra:
            raise DataError(
                f"{where}: {len(extra)} questions {problem}, the first {min(extra)}. Take both of the same release; "
                "for fewer questions use the option limit."
            )


def _right_letter(problem: Problem, where: str) -> str:
    if not 0 <= problem.answer < min(len(problem.choices), len(LETTERS)):
        raise DataError(f"{where}: answer {problem.answer} is none of its {len(problem.choices)} choices")
    return LETTERS[problem.answer]


def _question(key: str, row: Row, problem: Problem, images: str, where: str) -> Question:
    if not row.conversations:
        raise DataError(f"{where}: {row.id} has no turn in `conversations`; expected the question")
    value = row.conversations[0].value
    text = value.replace(_IMAGE, "").strip() + OPTION_LETTER
    return Question(
        key=key,
        text=text,
        image=None if row.image is None else f"{images}/{row.image}",
        question_id=row.id,
        prompt=text if row.image is None else f"{_IMAGE}\n{text}",
        truth=_right_letter(problem, f"{where}: {row.id}"),
        max_new_tokens=1024,
        processing="crop",  # as MobileVLM's script, whose figures the paper compares with, has it
        parts=("accuracy", "image_accuracy") if _IMAGE in value else ("accuracy",),
    )


BENCHMARK = Benchmark(
    "scienceqa", questions, judge, folders=FOLDERS, primary="image_accuracy",
    lmms={"accuracy": "scienceqa exact_match", "image_accuracy": "scienceqa_img exact_match"},
)  # fmt: skip
