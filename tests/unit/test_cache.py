"""The teacher's cache: what is read is what the teacher said, and never what another one said."""

import dataclasses

import numpy as np
import pytest
import torch

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.data.ledger import SampleIds
from betakd_ray.data.plan import Plan
from betakd_ray.data.rows import Batch
from betakd_ray.data.shards import Shard
from betakd_ray.errors import TeacherError
from betakd_ray.spec import CacheSpec, TeacherSpec
from betakd_ray.teacher.cache import CacheWriter, SignalCache, joined, split
from betakd_ray.teacher.client import TeacherClient, scored
from betakd_ray.teacher.signal import Needs, Signal, TeacherFacts, Wire

SHARDS = [Shard("/data/a-0.tar", 10, 999, "aa"), Shard("/data/a-1.tar", 10, 999, "bb")]
PLAN = Plan(tuple(SHARDS), epochs=2, seed=0, shuffle=False)
ROWS, TOKENS = [2, 1, 3], [2, 0, 4]
"""Answer rows and image tokens of three samples, the second text-only."""
ALL = Needs(hidden=True, visual=True, visual_layer=3, features=("teacher_vision", "teacher_entropy"))


def inputs() -> ModelInputs:
    shape = (3, 8)
    row_sample = np.repeat(np.arange(3), ROWS)
    return ModelInputs(
        input_ids=np.zeros(shape, np.int64),
        attention_mask=np.ones(shape, np.int64),
        images={},
        image_rows={},
        answer_rows=np.arange(sum(ROWS)),
        row_sample=row_sample,
        targets=np.zeros(sum(ROWS), np.int64),
        visual_sample=np.repeat(np.arange(3), TOKENS),
        visual_position=np.concatenate([np.arange(count) for count in TOKENS]),
    )


def signal(valid=(True, True, True)) -> Signal:
    generator = torch.Generator().manual_seed(0)
    return Signal(
        valid=np.array(valid),
        hidden=Wire.of(torch.randn(sum(ROWS), 5, generator=generator).bfloat16()),
        visual=Wire.of(torch.randn(sum(TOKENS), 5, generator=generator)),
        visual_layer=Wire.of(torch.randn(sum(TOKENS), 5, generator=generator)),
        features={
            "teacher_vision": torch.randn(3, 5, generator=generator).numpy(),
            "teacher_entropy": torch.randn(3, 2, generator=generator).numpy(),
        },
    )


def ids(*indexes, shard=0) -> SampleIds:
    count = len(indexes)
    return SampleIds(np.zeros(count, np.int32), np.full(count, shard, np.int32), np.array(indexes, np.int32))


def facts(fingerprint="weights") -> TeacherFacts:
    return TeacherFacts(Wire.of(torch.zeros(2, 2)), visual_size=5, heads=2, feature_sizes={}, fingerprint=fingerprint)


def cache(folder, *, needs=ALL, view="view", fingerprint="weights", **teacher) -> SignalCache:
    spec = TeacherSpec(path="org/teacher", cache=str(folder), **teacher)  # type: ignore[arg-type]
    found = SignalCache.of(spec, facts(fingerprint), view, needs)
    assert found is not None
    return found


def assert_same(actual: Signal, expected: Signal) -> None:
    cpu = torch.device("cpu")
    assert actual.valid.tolist() == expected.valid.tolist()
    for name in ("hidden", "visual", "visual_layer"):
        one, other = getattr(actual, name), getattr(expected, name)
        assert one is not None
        assert other is not None
        assert one.dtype == other.dtype
        assert torch.equal(one.tensor(cpu), other.tensor(cpu))
    assert actual.features.keys() == expected.features.keys()
    for name, values in actual.features.items():
        assert np.array_equal(values, expected.features[name])


def test_a_signal_comes_back_as_it_was_sample_by_sample_and_bf16_too():
    parts = split(signal(), inputs())
    assert_same(joined([part for part in parts if part], inputs(), ALL), signal())


def test_a_sample_whose_answer_is_not_valid_is_not_kept():
    assert [part is None for part in split(signal(valid=(True, False, True)), inputs())] == [False, True, False]


def test_a_top_k_signal_comes_back_too():
    top = Signal(
        valid=np.array([True] * 3),
        top_ids=Wire.of(torch.randint(9, (sum(ROWS), 4), dtype=torch.int32)),
        top_log_probs=Wire.of(torch.randn(sum(ROWS), 5)),
    )
    back = joined([part for part in split(top, inputs()) if part], inputs(), Needs(top_k=4, vocab=9))
    assert back.hidden is None
    assert back.top_ids
    assert back.top_log_probs
    assert np.array_equal(back.top_ids.array, top.top_ids.array)
    assert np.array_equal(back.top_log_probs.array, top.top_log_probs.array)


def test_samples_that_were_kept_apart_and_with_more_than_is_needed_make_one_batch():
    """The text-only one was answered in a batch of its own, which has nothing on image tokens."""
    whole = [part for part in split(signal(), inputs()) if part]
    hidden = signal().hidden
    assert hidden
    text_only = Signal(
        valid=np.array([True]),
        hidden=Wire(hidden.array[2:3], hidden.dtype),
        features={name: values[1:2] for name, values in signal().features.items()},
    )
    alone = dataclasses.replace(
        inputs(),
        input_ids=np.zeros((1, 8), np.int64),
        row_sample=np.zeros(1, np.int64),
        targets=np.zeros(1, np.int64),
        visual_sample=np.zeros(0, np.int64),
    )
    (apart,) = split(text_only, alone)
    assert apart
    assert_same(joined([whole[0], apart, whole[2]], inputs(), ALL), signal())
    less = joined([whole[0], apart, whole[2]], inputs(), Needs(hidden=True, features=("teacher_entropy",)))
    assert less.visual is None
    assert list(less.features) == ["teacher_entropy"]


def test_what_does_not_fit_the_samples_is_an_error():
    parts = [part for part in split(signal(), inputs()) if part]
    with pytest.raises(TeacherError, match=r"teacher\.cache"):
        joined(parts[::-1][:2], inputs(), ALL)


def test_what_is_written_is_read_by_shard_and_index(tmp_path):
    writer = CacheWriter(cache(tmp_path), PLAN)
    writer.add(ids(4, 7, 1), inputs(), signal())
    writer.add(ids(0, 9, 2, shard=1), inputs(), signal(valid=(True, False, True)))
    writer.flush()
    writer.add(ids(4, 5, 6), inputs(), signal())  # 4 once more, as after a restart
    writer.flush()
    known = cache(tmp_path).read(SHARDS[0])
    assert sorted(known) == [1, 4, 5, 6, 7]
    assert_same(joined([known[4], known[7], known[1]], inputs(), ALL), signal())
    assert sorted(cache(tmp_path).read(SHARDS[1])) == [0, 2]


@pytest.mark.parametrize(
    "other",
    [
        {"fingerprint": "other weights"},
        {"view": "another template or image size"},
        {"attn_implementation": "eager"},
    ],
)
def test_another_teacher_template_or_image_size_is_never_a_hit(tmp_path, other):
    cache(tmp_path).write(SHARDS[0], {3: b"signal"})
    assert cache(tmp_path).read(SHARDS[0]) == {3: b"signal"}
    assert cache(tmp_path, **other).read(SHARDS[0]) == {}


@pytest.mark.parametrize("change", [{"checksum": "cc"}, {"bytes": 998}, {"samples": 11}])
def test_a_shard_whose_content_changed_is_never_a_hit(tmp_path, change):
    cache(tmp_path).write(SHARDS[0], {3: b"signal"})
    assert cache(tmp_path).read(dataclasses.replace(SHARDS[0], **change)) == {}


def test_a_job_is_served_by_any_that_kept_at_least_what_it_needs(tmp_path):
    more = Needs(hidden=True, visual=True, features=("teacher_vision",))
    less = Needs(hidden=True)
    cache(tmp_path, needs=more).write(SHARDS[0], {1: b"more"})
    cache(tmp_path, needs=less).write(SHARDS[0], {2: b"less"})
    assert cache(tmp_path, needs=less).read(SHARDS[0]) == {1: b"more", 2: b"less"}
    assert cache(tmp_path, needs=more).read(SHARDS[0]) == {1: b"more"}


def test_a_part_that_was_never_finished_is_not_read(tmp_path):
    store = cache(tmp_path)
    store.write(SHARDS[0], {1: b"whole"})
    (part,) = tmp_path.rglob("*.arrow")
    part.with_name("half.arrow.partial").write_bytes(part.read_bytes()[:20])
    assert store.read(SHARDS[0]) == {1: b"whole"}


def test_a_write_that_fails_is_not_silent(tmp_path):
    store = dataclasses.replace(cache(tmp_path), location=CacheSpec(path="/proc/nowhere"))
    writer = CacheWriter(store, PLAN)
    writer.add(ids(1, 2, 3), inputs(), signal())
    with pytest.raises(OSError, match="nowhere"):
        writer.flush()


class Client(TeacherClient):
    """A teacher that counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def submit(self, _inputs):
        self.asked += 1
        return "request"

    def result(self, _request):
        return signal()


def test_only_what_is_not_known_is_asked_and_that_is_kept(tmp_path):
    writer = CacheWriter(cache(tmp_path), PLAN)
    known = [part for part in split(signal(), inputs()) if part]
    batches = [
        Batch(inputs(), inputs(), ids(0, 1, 2), [], known),
        Batch(inputs(), inputs(), ids(3, 4, 5), [], None),
        Batch(inputs(), inputs(), ids(6, 7, 8), [], known),
    ]
    client = Client()
    answered = list(scored(iter(batches), client, window=1, needs=ALL, cache=writer))
    assert [batch.ids.index.tolist() for batch, _ in answered] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    for _, one in answered:
        assert_same(one, signal())
    assert client.asked == 1
    writer.flush()
    assert sorted(cache(tmp_path).read(SHARDS[0])) == [3, 4, 5]


def test_a_sample_that_comes_again_before_its_answer_could_be_read_is_not_asked_again(tmp_path, monkeypatch):
    batches = [Batch(inputs(), inputs(), ids(*indexes), [], None) for indexes in ([0, 1, 2], [3, 4, 5]) * 2]
    asked = []
    for kept in (1 << 20, 100):
        monkeypatch.setattr("betakd_ray.teacher.cache.KEPT_BYTES", kept)
        client, writer = Client(), CacheWriter(cache(tmp_path), PLAN)
        answered = list(scored(iter(batches), client, window=1, needs=ALL, cache=writer))
        for _, one in answered:
            assert_same(one, signal())
        asked.append(client.asked)
    assert asked == [2, 4]
