"""Micro-batches and teacher's groups are cut by length."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from betakd_ray.batch.packing import BATCH_COST, cut

lengths = st.lists(st.integers(1, 900), max_size=60)


@given(lengths, st.none() | st.integers(1, 9), st.none() | st.integers(1, 2000))
def test_every_sample_is_in_one_batch_and_no_batch_is_above_its_limits(
    lengths: list[int], most: int | None, tokens: int | None
) -> None:
    batches = cut(lengths, most, tokens)
    assert sorted(at for batch in batches for at in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[at] for at in batch)
        assert most is None or len(batch) <= most
        assert tokens is None or len(batch) == 1 or longest * len(batch) <= tokens
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts == sorted(firsts, reverse=True)  # so that memory's peak comes first


@given(st.lists(st.integers(1, 900), max_size=9), st.integers(1, 2000))
def test_no_other_cut_costs_less(lengths: list[int], tokens: int) -> None:
    def cost(batches: list[list[int]]) -> int:
        return sum(BATCH_COST + max(lengths[at] for at in batch) * len(batch) for batch in batches)

    ordered = sorted(range(len(lengths)), key=lambda at: -lengths[at])
    cheapest = 0 if not lengths else 10**9
    for marks in product([False, True], repeat=max(0, len(ordered) - 1)):
        ends = [at + 1 for at, mark in enumerate(marks) if mark]
        batches = [ordered[a:b] for a, b in zip([0, *ends], [*ends, len(ordered)], strict=True) if lengths]
        if all(len(batch) == 1 or lengths[batch[0]] * len(batch) <= tokens for batch in batches):
            cheapest = min(cheapest, cost(batches))
    assert cost(cut(lengths, max_tokens=tokens)) == cheapest


def test_without_limits_there_is_one_batch() -> None:
    assert cut([3, 9, 5]) == [[1, 2, 0]]
    assert cut([]) == []


@pytest.mark.parametrize("share", [64, 128, 512])
def test_little_of_an_instruction_mix_is_padding(share: int) -> None:
    rng = np.random.default_rng(0)
    drawn = np.exp(rng.normal(5.2, 0.8, 20_000)).astype(int)
    mix = drawn[(drawn >= 40) & (drawn <= 900)].tolist()
    real = padded = before = 0
    for start in range(0, len(mix) - share, share):
        part = mix[start : start + share]
        real += sum(part)
        padded += sum(max(part[at] for at in batch) * len(batch) for batch in cut(part, max_tokens=2048))
        before += sum(max(part[at : at + 8]) * len(part[at : at + 8]) for at in range(0, share, 8))
    assert 1 - real / before > 0.35  # random micro-batches of eight
    assert 1 - real / padded < (0.055 if share == 64 else 0.05)
