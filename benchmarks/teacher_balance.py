"""Balance of the load on the teachers: `python -m benchmarks.teacher_balance`, about five minutes on two cores.

The client and the pool are the real ones, with one thread for each group at a teacher. The teachers only sleep. The
ranks train synchronously: each waits for the answers of its share, then for the other ranks. Then it computes for as
long as the teachers, if all are busy, take for a step. For each shape the table shows the busy time of the busiest
teacher, divided by the mean over all teachers: at first, and again after a tenth of them died and were replaced.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.fakes import Behaviour, FakePool, clients, renderings
from betakd_ray.spec import TeacherPoolSpec
from betakd_ray.teacher.client import TeacherClient

SHAPES = [(4, 8), (8, 16), (16, 64), (32, 64), (216, 80), (100, 512)]
"""Pairs (number of teachers, number of ranks)."""
LIMIT = 1.10


class Balance(NamedTuple):
    """Busy time of the busiest teacher, divided by the mean over all teachers."""

    at_first: float
    after_deaths: float


def main(*, miniature: bool = False) -> None:
    """Print the balance of every shape."""
    table = Table("teachers", "ranks", "busiest / mean", "after a tenth died", title=f"limit {LIMIT:.2f}")
    for teachers, ranks in SHAPES[:1] if miniature else SHAPES:
        found = balance(teachers, ranks, seconds=1.0 if miniature else 8.0)
        table.add_row(str(teachers), str(ranks), *(f"{value:.3f}" for value in found))
    Console().print(table)


def balance(teachers: int, ranks: int, groups: int = 2, window: int = 4, seconds: float = 8.0) -> Balance:
    """Simulate a job in which each rank's step has `groups` groups, and return the balance.

    `seconds` is the least time of each of the two halves. The time per group limits all teachers together to about 150
    groups per second: with more, the result would depend on this machine's speed.
    """
    group_s = max(0.02, teachers / 150)
    step_s = groups * ranks * group_s / teachers
    spec = TeacherPoolSpec(min=teachers, max_restarts=10)
    pool = FakePool(Behaviour(lambda _: group_s, load_s=0.5), spec)
    pool.pool.wait_until_ready(30.0)
    ends = threading.Event()
    together = threading.Barrier(ranks)
    members = clients(pool, ranks)
    students = [
        threading.Thread(target=_train, args=(client, groups, window, step_s, together, ends), daemon=True)
        for client in members
    ]
    for student in students:
        student.start()
    time.sleep(0.5 + 2 * step_s)  # until the pipeline is full
    half = max(seconds, 30 * step_s)  # if each teacher had only a few groups, one more would change much
    at_first = _measure(pool, half)
    for teacher in pool.members()[:: 10 if teachers >= 10 else teachers]:
        teacher.kill()
    time.sleep(2.0 + 2 * step_s)  # until the students have noticed the deaths, and the pool has new teachers
    while len(pool.members()) < teachers:
        time.sleep(0.1)
    for client in members:
        client._refresh(0.0)  # the next heartbeats would do the same
    time.sleep(2 * step_s)
    after_deaths = _measure(pool, half)
    ends.set()
    together.abort()
    for student in students:
        student.join(30)
    for client in members:
        client._is_closed.set()
    return Balance(at_first, after_deaths)


def _measure(pool: FakePool, seconds: float) -> float:
    begin = time.monotonic()
    time.sleep(seconds)
    end = time.monotonic()
    busy = [teacher.busy_s(begin, end) for teacher in pool.members()]
    return max(busy) * len(busy) / sum(busy)


def _train(
    client: TeacherClient, groups: int, window: int, step_s: float, together: threading.Barrier, ends: threading.Event
) -> None:
    """Run one rank. The groups of a step, and `window` more, are always with the teachers."""
    samples = renderings(2)
    with ThreadPoolExecutor(groups + window) as executor:
        ahead: deque[Future[Any]] = deque(executor.submit(client.score, samples) for _ in range(groups + window))
        try:
            while not ends.is_set():
                _step([ahead.popleft() for _ in range(groups)])
                ahead.extend(executor.submit(client.score, samples) for _ in range(groups))
                together.wait(60)
                time.sleep(step_s)
        except threading.BrokenBarrierError:
            pass
        executor.shutdown(cancel_futures=True)


def _step(answers: Sequence["Future[Any]"]) -> None:
    for answer in answers:
        assert None not in answer.result().signals


if __name__ == "__main__":
    main()
