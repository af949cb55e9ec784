"""Questions per CPU second: `python -m benchmarks.evaluation_speed [DATA [NAMES]]`, some minutes.

The model is easy-VQA's teacher. The questions are those of the benchmarks NAMES (by default gqa,pope,mme,textvqa) in
the folder DATA; without DATA, invented ones. Before: one question at a time. After: batches of similar length. Both
have the same rendering, the same model and one thread, and must give the same answers.
"""

import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from betakd_ray.evaluation.benchmark import Options, Question
from betakd_ray.evaluation.question_files import DataFolder
from betakd_ray.evaluation.registry import find_benchmark
from betakd_ray.evaluation.scoring import read_questions
from betakd_ray.evaluation.suite import chunked
from betakd_ray.evaluation.worker import AnsweringWorker
from betakd_ray.spec import BenchmarksSpec, parse_spec

MODEL = Path(__file__).parents[1] / "jobs" / "easy_vqa" / "teacher"
NAMES = ("gqa", "pope", "mme", "textvqa")
BATCH = 64
WORDS = tuple(
    [
        "is",
        "there",
        "what",
        "which",
        "shape",
        "colour",
        "large",
        "small",
        "circle",
        "triangle",
        "square",
        "left",
        "right",
        "of",
        "the",
        "image",
    ]
)


def invented(folder: Path, count: int) -> list[Question]:
    """Return questions of 4 to 40 words, with three questions on each picture."""
    draw = random.Random(0)
    questions = []
    for number in range(count):
        file = folder / f"{number // 3}.png"
        if not file.exists():
            Image.new("RGB", (draw.randint(40, 90), draw.randint(40, 90)), (draw.randint(0, 255), 90, 60)).save(file)
        text = " ".join(draw.choices(WORDS, k=draw.randint(4, 40))) + "?"
        questions.append(Question(str(number), text, str(file), number, text, None, 16))
    return questions


def measure(worker: AnsweringWorker, questions: list[Question], batch: int) -> tuple[float, list[str | None]]:
    """Return the CPU seconds, and the answers in the order of the questions."""
    texts: dict[str, str | None] = {}
    begun = time.process_time()
    for chunk in chunked("", {str(at): each for at, each in enumerate(questions)}, batch):
        texts |= {key: said.text for key, said in zip(chunk.keys, worker.answer(chunk.questions), strict=True)}
    return time.process_time() - begun, [texts[str(at)] for at in range(len(questions))]


def sets(folder: Path, data: str | None, names: tuple[str, ...], count: int) -> dict[str, list[Question]]:
    """Return the questions of each set, at most `count`."""
    if data is None:
        return {"invented": invented(folder, count)}
    found = {name: find_benchmark(name) for name in names}
    return {name: read_questions(each, DataFolder(f"{data}/{name}"), Options())[:count] for name, each in found.items()}


def main(*, miniature: bool = False, data: str | None = None, names: tuple[str, ...] = NAMES) -> None:
    """Print both ways for each set of questions."""
    torch.set_num_threads(1)
    table = Table("questions", "number", "per CPU second before", "after", "ratio", "same answers")
    tree = {"models": {"teacher": {"path": str(MODEL)}}, "benchmarks": NAMES, "data": data or ".", "system_prompt": ""}
    with TemporaryDirectory() as folder:
        worker = AnsweringWorker(parse_spec(tree | {"batch_size": BATCH}, BenchmarksSpec), "teacher")
        worker.load()
        for name, questions in sets(Path(folder), data, names, 24 if miniature else 300).items():
            measure(worker, questions[:2], 1)  # the first call imports and allocates
            (alone, first), (batched, second) = (measure(worker, questions, size) for size in (1, BATCH))
            rates = [len(questions) / seconds for seconds in (alone, batched)]
            equal = sum(one == other for one, other in zip(first, second, strict=True))
            table.add_row(
                name, f"{len(questions)}", *(f"{rate:.1f}" for rate in rates), f"{rates[1] / rates[0]:.1f}×",
                f"{equal} of {len(questions)}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main(
        data=sys.argv[1] if len(sys.argv) > 1 else None, names=tuple(sys.argv[2].split(",")) if sys.argv[2:] else NAMES
    )
