"""Binary search for the faulty samples of a group that teachers cannot score."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.sample import Rendering
from betakd_ray.errors import TeacherError
from betakd_ray.teacher.answers import Answer, GroupAnswer
from betakd_ray.teacher.ports import Unanswered

Stack = Callable[[Sequence[Rendering]], ModelInputs]
Score = Callable[[ModelInputs], GroupAnswer]
"""Function that asks a teacher. It raises Unanswered only if these inputs are the cause."""


def examine(group: Sequence[Rendering], stack: Stack, score: Score) -> Answer:
    """Return the answer to a group; the samples that teachers cannot score have a reason in place of a signal.

    Asks about 2·log2(n) times for each such sample of n. Raises TeacherError if the teacher must be at fault: two
    samples are refused before any sample is answered, or a blank sample is refused too.
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
            # Halves are examined independently, as several samples of a group may be faulty.
            half = len(group) // 2
            return Answer.joined([self.of(group[:half]), self.of(group[half:])])
        self.answered += len(group)
        return Answer.of(answer)

    def _refuse(self, group: Sequence[Rendering], reason: str) -> Answer:
        self.refused += 1
        if self.refused > 1 and not self.answered:
            raise TeacherError(f"the teacher could not score any sample of a batch that was tried: {reason}")
        try:
            # The same shapes without the content: if this fails too, the content of the sample is not the cause.
            self.score(self.stack(group).blank())
        except Unanswered as same:
            raise TeacherError(f"the teacher cannot score even a blank sample: {same}") from same
        return Answer([None], {0: f"the teacher cannot score it: {reason}"})
