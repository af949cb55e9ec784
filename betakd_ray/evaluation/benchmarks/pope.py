"""POPE: does the image show an object? Yes or no, in three categories; F1 of the answer yes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

from betakd_ray.errors import DataError
from betakd_ray.evaluation.benchmark import Benchmark, Options, Question, Sums, Verdict, ratio
from betakd_ray.evaluation.question_files import DataFolder, numbered

QUESTIONS = "llava_pope_test.jsonl"
_SOURCE = "the POPE repository at commit e3e39262, output/coco (newer files have other questions)"


@dataclass(frozen=True)
class Row:
    question_id: int
    image: str
    text: str
    category: str

    @property
    def asked(self) -> tuple[str, str]:
        return self.image, self.text.split("\n")[0]


@dataclass(frozen=True)
class Label:
    image: str
    text: str
    label: Literal["yes", "no"]


def questions(folder: DataFolder, options: Options) -> list[Question]:
    """Return the questions of the LLaVA file. Raises DataError if POPE's files have no label for some of them."""
    file = folder.find(QUESTIONS, source="LLaVA's eval.zip")
    rows = folder.json_lines(file, TypeAdapter(Row).validate_json)
    labels = _labels(folder, rows, file)
    images = folder.look_for("val2014") or f"{folder.url}/val2014"
    return [
        Question(
            key=key, text=row.text, image=f"{images}/{row.image}", question_id=row.question_id, prompt=row.text,
            truth=labels[row.category][row.asked], max_new_tokens=128, stratum=row.category,
        )
        for key, row in zip(numbered([str(row.question_id) for row in rows]), rows, strict=True)
    ]  # fmt: skip


def judge(question: Question, text: str, rule: str) -> Verdict:
    """Read yes or no; an answer with neither word is read as yes by the rule, and counts as not parsed."""
    words = "".join(each if each.isalnum() else " " for each in text.lower()).split()
    parsed = bool({"yes", "no", "not"} & set(words))
    return Verdict(float(said(text) == question.truth), parsed=parsed)


def said(text: str) -> str:
    """Return no if the first sentence has the word No, no or not between single spaces; otherwise yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def count(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Count a question as true or false, positive or negative. One without an answer counts against the model."""
    (question,), (verdict,) = questions, verdicts
    right, positive = bool(verdict.value), question.truth == "yes"
    name = {(True, True): "tp", (True, False): "tn", (False, True): "fn", (False, False): "fp"}[right, positive]
    said_yes = verdict.answered and right == positive
    category = question.stratum
    return {
        f"{category} {name}": 1.0, f"{category} answered": float(verdict.answered), f"{category} yes": float(said_yes),
    }  # fmt: skip


def metrics(sums: Sums) -> dict[str, Any]:
    """Return each category's metrics, and the means of accuracy and F1 over the categories, in per cent."""
    categories = dict.fromkeys(name.rpartition(" ")[0] for name in sums)
    found: dict[str, Any] = {}
    for category in categories:
        tp, tn, fp, fn = (sums.get(f"{category} {name}", 0.0) for name in ("tp", "tn", "fp", "fn"))
        yes, answered = sums[f"{category} yes"], sums[f"{category} answered"]
        found |= {
            f"accuracy[{category}]": 100 * ratio(tp + tn, tp + tn + fp + fn, undefined=0.0),
            f"precision[{category}]": 100 * ratio(tp, tp + fp, undefined=0.0),
            f"recall[{category}]": 100 * ratio(tp, tp + fn, undefined=0.0),
            f"f1[{category}]": 100 * ratio(2 * tp, 2 * tp + fp + fn, undefined=0.0),
            f"yes_ratio[{category}]": 100 * ratio(yes, answered, undefined=0.0),
        }
    means = {
        name: np.mean([found[f"{name}[{category}]"] for category in categories], axis=0) for name in ("f1", "accuracy")
    }
    return means | found


def _labels(folder: DataFolder, rows: list[Row], file: str) -> dict[str, dict[tuple[str, str], str]]:
    """Return category → image and question → label.

    Neither the position nor the id in POPE's files finds the label: the ids begin again in each file, and newer files
    have other questions at the same place.
    """
    labels, lacking = {}, []
    for category, group in groupby(sorted(rows, key=lambda row: row.category), key=lambda row: row.category):
        asked = list(group)
        name = f"coco_pope_{category}.json"
        url = folder.find(f"coco/{name}", name, source=_SOURCE)
        labels[category] = _of_category(folder, url)
        if missing := [row for row in asked if row.asked not in labels[category]]:
            lacking.append(f"{url} for {len(missing)} of {len(asked)}, the first {missing[0].question_id}")
    if lacking:
        raise DataError(f"questions of {file} have no label in {'; in '.join(lacking)}. Get the labels from {_SOURCE}.")
    return labels


def _of_category(folder: DataFolder, url: str) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for number, row in enumerate(folder.json_lines(url, TypeAdapter(Label).validate_json), start=1):
        if found.setdefault((row.image, row.text), row.label) != row.label:
            raise DataError(f"{url}, line {number}: another label than before for {row.text!r} of {row.image}")
    return found


BENCHMARK = Benchmark(
    "pope", questions, judge, count=count, metrics=metrics, primary="f1", folders=("pope",),
    lmms={"f1": "pope_f1_score (pooled)", "accuracy": "pope_accuracy (pooled)"},
)  # fmt: skip
