"""A group that kills its teachers, halved until the samples at fault are found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.sample import Rendering
from betakd_ray.errors import TeacherError
from betakd_ray.teacher.parts import Answer, GroupAnswer
from betakd_ray.teacher.ports import Unanswered

Stack = Callable[[Sequence[Rendering]], ModelInputs]
Score = Callable[[ModelInputs], GroupAnswer]
"""Asks a teacher. Raises Unanswered, and that for no other reason than these inputs."""


def examine(group: Sequence[Rendering], stack: Stack, score: Score) -> Answer:
    """Return the answer to a group, with no signal for the samples that no teacher survives, and the reason.

    Asks some 2·log2(n) times for each such sample. Raises TeacherError where it must be the teacher that is at fault:
    two samples in a row are refused before any is answered, or a blank sample is refused as well.
    """
    return _Examination(stack, score).of(group)


@dataclass
class _Examination:
    stack: Stack
    score: Score
    answered: int = 0
    refused: int = 0

    def of(self, group: Sequence[Rendering]) -> Answer:
        try:
            answer = self.score(self.stack(group))
        except Unanswered as reason:
            if len(group) == 1:
                return self._refuse(group, str(reason))
            half = len(group) // 2
            return Answer.joined([self.of(group[:half]), self.of(group[half:])])
        self.answered += len(group)
        return Answer.of(answer)

    def _refuse(self, group: Sequence[Rendering], reason: str) -> Answer:
        self.refused += 1
        if self.refused > 1 and not self.answered:
            raise TeacherError(f"the teacher cannot score a batch, whichever sample of it is tried: {reason}")
        try:
            self.score(self.stack(group).blank())
        except Unanswered as same:
            raise TeacherError(f"the teacher cannot score even a blank sample: {same}") from same
        return Answer([None], {0: f"the teacher cannot score it: {reason}"})
