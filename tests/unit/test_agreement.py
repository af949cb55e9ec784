"""Agreement of the ranks before a step: shares that rotate, and the filling of a last step."""

from collections import Counter

import numpy as np
import pytest

from betakd_ray.train.agreement import Proposal, StepCounts, TokenCounts, allot, shares


@pytest.mark.parametrize("ranks", range(1, 17))
@pytest.mark.parametrize("batch", [16, 100, 128])
def test_any_number_of_ranks_divides_any_batch_and_over_time_all_have_the_same(batch: int, ranks: int) -> None:
    total = Counter()
    for step in range(1, 200):
        parts = shares(batch, ranks, step)
        assert sum(parts) == batch
        assert max(parts) - min(parts) <= 1
        total.update(dict(enumerate(parts)))
        assert max(total.values()) - min(total.values()) <= 1  # at every step, so that nobody's rows run out early


def test_a_step_is_filled_evenly_by_those_who_have_samples_left() -> None:
    assert allot(0, [3, 1]) == [0, 0]
    assert allot(6, [9, 0, 9, 1]) == [3, 0, 2, 1]
    assert allot(7, [1, 9, 2]) == [1, 4, 2]
    assert allot(5, [2, 2]) is None


def test_the_counts_of_a_step_are_those_of_all_ranks() -> None:
    one = Proposal(taken=4, valid=3, micro_batches=2, squares=5, pixels=1, tokens=TokenCounts(10, 4, 6, 1))
    other = Proposal(taken=4, valid=4, micro_batches=1, squares=7, pixels=2, tokens=TokenCounts(20, 8, 3, 0), save=True)
    counts = StepCounts.of(np.stack([one.vector(), other.vector()]))
    assert counts == StepCounts(7, 1, 4, 2, 12, 3, TokenCounts(30, 12, 9, 1), save=True)
    assert counts.tokens.real == 51
