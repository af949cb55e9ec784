"""TextVQA, validation: questions on text in images, scored by how many of ten people gave the answer."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from betakd_ray.errors import DataError
from betakd_ray.evaluation.benchmark import Benchmark, Options, Question, Verdict
from betakd_ray.evaluation.question_files import DataFolder, numbered, with_truth
from betakd_ray.evaluation.vqa_text import normalized

QUESTIONS, ANNOTATIONS = "llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"
_OCR = "Reference OCR token:"


@dataclass(frozen=True)
class Row:
    question_id: str
    image: str
    text: str


@dataclass(frozen=True)
class Annotation:
    image_id: str
    question: str
    answers: list[str]


@dataclass(frozen=True)
class Annotations:
    data: list[Annotation]


def questions(folder: DataFolder, options: Options) -> list[Question]:
    """Return the questions of the LLaVA file, with or without their line of OCR tokens."""
    file = folder.find(QUESTIONS, source="LLaVA's eval.zip")
    annotations = folder.find(ANNOTATIONS, source="the TextVQA site, version 0.5.1")
    rows = folder.json_lines(file, TypeAdapter(Row).validate_json)
    answers = {
        _key(each.image_id, each.question.lower()): [normalized(answer) for answer in each.answers]
        for each in folder.json(annotations, TypeAdapter(Annotations).validate_json).data
        if each.answers
    }
    keys = [_key(row.question_id, question_of(row.text)) for row in rows]
    truths = with_truth(keys, answers, str, f"{file} and {annotations}")
    images = folder.look_for("train_images") or f"{folder.url}/train_images"
    texts = [_without_ocr(row.text) if options.ocr is False else row.text for row in rows]
    return [
        Question(
            key=key, text=text, image=f"{images}/{row.image}", question_id=row.question_id, prompt=text,
            truth=truth, max_new_tokens=128,
        )
        for key, row, text, truth in zip(numbered(keys), rows, texts, truths, strict=True)
    ]  # fmt: skip


def judge(question: Question, text: str, rule: str) -> Verdict:
    """Return the mean, over each person left out, of a third of those others who gave the answer, at most 1."""
    return Verdict(agreement(normalized(text), question.truth), parsed=bool(text.strip()))


def agreement(answer: str, people: Sequence[str]) -> float:
    """Return the score of a normalised answer; `people` are the normalised answers of all people."""
    same = sum(answer == other for other in people)
    # Each of the `same` people who gave the answer is left out once, and then does not count.
    return (same * min(1.0, (same - 1) / 3) + (len(people) - same) * min(1.0, same / 3)) / len(people)


def question_of(prompt: str) -> str:
    """Return the question in a prompt, in lower case, as LLaVA's scorer finds it."""
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return (found[1] if found else prompt).lower()
    lines = prompt.removeprefix("<image>\n").split("\n")
    return lines[1 if len(lines) == 3 and lines[0].startswith(_OCR) else 0].lower()


def key(line: Mapping[str, Any]) -> str:
    """Return image and question, because several questions share an image's id."""
    if not isinstance(line.get("prompt"), str):
        raise ValueError("lacks prompt, a text; several questions share a question_id, and the prompt tells them apart")
    return _key(str(line["question_id"]), question_of(line["prompt"]))


def describe(lines: Sequence[Mapping[str, Any]], options: Options) -> Iterable[str]:
    """Say whether the model was given OCR tokens, with which scores are far higher."""
    shown = sum(_OCR in line["prompt"] or line["prompt"].startswith("OCR tokens: ") for line in lines)
    if options.ocr is not None and shown != options.ocr * len(lines):
        raise DataError(
            f"{shown} of {len(lines)} prompts of the answers have OCR tokens; expected "
            f"{'all' if options.ocr else 'none'} of them. Score answers that were asked so, or leave out the option."
        )
    if shown in (0, len(lines)):
        yield f"asked {'with' if shown else 'without'} OCR tokens in the prompt"
    else:
        yield f"asked with OCR tokens in {shown} of {len(lines)} prompts: the score is of a mixture"


def _key(image: str, question: str) -> str:
    return f"{image} {question}"


def _without_ocr(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if not line.startswith(_OCR))


BENCHMARK = Benchmark(
    "textvqa", questions, judge, key=key, describe=describe, folders=("textvqa",),
    lmms={"accuracy": "textvqa_val exact_match"},
)  # fmt: skip
