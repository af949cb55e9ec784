"""SEED-Bench: multiple choice on images and on frames of videos; the answer is an option's letter."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

from betakd_ray.evaluation.benchmark import Benchmark, Options, Question, Verdict
from betakd_ray.evaluation.question_files import DataFolder, numbered, with_truth

QUESTIONS, TRUTH = "llava-seed-bench.jsonl", "SEED-Bench.json"


@dataclass(frozen=True)
class Row:
    question_id: int | str
    image: str
    text: str


@dataclass(frozen=True)
class Truth:
    question_id: int | str
    answer: Literal["A", "B", "C", "D"]
    data_type: Literal["image", "video"]
    question_type_id: int


@dataclass(frozen=True)
class Truths:
    questions: list[Truth]
    question_type: dict[str, int]


def questions(folder: DataFolder, options: Options) -> list[Question]:
    """Return the questions of the LLaVA file, with the answers of SEED-Bench's own file."""
    file = folder.find(QUESTIONS, source="LLaVA's eval.zip")
    truth = folder.find(TRUTH, source="the SEED-Bench data set")
    rows = folder.json_lines(file, TypeAdapter(Row).validate_json)
    content = folder.json(truth, TypeAdapter(Truths).validate_json)
    types = {number: name for name, number in content.question_type.items()}
    keys = [_key(row.question_id) for row in rows]
    truths = with_truth(keys, {_key(each.question_id): each for each in content.questions}, str, f"{file} and {truth}")
    root = file.rpartition("/")[0]
    return [
        Question(
            key=key, text=row.text, image=f"{root}/{row.image}", question_id=row.question_id, prompt=row.text,
            truth=each.answer, max_new_tokens=128,
            parts=("seed_all", f"seed_{each.data_type}", f"type[{types.get(each.question_type_id, '?')}]"),
        )
        for key, row, each in zip(numbered(keys), rows, truths, strict=True)
    ]  # fmt: skip


def judge(question: Question, text: str, rule: str) -> Verdict:
    """Compare the whole text with the letter, as LLaVA does; or the first character in any case, as lmms-eval does."""
    said = text if rule == "llava" else text.strip()[:1].upper()
    return Verdict(float(said == question.truth), parsed=said in ("A", "B", "C", "D"))


def key(line: Mapping[str, Any]) -> str:
    """Return the question's id; the public files have numbers, as numbers or as text, and others as text."""
    return _key(line["question_id"])


def _key(question_id: int | str) -> str:
    text = str(question_id)
    return str(int(text)) if text.isascii() and text.isdigit() else text


BENCHMARK = Benchmark(
    "seed", questions, judge, key=key, primary="seed_all", rules=("llava", "lmms-eval"),
    folders=("seed_bench", "seed", "SEED-Bench"),
    lmms={name: f"seedbench {name}" for name in ("seed_image", "seed_video", "seed_all")},
)  # fmt: skip
