"""Ranks as threads of one process: the real feed, with teachers, rows and collectives that are none."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from betakd_ray.batch.sample import Rendering, Sample
from betakd_ray.teacher.parts import Answer, Needs, TeacherFacts
from betakd_ray.train.agreement import Gather
from betakd_ray.train.feed import Collator, Step

T = TypeVar("T")
NEEDS = Needs()


def sample(number: int, length: int = 8, *, has_image: bool = False) -> Sample:
    """Return a text-only sample whose last token is the answer; number `n` is the n-th of shard 0."""
    ids = np.full(length, 5 + number % 90, np.int32)
    view = Rendering(ids, np.arange(length) == length - 1)
    return Sample(0, 0, number, number, f"key-{number}", view, view)


class Meeting:
    """A collective of threads: each gives its numbers, and has everyone's."""

    def __init__(self, ranks: int) -> None:
        self._given: list[Any] = [None] * ranks
        self._meet = threading.Barrier(ranks)
        self.rounds = 0

    def gather(self, rank: int) -> Gather:
        def gather(mine: NDArray[np.float64]) -> NDArray[np.float64]:
            self._given[rank] = mine
            self._meet.wait()
            everyone = np.stack(self._given)
            if self._meet.wait() == 0:
                self.rounds += 1
            return everyone

        return gather


class Quiet:
    """Nobody asks anything of the job; or, once told, to stop or to save."""

    def __init__(self) -> None:
        self.is_stopping = False
        self.saves = 0

    def wants_checkpoint(self) -> bool:
        wants, self.saves = self.saves > 0, max(0, self.saves - 1)
        return wants


class Answers:
    """A teacher client that answers at once, or as `work` has it; refuses the keys in `refused`."""

    def __init__(self, work: Callable[[Sequence[Rendering]], None] = lambda group: None) -> None:
        self.work = work
        self.groups: list[int] = []
        self.refused: set[int] = set()

    def score(self, group: Sequence[Rendering]) -> Answer:
        self.groups.append(len(group))
        self.work(group)
        refused = {at for at, view in enumerate(group) if int(view.input_ids[0]) in self.refused}
        signals: list[Any] = [None if at in refused else {} for at in range(len(group))]
        return Answer(signals, dict.fromkeys(refused, "it cannot"), 0.001)


def collator(**limits: int) -> Collator:
    facts: TeacherFacts | None = None
    return Collator(pad_token_id=0, image_token_id=4, needs=NEEDS, facts=facts, **limits)


def together(ranks: int, work: Callable[[int], T]) -> list[T]:
    """Return what `work(rank)` returns in a thread for each rank."""
    with ThreadPoolExecutor(ranks) as executor:
        return list(executor.map(work, range(ranks)))


def all_steps(next_step: Callable[[], Step | None]) -> Iterator[Step]:
    while (step := next_step()) is not None:
        yield step
