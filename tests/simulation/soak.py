"""Run many schedules: `python -m tests.simulation.soak --first 0 --count 1000`.

It ends at the first seed that breaks an invariant, and prints its trace. The same seed gives the same trace again.
Without pytest, which checks the types of every call, a schedule takes a third of the time.
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import pytest

from tests.simulation.patches import patched
from tests.simulation.planted import PLANTED
from tests.simulation.scheduler import Violation

CHUNK = 250
"""Number of schedules that a process runs at a time."""


def first_violation(seeds: range, bug: str | None = None) -> str | None:
    """Return what the first of these seeds breaks, with its trace; None if none does."""
    with patched() as run, pytest.MonkeyPatch.context() as patch:
        if bug:
            PLANTED[bug](patch)
        for seed in seeds:
            try:
                run(seed)
            except Violation as error:
                return str(error)
    return None


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
    parser.add_argument("--bug", choices=sorted(PLANTED), help="a bug to plant before")
    options = parser.parse_args()
    if options.bug or options.processes == 1:
        found = first_violation(range(options.first, options.first + options.count), options.bug)
    else:
        found = soak(options.first, options.count, options.processes)
    if found:
        print(found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
