"""Small question sets in the public layouts, with invented questions and the pictures that they need."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from betakd_ray.evaluation.answer_file import AnswerFile
from betakd_ray.evaluation.benchmark import SHORT_ANSWER, Benchmark, Options, Question
from betakd_ray.evaluation.question_files import DataFolder
from betakd_ray.evaluation.registry import find_benchmark
from betakd_ray.evaluation.scoring import Scored, Scoring, read_questions, score

PEOPLE = ["red", "red", "red", "the red", "Red.", "blue", "blue", "green", "two", "none"]
ENDING = SHORT_ANSWER.strip()


def picture(colour: str = "red") -> bytes:
    """Return a small JPEG file."""
    file = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(file, "JPEG")
    return file.getvalue()


def write(folder: Path, name: str, content: Any) -> None:
    """Write a file: bytes and text as they are, a list as JSON lines if the name says so, all else as JSON."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif name.endswith(".jsonl") or "coco_pope" in name:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content))


def scienceqa(folder: Path) -> None:
    problems = {
        str(pid): {
            "question": f"Which is {pid}?", "choices": ["one", "two", "three"][: 2 + pid % 2], "answer": pid % 2,
            "hint": "Look." if pid % 3 else "", "image": "image.png" if pid > 2 else None, "split": "test",
        }
        for pid in range(1, 6)
    }  # fmt: skip
    rows = []
    for pid, problem in problems.items():
        shown = problem["image"] is not None
        text = f"{problem['question']}\nA. one\nB. two"
        turns = [{"from": "human", "value": f"<image>\n{text}" if shown else text}, {"from": "gpt", "value": "A"}]
        rows.append({"id": pid} | ({"image": f"{pid}/image.png"} if shown else {}) | {"conversations": turns})
        if shown:
            write(folder, f"images/test/{pid}/image.png", picture())
    write(folder, "llava_test_CQM-A.json", rows)
    write(folder, "problems.json", problems)
    write(folder, "pid_splits.json", {"train": [], "test": list(problems)})


def textvqa(folder: Path) -> None:
    asked = [("a1", "What colour, is it?"), ("a1", "How many?"), ("b2", "What colour, is it?")]
    rows = [
        {"question_id": image, "image": f"{image}.jpg", "text": f"{text}\nReference OCR token: A, B\n{ENDING}"}
        for image, text in asked
    ]
    truth = [{"image_id": image, "question": text.lower(), "answers": PEOPLE} for image, text in asked]
    write(folder, "llava_textvqa_val_v051_ocr.jsonl", rows)
    write(folder, "TextVQA_0.5.1_val.json", {"data": truth})
    for image, _ in asked:
        write(folder, f"train_images/{image}.jpg", picture())


def gqa(folder: Path) -> None:
    kinds = {"007": ("query", "obj", "cat"), "08": ("verify", "attr", "yes"), "9": ("choose", "attr", "red")}
    rows = [{"question_id": each, "image": f"n{each}.jpg", "text": f"What?\n{ENDING}"} for each in kinds]
    truth = {
        each: {"question": "What?", "answer": answer, "types": {"structural": kind, "semantic": about, "detailed": "x"}}
        for each, (kind, about, answer) in kinds.items()
    }
    write(folder, "llava_gqa_testdev_balanced.jsonl", rows)
    write(folder, "testdev_balanced_questions.json", truth)
    for each in kinds:
        write(folder, f"images/n{each}.jpg", picture())


POPE = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}


def pope(folder: Path) -> None:
    rows = []
    for category, first in POPE.items():
        asked = [(f"Is there {thing} in the image?", label) for thing, label in (("a cup", "yes"), ("a dog", "no"))]
        for number, (text, _) in enumerate(asked, start=1):
            ids = {"question_id": first + number, "image": "COCO_1.jpg"}
            rows.append(ids | {"text": f"{text}\n{ENDING}", "category": category})
        labels = [{"question_id": 1, "image": "COCO_1.jpg", "text": text, "label": label} for text, label in asked]
        write(folder, f"coco/coco_pope_{category}.json", labels[::-1])
    write(folder, "llava_pope_test.jsonl", rows)
    write(folder, "val2014/COCO_1.jpg", picture())


MME = ("artwork/images/0001.jpg", "artwork/images/0002.jpg", "code_reasoning/0001.png")


def mme(folder: Path) -> None:
    rows = []
    root = "MME_Benchmark_release_version"
    for image in MME:
        category, name = image.split("/")[0], image.rpartition("/")[2].rpartition(".")[0]
        for thing in ("a cup", "a dog"):
            ids = {"question_id": image, "image": image, "category": category}
            rows.append(ids | {"text": f"Is it {thing}?\n{ENDING}"})
        text = "Is it a cup? Please answer yes or no.\tYes\nIs it a dog?  Please answer yes or no.\tNo\n"
        answers = f"{category}/questions_answers_YN" if "/images/" in image else category
        write(folder, f"{root}/{answers}/{name}.txt", text)
        write(folder, f"{root}/{image}", picture())
    write(folder, "llava_mme.jsonl", rows)


MMBENCH = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category", "split"]


def mmbench(folder: Path) -> None:
    image = base64.b64encode(picture()).decode()
    rows = [
        ["7", 'What "is"\nit?', "Read.\tThen look.", "cat", "a dog", "nan", "sun", "A", "x", image, "logic", "dev"],
        ["1000007", 'What "is"\nit?', "Read.\tThen look.", "a dog", "cat", "", "", "B", "x", image, "logic", "dev"],
        ["8", "Where?", "", "up", "down", "left", "right", "D", "x", image, "coarse", "dev"],
    ]
    write(folder, "mmbench_dev_en_20231003.tsv", tsv([MMBENCH, *rows]))


def tsv(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as tab-separated values with CSV's quotes."""
    return "".join("\t".join('"' + cell.replace('"', '""') + '"' for cell in row) + "\r\n" for row in rows)


def chartqa(folder: Path) -> None:
    for split in ("human", "augmented"):
        rows = [{"imgname": "1.png", "query": "How many?", "label": label} for label in ("12", "0", "10%", "Blue")]
        write(folder, f"test_{split}.json", rows)
    write(folder, "png/1.png", picture())


def seed(folder: Path) -> None:
    rows, truth = [], []
    for number, kind in ((1, "image"), (2, "image"), ("v3", "video")):
        text = "What?\nA. a\nB. b\nC. c\nD. d\nAnswer with the option's letter from the given choices directly."
        rows.append({"question_id": number, "image": f"SEED-Bench-image/{number}", "text": text})
        truth.append({"question_id": str(number), "answer": "B", "data_type": kind, "question_type_id": 1})
        write(folder, f"SEED-Bench-image/{number}", picture())
    write(folder, "llava-seed-bench.jsonl", rows)
    write(folder, "SEED-Bench.json", {"questions": truth, "question_type": {"Scene": 1}})


SETS = {
    "scienceqa": scienceqa, "textvqa": textvqa, "gqa": gqa, "pope": pope, "mme": mme, "mmbench": mmbench,
    "chartqa": chartqa, "seed": seed,
}  # fmt: skip


class Set:
    """A question set on disk, with its benchmark and questions."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        self.benchmark: Benchmark = find_benchmark(name)
        SETS[name](folder)

    def questions(self, **options: Any) -> list[Question]:
        return read_questions(self.benchmark, DataFolder(str(self.folder)), Options(**options))

    def lines(self, *texts: str | None) -> list[dict[str, Any]]:
        """Return lines for the first questions; None for a question leaves its line out."""
        return [
            line_of(question, text) for question, text in zip(self.questions(), texts, strict=False) if text is not None
        ]

    def score(self, lines: Sequence[Mapping[str, Any]], **how: Any) -> Scored:
        rows = [(number, dict(line)) for number, line in enumerate(lines, start=1)]
        return score(self.benchmark, self.questions(), AnswerFile("answers.jsonl", rows), Scoring(**how))

    def judged(self, text: str, position: int = 0, rule: str | None = None) -> float:
        """Return what a text is worth as the answer to a question."""
        benchmark = self.benchmark
        return benchmark.judge(self.questions()[position], text, rule or benchmark.rules[0]).value


def line_of(question: Question, text: str) -> dict[str, Any]:
    return {
        "question_id": question.question_id, "prompt": question.prompt, "text": text, "answer_id": question.key,
        "model_id": "m", "metadata": {},
    }  # fmt: skip
