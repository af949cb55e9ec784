"""A benchmark of coloured pictures, and workers that answer it in the test's own process, without Ray."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from betakd_ray.evaluation.benchmark import Benchmark, Options, Question, Verdict
from betakd_ray.evaluation.question_files import DataFolder

NAME = "tests.asked:COLOURS"
QUESTIONS = "questions.jsonl"


def questions(folder: DataFolder, options: Options) -> list[Question]:
    """Return the questions of the file, every third of them without a picture."""
    rows = [json.loads(line) for line in folder.text(folder.find(QUESTIONS, source="the test")).splitlines()]
    return [
        Question(
            key=row["id"],
            text=row["text"],
            image=f"{folder.url}/{row['image']}" if row["image"] else None,
            question_id=row["id"],
            prompt=row["text"],
            truth="yes",
            max_new_tokens=6,
        )
        for row in rows
    ]


def judge(question: Question, text: str, rule: str) -> Verdict:
    """Compare the text with the truth."""
    return Verdict(float(text == question.truth))


COLOURS = Benchmark("colours", questions, judge)


def write_questions(folder: Path, count: int) -> Path:
    """Write the benchmark's files, and return their folder."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        name = "" if number % 3 == 2 else f"{number}.png"
        if name:
            Image.new("RGB", (40 + number, 24), (10 * number % 256, 90, 200)).save(folder / name)
        text = f"Is it blue?{' Say why!' * (number % 4)}{number}"
        rows.append({"id": f"q{number}", "text": text, "image": name})
    (folder / QUESTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Died(Exception):
    """Stands for Ray's error of a dead actor."""


@dataclass
class Local:
    """What `ray` is to a crew: calls happen at once, in order, and `wait` gives out their results one by one."""

    dies: Callable[[str], bool] = lambda name: False
    """Whether the worker dies in the call of this method."""
    results: dict[int, Callable[[], Any]] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)
    most_alive: int = 0

    def actor(self, worker: Any) -> Any:
        """Return a worker with Ray's way to call it."""

        def method(name: str) -> Any:
            def remote(*arguments: Any) -> int:
                number = len(self.results)
                self.results[number] = lambda: getattr(worker, name)(*arguments)
                if self.dies(name):
                    self.results[number] = _die
                return number

            return SimpleNamespace(remote=remote)

        made = SimpleNamespace(load=method("load"), answer=method("answer"))
        self.alive.append(made)
        self.most_alive = max(self.most_alive, len(self.alive))
        return made

    def wait(self, pending: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return pending[:1], pending[1:]

    def get(self, number: int) -> Any:
        return self.results[number]()

    def kill(self, actor: Any) -> None:
        self.alive.remove(actor)


def _die() -> None:
    raise Died


def scores_of(folder: Path) -> Mapping[str, Any]:
    """Return the content of evaluation.json."""
    return json.loads((folder / "evaluation.json").read_text())
