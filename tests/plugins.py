"""An energy, a template and an engine of a user's own, for jobs that take them from a module outside of the package."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from betakd_ray.teacher.scorer import TeacherScorer


def brier(teacher_logits: Tensor, student_logits: Tensor, *, scale: float = 1.0) -> Tensor:
    return scale * (teacher_logits.softmax(-1) - student_logits.softmax(-1)).square().sum(-1)


def line_by_line(turns: Sequence[dict[str, str]], system: str | None, eos: str) -> Iterator[tuple[str, bool]]:
    for turn in turns:
        yield (turn["value"] + "\n", False) if turn["from"] == "human" else (turn["value"] + eos, True)


class SlowToLoad(TeacherScorer):
    """An engine that loads for longer than any test."""

    def __init__(self, *arguments: Any) -> None:
        time.sleep(3600)
        super().__init__(*arguments)


class OwnScorer(TeacherScorer):
    """An engine of a user's own, which does as ours."""
