"""MMBench, English dev split: each question with its options in several rotations; right only if every one is."""

import base64
import binascii
import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from betakd_ray.errors import DataError
from betakd_ray.evaluation.benchmark import OPTION_LETTER, Benchmark, Options, Question, Verdict, by_id
from betakd_ray.evaluation.option_rules import Rule, lmms_eval, opencompass, vlmevalkit
from betakd_ray.evaluation.question_files import DataFolder, numbered

FILES = ("mmbench_dev_en_20231003.tsv", "mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv")
COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "image")
RULES: dict[str, Rule] = {"opencompass": opencompass, "vlmevalkit": vlmevalkit, "lmms-eval": lmms_eval}
_LETTERS = "ABCD"
_ROTATIONS = 10**6
"""Distance between the indices of two rotations of one question."""
_MISSING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
}
"""Cells that are no text for pandas, with which the public tools read the file."""
_LONGEST_INDEX = 64
"""Number of characters up to which a cell of `image` may be another row's index, and not an image."""


def questions(folder: DataFolder, options: Options) -> list[Question]:
    """Return the questions, one for each row. Raises DataError for a file without truth, or with damaged rows."""
    file = folder.find(*FILES, source="the MMBench repository (or VLMEvalKit's copy)")
    rows = _rows(folder.text(file), file)
    images = {row["index"]: row["image"] for row in rows}
    kinds = {int(row["index"]): row.get("l2-category", "") for row in rows}
    keys = numbered([str(int(row["index"])) for row in rows])
    return [_question(key, row, images, kinds) for key, row in zip(keys, rows, strict=True)]


def judge(question: Question, text: str, rule: str) -> Verdict:
    """Compare the letter that the rule finds; without a letter the answer is wrong."""
    found = RULES[rule](text, dict(zip(question.record["option_char"], question.record["options"], strict=True)))
    return Verdict(float(found == question.truth), parsed=found is not None)


def key(line: Mapping[str, Any]) -> str | None:
    """Return the row's index; None for further rounds of one question, since the file holds the rotations."""
    return by_id(line) if line.get("round_id", 0) in (0, None) else None


def remarks(questions: Sequence[Question]) -> Iterable[str]:
    """Say how many rows and groups there are, by which the release of the file is known."""
    yield f"{len(questions)} rows in {len({question.unit for question in questions})} groups"


def _rows(text: str, url: str) -> list[dict[str, str]]:
    """Return the rows as column → text; what counts as missing is empty."""
    former = csv.field_size_limit(sys.maxsize)  # images are longer than the default allows
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), dialect="excel-tab", restval="")
        if lacking := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise DataError(f"{url}: has no column {', '.join(lacking)}; expected {', '.join(COLUMNS)}")
        rows = []
        for row in reader:
            if None in row:
                raise DataError(f"{url}, line {reader.line_num}: has more cells than the header; get the file again")
            rows.append({name: "" if cell in _MISSING else cell for name, cell in row.items()})
    except csv.Error as error:
        raise DataError(f"{url}: is not a table of tab-separated values ({error})") from error
    finally:
        csv.field_size_limit(former)
    if bad := [row["index"] for row in rows if not (row["index"].isascii() and row["index"].isdigit())]:
        raise DataError(f"{url}: {len(bad)} rows have no number as index, the first {bad[0][:40]!r}")
    if unknown := [row["index"] for row in rows if row["answer"] not in tuple(_LETTERS)]:
        raise DataError(
            f"{url}: {len(unknown)} of {len(rows)} questions have no ground truth (answer A, B, C or D), the first "
            f"{unknown[0]}. Only the dev split has answers."
        )
    return rows


def _question(key: str, row: dict[str, str], images: dict[str, str], kinds: dict[int, str]) -> Question:
    index = int(row["index"])
    group = index % _ROTATIONS
    options = _options(row)
    stem = row["question"] if _ends_options(row["hint"]) else f"{row['hint']}\n{row['question']}"
    prompt = "\n".join([stem, *(f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))])
    kind = kinds.get(group) or row.get("l2-category", "")
    return Question(
        key=key,
        text=prompt + OPTION_LETTER,
        image=_image(row["image"], images),
        question_id=index,
        prompt=prompt,
        truth=row["answer"],
        max_new_tokens=1024,
        unit=str(group),
        parts=("accuracy", f"l2[{kind}]") if kind else ("accuracy",),
        record={"round_id": 0, "options": options, "option_char": list(_LETTERS[: len(options)])},
    )


def _options(row: dict[str, str]) -> list[str]:
    options = []
    for letter in _LETTERS:
        if _ends_options(row[letter]):
            break
        options.append(row[letter])
    return options


def _ends_options(cell: str) -> bool:
    return cell.lower() in ("", "nan", "none")


def _image(cell: str, images: dict[str, str]) -> bytes:
    """Return the image's file; empty if the cell holds none, which the check of the images reports."""
    if len(cell) <= _LONGEST_INDEX:
        cell = images.get(cell, "")
    try:
        return base64.b64decode(cell)
    except (binascii.Error, ValueError):
        return b""


BENCHMARK = Benchmark(
    "mmbench", questions, judge, key=key, remarks=remarks, rules=tuple(RULES), folders=("mmbench",),
    lmms={"accuracy": "mmbench_en_dev gpt_eval_score"},
)  # fmt: skip
