"""The plan: every pass once an epoch, in groups, whatever the number of shards; parts that come round."""

import pickle
import time

import numpy as np
import pytest
import ray

from betakd_ray.data.ledger import SampleIds
from betakd_ray.data.mixture import find_passes, passes_of
from betakd_ray.data.plan import MAX_TASKS, Pass, Plan
from betakd_ray.data.shards import Shard
from betakd_ray.errors import DataError, SpecError
from betakd_ray.on_ray.stream import PlanSource, _groups
from betakd_ray.spec import DataSpec, EvaluationSpec, parse_spec
from tests.tars import good, tar_bytes, written


def shards(count, samples=10):
    return [Shard(f"/data/{number:06}.tar", samples, 100, f"{number:08x}") for number in range(count)]


def plan_of(count, epochs=1, samples=10, shuffle=True, weight=1.0):
    return Plan.of(passes_of(shards(count, samples), weight), epochs, seed=1, shuffle=shuffle)


@pytest.mark.parametrize(
    ("count", "epochs", "groups"),
    [
        (1, 1, 1),
        (2, 3, 1),
        (4, 1, 2),
        (8, 1, 4),
        (20, 1, 4),
        (32, 1, 4),
        (665, 1, 83),
        (3000, 3, 375),
        (200_000, 10, 400),
    ],
)
def test_groups_are_few_enough_for_the_driver_and_enough_to_be_read_side_by_side(count, epochs, groups):
    plan = plan_of(count, epochs)
    assert plan.groups == groups
    assert plan.groups * epochs <= MAX_TASKS
    bounds = plan.bounds()
    assert (bounds[0], bounds[-1]) == (0, count)
    assert np.ptp(np.diff(bounds)) <= 1


def test_every_epoch_has_every_pass_once_in_an_order_of_its_own():
    plan = plan_of(50, epochs=3)
    orders = [plan.order(epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert plan_of(50, shuffle=False).order(0).tolist() == list(range(50))


def test_groups_that_are_done_are_left_out_and_the_open_samples_of_the_others_counted():
    plan = plan_of(8, epochs=2)  # four groups of two an epoch
    ledger = plan.empty_ledger()
    done = plan.order(0)[:3].tolist()
    for shard in done:
        index = np.arange(10, dtype=np.int32)
        ledger.add(SampleIds(np.zeros_like(index), np.full_like(index, shard), index))
    first = _groups(plan, ledger)[:2].tolist()
    assert first == [[0, 2, 4, 10], [0, 4, 6, 20]]
    assert len(_groups(plan, ledger)) == 7


def test_two_million_passes_over_ten_epochs_are_planned_in_seconds():
    plan = plan_of(200_000, epochs=10, samples=1000)
    ledger = plan.empty_ledger()
    for epoch in range(5):
        ledger._completed(epoch)[:] = True
    start = time.perf_counter()
    again = pickle.loads(pickle.dumps(plan))
    assert len(_groups(again, ledger)) == 5 * 400
    assert time.perf_counter() - start < 10
    assert again == plan


# ------------------------------------------------------------------------------------------------ weights


def test_a_weight_is_whole_passes_and_a_part():
    plan = Plan.of(passes_of(shards(3, 8), 2.25), 4, seed=0, shuffle=True)
    assert plan.sizes.tolist() == [8] * 6 + [2] * 3
    assert plan.samples == 4 * 3 * 18
    assert plan.distinct == tuple(shards(3, 8))
    assert plan.repeats.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert plan.parts == ((6, 2), (7, 2), (8, 2))


@pytest.mark.parametrize(("weight", "samples", "planned"), [(0.5, 5, 3), (0.3, 10, 3), (0.01, 10, 1), (0.999, 10, 10)])
def test_a_part_is_rounded_and_has_a_sample_at_the_least(weight, samples, planned):
    assert [one.samples for one in passes_of(shards(1, samples), weight)] == [planned]


def test_over_as_many_epochs_as_a_part_goes_into_its_shard_each_sample_comes_once():
    plan = Plan.of([Pass(shards(1, 12)[0], 3)], 8, seed=5, shuffle=True)
    for begin in (0, 4):
        members = np.concatenate([plan.members(epoch, 0) for epoch in range(begin, begin + 4)])
        assert sorted(members.tolist()) == list(range(12))
    assert plan.members(0, 0).tolist() == sorted(plan.members(0, 0).tolist())
    assert plan.member(1, 0, 2) == plan.members(1, 0)[2]
    other = Plan.of([Pass(shards(1, 12)[0], 3)], 8, seed=6, shuffle=True)
    assert any(plan.members(epoch, 0).tolist() != other.members(epoch, 0).tolist() for epoch in range(4))


def test_a_part_that_does_not_divide_its_shard_comes_round_evenly():
    plan = Plan.of([Pass(shards(1, 10)[0], 3)], 20, seed=5, shuffle=True)
    counts = np.bincount(np.concatenate([plan.members(epoch, 0) for epoch in range(20)]), minlength=10)
    assert counts.tolist() == [6] * 10


def folder_of(tmp_path, name, count):
    folder = tmp_path / name
    folder.mkdir()
    for number in range(count):
        members = [member for sample in range(4) for member in good(f"{sample}")]
        written(folder, tar_bytes(members), f"{number}.tar")
    return f"{folder}/*.tar"


def test_entries_of_data_train_are_mixed_by_their_weights(tmp_path):
    one, two = folder_of(tmp_path, "one", 2), folder_of(tmp_path, "two", 1)
    plain = DataSpec.model_validate({"train": [two, one]})
    assert [each.shard.url[-9:] for each in find_passes(plain)] == ["one/0.tar", "one/1.tar", "two/0.tar"]
    data = DataSpec.model_validate({"train": [{"path": two, "weight": 1.5}, one]})
    found = [(each.shard.url[-9:], each.samples) for each in find_passes(data)]
    assert found == [("two/0.tar", 4), ("two/0.tar", 2), ("one/0.tar", 4), ("one/1.tar", 4)]
    again = DataSpec.model_validate({"train": [{"path": one, "weight": 2}, f"{tmp_path}/one/1.tar"]})
    with pytest.raises(DataError, match=r"data\.train\.1: .*one/1\.tar is also in data\.train\.0.*larger weight"):
        find_passes(again)
    assert len(find_passes(DataSpec.model_validate({"train": [one, f"{tmp_path}/one/1.tar"]}))) == 2


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([{"path": "a.tar", "weight": 0}], r"data\.train\.0\.weight: .* greater than 0, got 0"),
        (["a.tar", {"path": "b.tar", "weigth": 2}], r"data\.train\.1\.weigth: no such field; did you mean 'weight'"),
        ([{"weight": 2}], r"data\.train\.0\.path: is missing"),
        ([], r"data\.train: "),
        ([3], r"data\.train\.0: "),
    ],
)
def test_a_wrong_entry_is_named(train, message):
    tree = {"name": "job", "data": {"train": train}, "student": {"init": {"kind": "checkpoint", "path": "org/s"}}}
    with pytest.raises(SpecError, match=message):
        parse_spec(tree)


def test_an_entry_without_a_weight_is_kept_as_it_was_written():
    data = DataSpec.model_validate({"train": ["/a.tar", {"path": "/b.tar", "weight": 2}, {"path": "/c.tar"}]})
    assert data.model_dump(mode="json")["train"] == ["/a.tar", {"path": "/b.tar", "weight": 2.0}, "/c.tar"]
    assert DataSpec.model_validate_json(data.model_dump_json()) == data


def test_questions_have_no_weight():
    tree = {"name": "e", "data": {"train": {"path": "/a.tar", "weight": 2}}, "models": {"m": {"path": "org/m"}}}
    with pytest.raises(SpecError, match=r"data\.train: /a\.tar has weight 2, but each question is asked once"):
        parse_spec(tree, EvaluationSpec)


# ------------------------------------------------------------------------------------------- blocks and tasks


@pytest.mark.parametrize(("samples", "workers", "rows"), [(10, 2, 3), (10, 100, 1), (100_000, 2, 256)])
def test_blocks_are_small_enough_for_every_rank_to_get_eight(monkeypatch, samples, workers, rows):
    monkeypatch.setattr("betakd_ray.on_ray.stream.ray.put", lambda _: ray.ObjectRef.from_random())
    plan = plan_of(4, samples=samples)
    source = PlanSource(ray.ObjectRef.from_random(), plan, plan.empty_ledger(), workers)
    assert source._block_rows == rows
    assert [task.metadata.num_rows for task in source.get_read_tasks(1)] == [2 * samples, 2 * samples]
