"""Ranks as threads of one process: the real feed, with fake teachers, rows and collectives."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from benchmarks.feed_overlap import Meeting, Quiet
from betakd_ray.batch.sample import Rendering, Sample
from betakd_ray.teacher.answers import Answer
from betakd_ray.teacher.parts import Needs, TeacherFacts
from betakd_ray.train.micro_batches import Collator, Step

__all__ = ["Answers", "Meeting", "Quiet", "all_steps", "collator", "sample", "together"]

T = TypeVar("T")
NEEDS = Needs()


def sample(number: int, length: int = 8, *, has_image: bool = False) -> Sample:
    """Return the text-only sample with this number in shard 0; its last token is the answer."""
    ids = np.full(length, 5 + number % 90, np.int32)
    view = Rendering(ids, np.arange(length) == length - 1)
    return Sample(0, 0, number, number, f"key-{number}", view, view)


class Answers:
    """Fake teacher client that answers at once, after it has called `work` with the group.

    It refuses the samples whose first token is in `refused`. `busy_s` is the time in seconds that it reports per group.
    """

    def __init__(self, work: Callable[[Sequence[Rendering]], None] = lambda group: None, busy_s: float = 0.001) -> None:
        self.work, self.busy_s = work, busy_s
        self.groups: list[int] = []
        self.refused: set[int] = set()

    def score(self, group: Sequence[Rendering]) -> Answer:
        self.groups.append(len(group))
        self.work(group)
        refused = {at for at, view in enumerate(group) if int(view.input_ids[0]) in self.refused}
        signals: list[Any] = [None if at in refused else {} for at in range(len(group))]
        return Answer(signals, dict.fromkeys(refused, "it cannot"), self.busy_s)


def collator(**limits: int) -> Collator:
    facts: TeacherFacts | None = None
    return Collator(pad_token_id=0, image_token_id=4, needs=NEEDS, facts=facts, **limits)


def together(ranks: int, work: Callable[[int], T]) -> list[T]:
    """Run `work(rank)` in one thread per rank, and return the results."""
    with ThreadPoolExecutor(ranks) as executor:
        return list(executor.map(work, range(ranks)))


def all_steps(next_step: Callable[[], Step | None]) -> Iterator[Step]:
    while (step := next_step()) is not None:
        yield step
