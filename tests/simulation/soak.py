"""Run many schedules: `python -m tests.simulation.soak --first 0 --count 1000`.

A seed gives two schedules, one of a run and one of teachers and their clients. The soak ends at the first seed that
breaks an invariant, and prints its trace. The same seed gives the same trace again.
Without pytest, which checks the types of every call, a schedule takes a third of the time.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product, zip_longest

import pytest

from tests.simulation.patches import RUN, TEACHERS, patched
from tests.simulation.planted import PLANTED
from tests.simulation.planted_teachers import PLANTED_TEACHERS
from tests.simulation.scheduler import Violation

CHUNK = 250
"""Number of schedules that a process runs at a time."""
FOUND_AT = {
    "by_step": 23,
    "another_checkpoint_loaded": 642,
    "begun_folders_pruned": 707,
    "manifest_without_digest": 318,
    "hanging_drain_awaited": 1026,
    "search_keeps_its_teacher": 55,
    "silent_head_awaited": 914,
}
"""First seed to try for a planted bug, if it is not one of the first seeds that find it."""
RARE = {"damaged_spec_refused", "lease_overwritten"}
"""Planted bugs that thousands of schedules do not show, so that only `make slow` looks for them."""
MOST = 4000
"""Number of seeds in which every other planted bug must be found."""
MOST_RARE = 40_000
"""Number of seeds in which every rare one must be found."""


def first_violation(seeds: range, bug: str | None = None) -> str | None:
    """Return what the first of these seeds breaks, with its trace; None if none does."""
    kinds = (RUN, TEACHERS) if bug is None else (RUN if bug in PLANTED else TEACHERS,)
    with patched() as run, pytest.MonkeyPatch.context() as patch:
        if bug:
            (PLANTED | PLANTED_TEACHERS)[bug](patch)
        for seed in seeds:
            try:
                for kind in kinds:
                    run(seed, kind)
            except Violation as error:
                return str(error)
    return None


def first_unrepeatable(seeds: range) -> str | None:
    """Return the first line in which two runs of the same seed differ; None if none does."""
    with patched() as run:
        for seed, kind in product(seeds, (RUN, TEACHERS)):
            one, two = (run(seed, kind).scheduler.trace for _ in range(2))
            for lines in zip_longest(one, two):
                if lines[0] != lines[1]:
                    return f"seed {seed}, {kind}: {lines[0]!r}, then {lines[1]!r}"
    return None


def planted(bug: str) -> str | None:
    """Return what a planted bug breaks in the first seed that breaks anything; None if none of many does."""
    first = FOUND_AT.get(bug, 0)
    return first_violation(range(first, first + MOST), bug)


def soak(first: int, count: int, processes: int) -> str | None:
    """Return what the first seed that is found to break an invariant breaks; None if none of `count` does."""
    begun, done = time.monotonic(), 0
    chunks = [range(at, min(at + CHUNK, first + count)) for at in range(first, first + count, CHUNK)]
    with ProcessPoolExecutor(processes) as pool:
        running = {pool.submit(first_violation, seeds): seeds for seeds in chunks}
        for future in as_completed(running):
            if found := future.result():
                pool.shutdown(wait=False, cancel_futures=True)
                return found
            done += len(running[future])
            seconds = time.monotonic() - begun
            print(f"{done} of {count} schedules, {done / seconds:.0f} a second", file=sys.stderr, flush=True)
    return None


def main() -> int:
    """Print the first violation; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1000, help="number of seeds")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--bug", choices=sorted(PLANTED | PLANTED_TEACHERS), help="a bug to plant before")
    parser.add_argument("--planted", action="store_true", help="plant each bug, and print as JSON what it breaks")
    parser.add_argument("--repeat", action="store_true", help="run each seed twice, and compare the traces")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.count)
    if options.planted:
        print(json.dumps({bug: planted(bug) for bug in (PLANTED | PLANTED_TEACHERS).keys() - RARE}))
        return 0
    if options.repeat:
        found = first_unrepeatable(seeds)
    elif options.bug or options.processes == 1:
        found = first_violation(seeds, options.bug)
    else:
        found = soak(options.first, options.count, options.processes)
    if found:
        print(found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
