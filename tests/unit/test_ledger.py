"""The ledger: each sample counts once, in whatever order samples are reported."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from betakd_ray.data.ledger import Ledger, SampleIds
from betakd_ray.errors import SampleRepeated

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
    ledger.add(ids((0, 1, 4), (1, 1, 0), (0, 0, 2)))
    assert ledger.done(0, 1).tolist() == [False] * 4 + [True]
    assert ledger.done(1, 1).tolist() == [True] + [False] * 4
    assert ledger.done(0, 0).tolist() == [False, False, True]
    assert ledger.count == 3


def test_nothing_added_is_nothing_done():
    ledger = Ledger(SIZES)
    ledger.add(ids())
    assert ledger.count == 0


@pytest.mark.parametrize(
    "again", [((0, 1, 4),), ((0, 1, 3), (0, 1, 4)), ((1, 1, 4), (1, 1, 4)), ((0, 2, 0), (0, 2, 0))]
)
def test_a_sample_that_is_done_a_second_time_is_an_error_that_names_it_and_adds_nothing(again):
    ledger = Ledger(SIZES)
    ledger.add(ids((0, 1, 4)))
    epoch, shard, index = again[-1]
    with pytest.raises(SampleRepeated, match=rf"sample {index} of shard {shard} .* in epoch {epoch} is done a second"):
        ledger.add(ids(*again))
    assert ledger.count == 1


def test_what_is_only_left_out_may_be_done_already():
    ledger = Ledger(SIZES)
    ledger.add(ids((0, 1, 4)))
    ledger.include(ids((0, 1, 4), (0, 2, 0)))
    assert ledger.count == 2


def test_a_delta_that_repeats_a_sample_is_an_error_and_adds_nothing():
    whole = [(0, 0, 0), (0, 1, 1), (0, 2, 0)]
    for delta in ([(0, 0, 0)], [(0, 0, 0), (0, 0, 1), (0, 0, 2)], [(1, 0, 1), (0, 2, 0)]):
        ledger, other = Ledger(SIZES), Ledger(SIZES)
        ledger.add(ids(*whole))
        other.add(ids(*delta))
        before = state(ledger)
        for merge in (
            lambda into=ledger, of=other: into.merge(of),
            lambda i=ledger, of=other: i.merge_delta(of.delta_to_json()),
        ):
            with pytest.raises(SampleRepeated):
                merge()
        assert state(ledger) == before
        with pytest.raises(SampleRepeated):
            other.merge(ledger)


def test_deltas_are_merged_into_the_whole_and_cost_little():
    whole = shuffled(200_000, 1000, 100_000, 300, seed=3)
    before, delta = whole.count, Ledger(whole.sizes)
    open_shards = [shard for shard in range(2000) if not whole.done(1, shard).any()]
    for shard in open_shards[:50]:
        index = np.arange(7, dtype=np.int32)
        delta.add(SampleIds(np.ones_like(index), np.full_like(index, shard), index))
    text = delta.delta_to_json()
    assert len(text) < 4000
    whole.merge_delta(text)
    assert whole.count == before + 350
    with pytest.raises(ValueError, match="another plan"):
        Ledger(SIZES).merge_delta(text)


def test_a_ledger_is_pickled_as_a_few_arrays_and_comes_back():
    ledger = shuffled(4000, 1000, 2000, 300, seed=1)
    buffers = []
    data = pickle.dumps(ledger, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) < 8
    assert pickle.loads(data, buffers=buffers).to_json() == ledger.to_json()


def test_a_shard_is_complete_with_its_last_sample_and_repeats_are_still_errors():
    ledger = Ledger(SIZES)
    ledger.add(ids((0, 0, 0), (0, 0, 1)))
    assert not ledger.is_complete(0, 0)
    ledger.add(ids((0, 0, 2)))
    assert ledger.is_complete(0, 0)
    assert not ledger.is_complete(1, 0)
    assert ledger.done(0, 0).all()
    with pytest.raises(SampleRepeated):
        ledger.add(ids((0, 0, 1)))
    assert ledger.count == 3


@pytest.mark.parametrize("place", [(0, 0, 3), (0, 3, 0)])
def test_a_sample_outside_the_plan_is_refused(place):
    with pytest.raises(IndexError):
        Ledger(SIZES).add(ids(place))


def test_only_the_samples_that_are_done_are_held():
    ledger = Ledger(SIZES)
    ledger.add(ids((1, 1, 4), (0, 2, 0)))
    assert ledger.holds(ids((0, 2, 0), (1, 1, 3), (1, 1, 4), (0, 1, 4), (1, 2, 0))).tolist() == [1, 0, 1, 0, 0]
    assert ledger.holds(ids()).tolist() == []


def test_ledgers_of_different_plans_are_not_merged():
    with pytest.raises(ValueError, match="different plans"):
        Ledger(SIZES).merge(Ledger([3, 5, 2]))


def shuffled(shards, size, finished, in_flight, seed):
    """Return a ledger inside a shuffled epoch: `finished` shards in the plan's order, and half of each next one."""
    rng = np.random.default_rng(seed)
    ledger = Ledger([size] * shards)
    order = rng.permutation(shards)
    for shard in order[:finished]:
        ledger.add(ids_of_shard(shard, np.arange(size)))
    for shard in order[finished : finished + in_flight]:
        ledger.add(ids_of_shard(shard, rng.permutation(size)[: size // 2]))
    return ledger


def ids_of_shard(shard, indexes):
    index = indexes.astype(np.int32)
    return SampleIds(np.zeros_like(index), np.full_like(index, shard), index)


def test_a_large_ledger_is_no_longer_than_its_bits_in_base64():
    shards, size, in_flight = 4000, 10_000, 300
    ledger = shuffled(shards, size, 2000, in_flight, seed=1)
    text = ledger.to_json()
    bound = 4 / 3 * (shards / 8 + in_flight * (size / 8 + 8)) + 500  # 8: where it is; 500: sizes, names, headers
    assert bound == pytest.approx(504_000, abs=1000)
    assert 500_000 < len(text) < bound  # and it is near: random bits do not deflate
    again = Ledger.from_json(text)
    assert again.count == ledger.count == 2000 * size + in_flight * size // 2
    assert again.to_json() == text


def test_a_finished_shard_costs_less_than_a_quarter_of_a_byte_and_a_finished_epoch_a_few_bytes():
    empty, half, full = (len(shuffled(4000, 10, finished, 0, seed=1).to_json()) for finished in (0, 2000, 4000))
    assert empty < 400
    assert half - empty < 4000 / 4
    assert full - empty < 50


def test_a_shard_that_lacks_a_few_samples_costs_bytes_for_these_only():
    ledger = Ledger([10_000] * 100)
    for shard in range(100):
        ledger.add(ids_of_shard(shard, np.random.default_rng(shard).permutation(10_000)[10:]))
    assert len(ledger.to_json()) < 100 * 80


def test_large_ledgers_merge_into_their_union():
    ledger, other = (Ledger([1000] * 4000) for _ in range(2))
    rng = np.random.default_rng(1)
    for shard in range(4000):
        owner = [(0, 2000), (1, 2000), (0, 500), (1, 500)][int(rng.integers(4))]
        cut = rng.permutation(1000)
        (ledger, other)[owner[0]].add(ids_of_shard(shard, cut[: min(1000, owner[1])]))
        if owner[1] == 500:
            (other, ledger)[owner[0]].add(ids_of_shard(shard, cut[500 : 500 + 500 * (shard % 2)]))
    both = {shard: ledger.done(0, shard) | other.done(0, shard) for shard in range(4000)}
    ledger.merge(other)
    assert all(np.array_equal(ledger.done(0, shard), done) for shard, done in both.items())
    assert [ledger.is_complete(0, shard) for shard in range(4000)] == [bool(done.all()) for done in both.values()]
    assert ledger.counts(1).tolist() == [[int(done.sum()) for done in both.values()]]
    assert ledger.count == ledger.counts(1).sum()


places = st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 4)).filter(lambda p: p[2] < SIZES[p[1]])


@given(st.lists(places, unique=True))
def test_json_keeps_everything(done):
    ledger = Ledger(SIZES)
    ledger.add(ids(*done))
    again = Ledger.from_json(ledger.to_json())
    assert again.to_json() == ledger.to_json()
    assert state(again) == state(ledger)
    assert again.count == ledger.count == len(set(done))


@given(st.lists(places, unique=True), st.integers(0, 20))
def test_merging_is_the_union_and_leaves_the_other_as_it_was(done, cut):
    first, second = done[:cut], done[cut:]
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
        ledger.add(ids(*data.draw(st.permutations(mine))))
        ledgers.append(ledger)
    assert sum(ledger.count for ledger in ledgers) == len(plan)
    whole = Ledger(SIZES)
    for ledger in data.draw(st.permutations(ledgers)):
        whole.merge(Ledger.from_json(ledger.to_json()))
    assert whole.count == len(plan)
    assert all(whole.is_complete(e, s) for e in range(2) for s in range(len(SIZES)))
    for place in plan:
        with pytest.raises(SampleRepeated):
            whole.add(ids(place))
