"""Ratio of a step's time to that of its slower side alone: `python -m benchmarks.feed_overlap`, about four minutes.

Feed, client and pool are the real ones, with ranks as threads. Teachers and students only sleep. The number of
micro-batches per step varies. The table shows the time of a step, divided by the time that its slower side (teacher or
student) alone would take: for teachers as fast as students, and for teachers twice as slow.
"""

import itertools
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.fakes import FACTS, IMAGE, NEEDS, PAD, Behaviour, FakePool, clients, rendering
from betakd_ray.batch.sample import Sample
from betakd_ray.spec import TeacherPoolSpec
from betakd_ray.teacher.client import TeacherClient
from betakd_ray.teacher.signals import SignalSource
from betakd_ray.train.agreement import Gather
from betakd_ray.train.feed import Feed
from betakd_ray.train.micro_batches import Collator

ACCUMULATION = (1, 2, 4, 8, 16, 32)
RANKS = TEACHERS = 4
MICRO, LENGTH = 4, 8
SAMPLE_S = 0.016
"""Seconds that a student takes for a sample. It is long compared with the machine's overhead for the threads."""
LIMIT = 1.05


class Meeting:
    """All-gather over threads: each thread gives its numbers, and gets those of all threads."""

    def __init__(self, ranks: int) -> None:
        self._given: list[Any] = [None] * ranks
        self._meet = threading.Barrier(ranks)
        self.rounds = 0

    def gather(self, rank: int) -> Gather:
        """Return the collective for one rank's thread."""

        def gather(mine: NDArray[np.float64]) -> NDArray[np.float64]:
            self._given[rank] = mine
            self._meet.wait()
            everyone = np.stack(self._given)
            if self._meet.wait() == 0:
                self.rounds += 1
            return everyone

        return gather


class Quiet:
    """`Control` without requests. A test may set `is_stopping`, or the number of `saves` to ask for."""

    def __init__(self) -> None:
        self.is_stopping = False
        self.saves = 0

    def wants_checkpoint(self) -> bool:
        wants, self.saves = self.saves > 0, max(0, self.saves - 1)
        return wants


def over_ideal(accumulation: int, slowness: float, steps: int) -> float:
    """Return the mean time of a step, divided by the slower side's, after the pipeline is full."""
    behaviour = Behaviour(lambda inputs: inputs.size * SAMPLE_S * slowness * TEACHERS / RANKS)
    pool = FakePool(behaviour, TeacherPoolSpec(min=TEACHERS))
    pool.pool.wait_until_ready(30.0)
    meeting, together = Meeting(RANKS), threading.Barrier(RANKS)
    members = clients(pool, RANKS)
    with ThreadPoolExecutor(RANKS) as executor:
        work = [
            executor.submit(_train, rank, members[rank], meeting, together, accumulation, steps)
            for rank in range(RANKS)
        ]
        durations = [each.result() for each in work]
    for client in members:
        client.close()
    # The mean: behind a slow teacher, steps come in bursts of a group's samples. The first third fills the pipeline.
    steady = durations[0][len(durations[0]) // 3 :]
    return statistics.fmean(steady) / (accumulation * MICRO * SAMPLE_S * max(1.0, slowness))


def _train(
    rank: int, client: TeacherClient, meeting: Meeting, together: threading.Barrier, accumulation: int, steps: int
) -> list[float]:
    """Run one rank and return the seconds of each step. A barrier takes the place of the gradients' all-reduce."""
    feed = Feed(
        _rows(),
        SignalSource(client, batch_tokens=MICRO * LENGTH),
        Collator(PAD, IMAGE, NEEDS, FACTS, max_samples=MICRO),
        meeting.gather(rank),
        rank=rank,
        ranks=RANKS,
        global_batch=RANKS * accumulation * MICRO,
        steps=range(1, steps + 1),
        control=Quiet(),
        window_tokens=4 * MICRO * LENGTH,
    )
    ends = [time.perf_counter()]
    while (step := feed.next_step()) is not None:
        for batch in step.micro_batches:
            time.sleep(batch.inputs.size * SAMPLE_S)
        together.wait(60)
        ends.append(time.perf_counter())
    feed.close()
    return [after - before for before, after in itertools.pairwise(ends)]


def _rows() -> Iterator[Sample]:
    for number in itertools.count():
        view = rendering(2 + number % 50, LENGTH)
        yield Sample(0, 0, number, number, str(number), view, view)


def main(*, miniature: bool = False) -> None:
    """Print one table with both speeds of the teachers."""
    table = Table("micro-batches a step", "teacher as fast", "twice as slow", title=f"step over ideal, limit {LIMIT}")
    for accumulation in (2,) if miniature else ACCUMULATION:
        steps = 4 if miniature else max(15, 96 // accumulation)
        found = [over_ideal(accumulation, slowness, steps) for slowness in (1.0, 2.0)]
        table.add_row(str(accumulation), *(f"{each:.3f}" for each in found))
    Console().print(table)


if __name__ == "__main__":
    main()
