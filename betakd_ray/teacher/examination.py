"""A batch that kills its teachers, halved until the samples at fault are found."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.errors import TeacherError
from betakd_ray.teacher.signal import Signal


class Unanswered(Exception):
    """A teacher died, stayed silent, or (then it is not `is_deadly`) raised; the message says which."""

    def __init__(self, reason: str, *, is_deadly: bool = True) -> None:
        super().__init__(reason)
        self.is_deadly = is_deadly


Score = Callable[[ModelInputs], Signal]
"""Asks a teacher. Raises Unanswered, and that for no other reason than these inputs."""


def examine(inputs: ModelInputs, score: Score) -> Signal:
    """The answer to a batch, with the samples that no teacher survives marked as not valid, and why.

    Asks some 2·log2(B) times for each such sample. Raises TeacherError where it must be the teacher that is at
    fault: two samples in a row are refused before any is answered, or a blank sample is refused as well.
    """
    return _Examination(score).of(inputs)


@dataclass
class _Examination:
    score: Score
    answered: int = 0
    refused: int = 0

    def of(self, inputs: ModelInputs) -> Signal:
        try:
            signal = self.score(inputs)
        except Unanswered as reason:
            if inputs.size == 1:
                return self._refuse(inputs, str(reason))
            half = inputs.size // 2
            return Signal.joined([self.of(inputs.part(0, half)), self.of(inputs.part(half, inputs.size))])
        self.answered += inputs.size
        return signal

    def _refuse(self, inputs: ModelInputs, reason: str) -> Signal:
        self.refused += 1
        if self.refused > 1 and not self.answered:
            raise TeacherError(f"the teacher cannot score a batch, whichever sample of it is tried: {reason}")
        try:
            # Its answer is thrown away, but has every shape that the student's step needs.
            signal = self.score(inputs.blank())
        except Unanswered as same:
            raise TeacherError(f"the teacher cannot score even a blank sample: {same}") from same
        return replace(signal, valid=np.zeros(1, dtype=bool), reasons={0: f"the teacher cannot score it: {reason}"})
