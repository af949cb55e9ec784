"""A job whose teachers are slow for their first answers; what its cluster's nodes were, second by second, as JSON.

python slow_teacher.py SPEC OUTPUT: one object a line, {"time", "teacher", "student"}, until only the head is left.
"""

import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ray

sys.path.insert(0, str(Path(__file__).parents[2]))

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.job import BetaKDJob
from betakd_ray.on_ray.cluster import connected
from betakd_ray.spec import load_spec
from betakd_ray.teacher import pool, sharing
from betakd_ray.teacher.answers import GroupAnswer
from betakd_ray.teacher.scorer import TeacherScorer
from tests.nodes import LABEL

SLOW_ANSWERS, SLOW_S = 40, 1.0  # well beyond a step of the student, on a busy machine too
IDLE_S = 180
"""Longest time that nodes may stay after the job."""


class SlowScorer(TeacherScorer):
    answers = 0

    def score(self, inputs: ModelInputs) -> GroupAnswer:
        self.answers += 1
        if self.answers <= SLOW_ANSWERS:
            with self._permits:  # several groups are in hand, and they take turns
                time.sleep(SLOW_S)
        return super().score(inputs)


class SlowPool(pool.TeacherPool):
    def _engine(self) -> type[TeacherScorer]:
        return SlowScorer

    def __init__(self, *arguments: Any) -> None:
        # In this actor's process. Between the waits for slow teachers and those for quick ones, also on a busy machine.
        pool.SHRINK_AFTER_S, pool.SHRINK_BELOW, pool.GROW_ABOVE = 5.0, 0.3, 0.3
        super().__init__(*arguments)


def nodes() -> Counter[str]:
    return Counter(node["Labels"].get(LABEL, "") for node in ray.nodes() if node["Alive"])


def main(path: str, output: str) -> None:
    sharing.TeacherPool = SlowPool  # type: ignore[misc]
    spec = load_spec(path)
    with connected(spec), open(output, "w", encoding="utf-8") as file:

        def show(counts: Counter[str]) -> None:
            record = {"time": time.time(), "teacher": counts["teacher"], "student": counts["student"]}
            file.write(json.dumps(record) + "\n")

        def follow(stop: threading.Event) -> None:
            while not stop.wait(1.0):
                show(nodes())

        show(nodes())
        stop = threading.Event()
        follower = threading.Thread(target=follow, args=(stop,))
        follower.start()
        try:
            BetaKDJob(spec).fit()
        finally:
            stop.set()
            follower.join()
        begin = time.monotonic()
        while sum((counts := nodes()).values()) > 1 and time.monotonic() - begin < IDLE_S:
            show(counts)
            time.sleep(1)
        show(counts)


if __name__ == "__main__":
    main(*sys.argv[1:])
