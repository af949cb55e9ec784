"""The plan of a soak and its result: a schedule of faults that a seed gives, and the tally of what they cost."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from statistics import median
from typing import Any

import numpy as np

KINDS = {
    "kill_worker": 4,
    "kill_teacher": 4,
    "kill_pool": 2,
    "kill_monitor": 2,
    "kill_driver": 3,
    "end_driver": 2,
    "stop_worker": 1,
    "lose_student_node": 2,
    "lose_teacher_node": 2,
    "reclaim_student_node": 1,
    "lose_store": 1,
    "fail_requests": 4,
    "fill_disk": 1,
    "jump_clock": 2,
    "swap_shard": 1,
}
"""Kinds of faults, and how often each comes in a deck."""
WORK_S = (5.0, 20.0)
"""Limits in seconds of the work between two faults."""
TOLERANCE = 1e-5
"""Largest relative difference between the losses of a step with and without faults."""
DAY_S = 86_400.0
PARTS = ("back", "loaded", "first", "again")
"""Parts of a recovery, in order; see `Recovery`."""


@dataclass(frozen=True)
class Planned:
    """A fault of the schedule."""

    number: int
    kind: str
    work_s: float
    """Seconds of work before it."""
    seed: str
    """Seed of what else the fault draws, such as its victim."""


def schedule(seed: int, kinds: Mapping[str, int] = KINDS, first: int = 0) -> Iterator[Planned]:
    """Yield the faults from number `first` on, without an end.

    They come in decks, each in another order. So every kind comes early, and as often as its weight says.
    """
    cards = [kind for kind, times in kinds.items() for _ in range(times)]
    for number in count(first):
        deck, place = divmod(number, len(cards))
        kind = random.Random(f"{seed}/{deck}").sample(cards, len(cards))[place]
        draw = f"{seed}/{deck}/{place}"
        yield Planned(number, kind, random.Random(draw).uniform(*WORK_S), draw)


@dataclass(frozen=True)
class Fault:
    """A fault that happened. Times are in seconds since the epoch, by a clock that does not jump."""

    number: int
    kind: str
    began: float
    ended: float
    """Time when the fault was over: the store was back, the disk had room again."""
    back: float | None
    """Time when another process did the work of one that had ended; None if none was seen."""
    kills: bool
    """Whether the fault ends a process of the job for sure."""
    exits: tuple[int, ...] = ()
    """Exit codes of the drivers that ended in the meantime."""


@dataclass
class Attempt:
    """A start of the workers, as its metrics show it."""

    loaded: float
    """Time when it had loaded its checkpoint."""
    resumed_after: int
    steps: list[tuple[int, float]] = field(default_factory=list)
    """(step, time) of each step that was logged and stored."""


@dataclass(frozen=True)
class Recovery:
    """What a fault cost. The parts add up to the total; None is a part that did not happen."""

    kind: str
    kills: bool
    total: float
    """Seconds from the fault to the next new step: one that was not done before it."""
    back: float | None = None
    """Seconds until another process is there: the death was noticed, and a place found."""
    loaded: float | None = None
    """Seconds from then until the workers have loaded the checkpoint."""
    first: float | None = None
    """Seconds from then until their first step; if the workers live on, from `back` until the next step."""
    again: float | None = None
    """Seconds from then until the next new step: steps are done again."""
    redone: int = 0
    """Number of these steps."""


def recovery(fault: Fault, attempts: Sequence[Attempt], step_s: float, unseen: int) -> Recovery:
    """Return what a fault cost. `attempts` must reach beyond the next new step. Raises ValueError if they do not.

    The records of the last steps before a kill are lost with the process. Their number is estimated from the time of a
    step, `step_s`; it is at most `unseen`.
    """
    reached = _reached(fault.began, attempts, step_s, unseen)
    since = fault.ended if fault.back is None else max(fault.back, fault.began)
    found = [(time, attempt) for attempt in attempts for step, time in attempt.steps if step > reached and time > since]
    if not found:
        raise ValueError(f"no step after fault {fault.number} ({fault.kind}): expected one beyond step {reached}")
    new, attempt = min(found, key=lambda each: each[0])
    back = None if fault.back is None else since - fault.began
    total = new - fault.began
    if attempt.loaded <= fault.began:
        return Recovery(fault.kind, fault.kills, total, back, first=total - (back or 0.0))
    # A worker may be seen a moment after it has loaded.
    at = fault.began if fault.back is None else min(since, attempt.loaded)
    first = min(time for _, time in attempt.steps)
    return Recovery(
        fault.kind,
        fault.kills,
        total,
        None if fault.back is None else at - fault.began,
        attempt.loaded - at,
        first - attempt.loaded,
        new - first,
        max(0, reached - attempt.resumed_after),
    )


def _reached(began: float, attempts: Sequence[Attempt], step_s: float, unseen: int) -> int:
    """Return the newest step before a fault."""
    before = [attempt for attempt in attempts if attempt.loaded <= began]
    if not before:
        return 0
    attempt = before[-1]
    known = [(time, step) for step, time in attempt.steps if time <= began]
    time, step = max(known, default=(attempt.loaded, attempt.resumed_after))
    # Later records of the same start show that none before them is lost.
    is_lost = len(known) == len(attempt.steps)
    return step + (min(unseen, int((began - time) / step_s)) if is_lost else 0)


@dataclass(frozen=True)
class Round:
    """A stretch of work under faults, from its first checkpoint to its end."""

    seconds: float
    steps: int
    """Number of steps that were new, and are in a checkpoint."""


def tally(recoveries: Sequence[Recovery], rounds: Sequence[Round], step_s: float) -> dict[str, Any]:
    """Return the figures of a soak. `step_s` is the median time of a step without faults, in seconds.

    `ettr` (effective training time ratio) is the share of the time in which steps were made that count: their number
    times `step_s`, over the time of all rounds.
    """
    seconds, steps = sum(each.seconds for each in rounds), sum(each.steps for each in rounds)
    kinds = dict(Counter(each.kind for each in recoveries).most_common())
    return {
        "faults": sum(kinds.values()),
        "hours": seconds / 3600,
        "steps": steps,
        "step_s": step_s,
        "ettr": steps * step_s / seconds if seconds else 0.0,
        "redone_steps": sum(each.redone for each in recoveries),
        "kills": _figures([each for each in recoveries if each.kills]),
        "kinds": {kind: _figures([each for each in recoveries if each.kind == kind]) for kind in kinds},
    }


def _figures(recoveries: Sequence[Recovery]) -> dict[str, Any]:
    if not recoveries:
        return {"count": 0}
    totals = [each.total for each in recoveries]
    parts = {part: [value for each in recoveries if (value := getattr(each, part)) is not None] for part in PARTS}
    return {
        "count": len(recoveries),
        "median_s": median(totals),
        "p90_s": float(np.percentile(totals, 90)),
        "parts_s": {part: median(values) for part, values in parts.items() if values},
        "redone_steps": sum(each.redone for each in recoveries),
    }


def step_seconds(records: Sequence[Mapping[str, float]]) -> float:
    """Return the median time in seconds between the records of neighbouring steps."""
    gaps = [
        after["time"] - before["time"] for before, after in pairwise(records) if after["step"] == before["step"] + 1
    ]
    return median(gaps)


def first_difference(losses: Mapping[int, float], undisturbed: Mapping[int, float]) -> str | None:
    """Return a text about the first step that is missing, or whose loss is another than without faults; or None."""
    for expected, step in enumerate(sorted(losses), 1):
        if step != expected:
            return f"step {expected} was not logged: after step {expected - 1} comes step {step}"
        if step not in undisturbed:
            return f"step {step}: the undisturbed run has no such step"
        loss, without = losses[step], undisturbed[step]
        if not math.isclose(loss, without, rel_tol=TOLERANCE):
            return (
                f"step {step}: its loss is {loss!r}, and {without!r} in the undisturbed run ({loss / without - 1:.1e})"
            )
    return None


def real_time(shown: float, now: float) -> float:
    """Return when a clock showed `shown` that jumps by whole days, for a time within half a day of `now`."""
    return now + (shown - now + DAY_S / 2) % DAY_S - DAY_S / 2
