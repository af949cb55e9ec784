"""The ledger: what is done is done once, whatever the order in which it is said."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from betakd_ray.data.collate import SampleIds
from betakd_ray.data.ledger import Ledger

SIZES = [3, 5, 1]


def ids(*places):
    columns = np.array(places, dtype=np.int32).reshape(-1, 3).T
    return SampleIds(*columns)


def state(ledger, epochs=2):
    return {(e, s): ledger.done(e, s).tolist() for e in range(epochs) for s in range(len(ledger.sizes))}


def test_a_new_ledger_is_empty():
    ledger = Ledger(SIZES)
    assert ledger.count == 0
    assert not ledger.done(0, 1).any()
    assert not ledger.is_complete(0, 1)


def test_added_samples_are_done_and_no_others():
    ledger = Ledger(SIZES)
    assert ledger.add(ids((0, 1, 4), (1, 1, 0), (0, 0, 2))) == 0
    assert ledger.done(0, 1).tolist() == [False] * 4 + [True]
    assert ledger.done(1, 1).tolist() == [True] + [False] * 4
    assert ledger.done(0, 0).tolist() == [False, False, True]
    assert ledger.count == 3


def test_nothing_added_is_nothing_done():
    ledger = Ledger(SIZES)
    assert ledger.add(ids()) == 0
    assert ledger.count == 0


def test_repeated_samples_are_counted_in_a_batch_and_between_batches():
    ledger = Ledger(SIZES)
    assert ledger.add(ids((0, 1, 4), (0, 1, 4), (0, 1, 3))) == 1
    assert ledger.add(ids((0, 1, 4), (0, 1, 2))) == 1
    assert ledger.count == 3


def test_a_shard_is_complete_with_its_last_sample_and_repeats_are_still_seen():
    ledger = Ledger(SIZES)
    ledger.add(ids((0, 0, 0), (0, 0, 1)))
    assert not ledger.is_complete(0, 0)
    ledger.add(ids((0, 0, 2)))
    assert ledger.is_complete(0, 0)
    assert not ledger.is_complete(1, 0)
    assert ledger.done(0, 0).all()
    assert ledger.add(ids((0, 0, 1))) == 1
    assert ledger.count == 3


@pytest.mark.parametrize("place", [(0, 0, 3), (0, 3, 0)])
def test_a_sample_outside_the_plan_is_refused(place):
    with pytest.raises(IndexError):
        Ledger(SIZES).add(ids(place))


places = st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 4)).filter(lambda p: p[2] < SIZES[p[1]])


@given(st.lists(places))
def test_json_keeps_everything(done):
    ledger = Ledger(SIZES)
    ledger.add(ids(*done))
    again = Ledger.from_json(ledger.to_json())
    assert again.to_json() == ledger.to_json()
    assert state(again) == state(ledger)
    assert again.count == ledger.count == len(set(done))


@given(st.lists(places), st.lists(places))
def test_merging_is_the_union_and_leaves_the_other_as_it_was(first, second):
    ledger, other, both = Ledger(SIZES), Ledger(SIZES), Ledger(SIZES)
    ledger.add(ids(*first))
    other.add(ids(*second))
    both.add(ids(*first, *second))
    before = state(other)
    ledger.merge(other)
    assert state(ledger) == state(both)
    assert state(other) == before


@given(st.data())
def test_any_split_of_the_plan_merged_in_any_order_is_everything_exactly_once(data):
    plan = [(e, s, i) for e in range(2) for s, size in enumerate(SIZES) for i in range(size)]
    parts = data.draw(st.integers(1, 4))
    owners = data.draw(st.lists(st.integers(0, parts - 1), min_size=len(plan), max_size=len(plan)))
    ledgers = []
    for part in range(parts):
        ledger = Ledger(SIZES)
        mine = [place for place, owner in zip(plan, owners, strict=True) if owner == part]
        assert ledger.add(ids(*data.draw(st.permutations(mine)))) == 0
        ledgers.append(ledger)
    assert sum(ledger.count for ledger in ledgers) == len(plan)
    whole = Ledger(SIZES)
    for ledger in data.draw(st.permutations(ledgers)):
        whole.merge(Ledger.from_json(ledger.to_json()))
    assert whole.count == len(plan)
    assert all(whole.is_complete(e, s) for e in range(2) for s in range(len(SIZES)))
    assert whole.add(ids(*plan)) == len(plan)
