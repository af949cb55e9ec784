"""A run stays exact under every schedule of faults that a seed gives, in simulated time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.planted import PLANTED
from tests.simulation.planted_teachers import PLANTED_TEACHERS
from tests.simulation.soak import MOST_RARE, RARE

ROOT = Path(__file__).parents[2]
PARTS, SEEDS = 2, 400
"""Number of tests, and of seeds in each. `make simulate` runs as many as wanted."""


def soak(*options: str) -> str:
    """Return what `tests.simulation.soak` prints."""
    # In a process of its own: pytest's check of the types of every call takes twice the time of the schedules.
    command = [sys.executable, "-m", "tests.simulation.soak", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 or ended.stdout, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_stays_exact_and_no_answer_is_lost_under_any_schedule_of_faults(part: int) -> None:
    found = soak(f"--first={part * SEEDS}", f"--count={SEEDS}")
    assert not found, found


def test_a_seed_gives_the_same_schedule_again() -> None:
    found = soak("--count=5", "--repeat")
    assert not found, found


@pytest.fixture(scope="module")
def found() -> dict[str, str | None]:
    """Return what each planted bug breaks."""
    # All in one process, whose imports take longer than the schedules.
    return json.loads(soak("--planted"))


@pytest.mark.parametrize("bug", sorted((PLANTED | PLANTED_TEACHERS).keys() - RARE))
def test_a_planted_bug_is_found(bug: str, found: dict[str, str | None]) -> None:
    assert (found[bug] or "").startswith("seed ")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bug", sorted(RARE))
def test_a_rare_planted_bug_is_found(bug: str) -> None:
    assert soak(f"--count={MOST_RARE}", f"--bug={bug}").startswith("seed ")
