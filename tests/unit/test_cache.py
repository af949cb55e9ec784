"""The teacher's cache: what is read is what the teacher said, and never what another one said."""

import dataclasses
import errno
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from betakd_ray.batch.sample import Rendering, Sample
from betakd_ray.data.shards import Shard
from betakd_ray.errors import OutputError
from betakd_ray.spec import CacheSpec, StorageSpec, TeacherSpec
from betakd_ray.storage import open_store
from betakd_ray.teacher import cache as module
from betakd_ray.teacher.answers import Answer, empty_signal, to_wire
from betakd_ray.teacher.cache import CacheWriter, SignalCache
from betakd_ray.teacher.compare import differs
from betakd_ray.teacher.parts import Needs, Signal, TeacherFacts
from betakd_ray.teacher.signals import SignalSource
from tests.s3 import served

SHARDS = [Shard("/data/a-0.tar", 10, 999, "aa"), Shard("/data/a-1.tar", 10, 999, "bb")]
ALL = Needs(frozenset({"hidden", "visual", "visual_layer", "teacher_vision", "teacher_entropy"}), layer=3)
TOP_K = Needs(frozenset({"top_ids", "top_log_probs"}), top_k=4, vocab=9)
FACTS = TeacherFacts(width=5, heads=2, dtype="bfloat16", fingerprint="weights")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every index expire at once, and let no test use another test's index."""
    monkeypatch.setattr(module, "REFRESH_S", 0.0)
    module._index.cache_clear()


def signal(seed: int = 0, rows: int = 3, tokens: int = 4, needs: Needs = ALL) -> Signal:
    generator = torch.Generator().manual_seed(seed)
    found: Signal = {}
    for name, array in empty_signal(needs, FACTS, rows, tokens).items():
        values = torch.randn(array.shape, generator=generator)
        if name == "top_ids":
            found[name] = np.stack([np.random.default_rng(seed).permutation(9)[:4] for _ in array]).astype(np.int32)
        elif name == "top_log_probs":
            found[name] = values.log_softmax(-1).sort(-1, descending=True).values.numpy()
        else:
            found[name] = to_wire(values.bfloat16() if array.dtype == np.uint16 else values)
    return found


def cache(folder: object, *, needs=ALL, view="view", fingerprint="weights", **teacher) -> SignalCache:
    spec = TeacherSpec(path="org/teacher", cache=str(folder), **teacher)  # type: ignore[arg-type]
    found = SignalCache.of(spec, dataclasses.replace(FACTS, fingerprint=fingerprint), view, needs)
    assert found is not None
    return found


def write(store: SignalCache, *members: int, shard: Shard = SHARDS[0], signals=signal) -> None:
    writer = CacheWriter(store, keep=False)
    for member in members:
        writer.add(shard, member, signals(member))
    writer.close()


def assert_same(actual: Signal | None, expected: Signal | None) -> None:
    assert actual is not None
    assert expected is not None
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("needs", [ALL, TOP_K], ids=lambda needs: needs.tag)
def test_what_is_written_is_read_by_shard_and_member_whatever_it_was_written_with(tmp_path, needs):
    store = cache(tmp_path, needs=needs)
    text_only = signal(7, tokens=0, needs=needs)
    writer = CacheWriter(store, keep=False)
    writer.add(SHARDS[0], 4, signal(4, needs=needs))
    writer.add(SHARDS[1], 4, signal(14, rows=1, needs=needs))
    writer.add(SHARDS[0], 7, text_only)
    writer.flush()
    writer.add(SHARDS[0], 4, signal(4, needs=needs))  # once more, as after a restart
    writer.close()
    first, second = (cache(tmp_path, needs=needs).locate(shard) for shard in SHARDS)
    assert (sorted(first), sorted(second)) == ([4, 7], [4])
    found = store.fetch([first[7], second[4], first[4], first[7]])
    for one, expected in zip(found, (text_only, signal(14, rows=1, needs=needs), signal(4, needs=needs)), strict=False):
        assert_same(one, expected)
    assert "visual" not in (found[0] or ())
    assert_same(found[3], found[0])


def test_files_have_a_useful_size_whatever_a_signal_weighs_and_hold_samples_of_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILE_BYTES", 20_000)
    for name, rows, count in (("light", 1, 500), ("heavy", 400, 20)):
        store = cache(tmp_path / name, needs=Needs(frozenset({"hidden"})))
        writer = CacheWriter(store, keep=False)
        for number in range(count):
            shard = Shard(f"/data/{number % 7}.tar", 1000, 1, "aa")
            writer.add(shard, number, signal(number, rows=rows, needs=store.needs))
        writer.close()
        sizes = sorted(path.stat().st_size for path in (tmp_path / name).rglob("*.signals"))
        indexes = [path.stat().st_size for path in (tmp_path / name).rglob("*.index")]
        assert len(sizes) == len(indexes) > 2
        assert sizes[1] >= 20_000  # the smallest is the run's last
        located = [store.locate(Shard(f"/data/{number}.tar", 1000, 1, "aa")) for number in range(7)]
        assert sorted(member for each in located for member in each) == list(range(count))


def test_only_what_is_asked_for_is_read_and_neighbours_at_once(tmp_path, monkeypatch):
    store = cache(tmp_path)
    write(store, *range(8))
    places = store.locate(SHARDS[0])
    filesystem, _ = open_store(store.location.path)
    asked: list[tuple[int, int]] = []
    real = type(filesystem).cat_ranges

    def cat_ranges(self, paths, starts, ends, **options):
        asked.extend(zip(starts, ends, strict=True))
        return real(self, paths, starts, ends, **options)

    monkeypatch.setattr(type(filesystem), "cat_ranges", cat_ranges)
    monkeypatch.setattr(module, "GAP_BYTES", 10)
    found = store.fetch([places[at] for at in (6, 1, 2)])
    for at, one in zip((6, 1, 2), found, strict=True):
        assert_same(one, signal(at))
    assert len(asked) == 2
    assert sum(stop - start for start, stop in asked) == sum(places[at].length for at in (1, 2, 6))


@pytest.mark.parametrize(
    "other",
    [
        {"fingerprint": "other weights"},
        {"view": "another template or image size"},
        {"attn_implementation": "eager"},
    ],
)
def test_another_teacher_template_or_image_size_is_never_a_hit(tmp_path, other):
    write(cache(tmp_path), 3)
    assert list(cache(tmp_path).locate(SHARDS[0])) == [3]
    assert cache(tmp_path, **other).locate(SHARDS[0]) == {}


@pytest.mark.parametrize("change", [{"checksum": "cc"}, {"bytes": 998}, {"samples": 11}])
def test_a_shard_whose_content_changed_is_never_a_hit(tmp_path, change):
    write(cache(tmp_path), 3)
    assert cache(tmp_path).locate(dataclasses.replace(SHARDS[0], **change)) == {}


def test_a_job_is_served_by_any_that_kept_at_least_what_it_needs(tmp_path):
    more = Needs(frozenset({"hidden", "visual", "teacher_vision"}))
    less = Needs(frozenset({"hidden"}))
    write(cache(tmp_path, needs=more), 1, signals=lambda seed: signal(seed, needs=more))
    write(cache(tmp_path, needs=less), 2, signals=lambda seed: signal(seed, needs=less))
    assert sorted(cache(tmp_path, needs=less).locate(SHARDS[0])) == [1, 2]
    assert sorted(cache(tmp_path, needs=more).locate(SHARDS[0])) == [1]
    store = cache(tmp_path, needs=less)
    (whole,) = store.fetch([store.locate(SHARDS[0])[1]])
    assert whole is not None
    assert set(whole) == more.parts


def test_a_file_without_its_index_is_not_read(tmp_path):
    store = cache(tmp_path)
    write(store, 1)
    write(store, 2)
    next(iter(tmp_path.rglob("*.index"))).unlink()  # as if the writer had died before it
    assert len(store.locate(SHARDS[0])) == 1


def test_an_index_is_read_once_in_a_process_and_new_ones_are_found(tmp_path, monkeypatch):
    store = cache(tmp_path)
    write(store, 1)
    assert sorted(store.locate(SHARDS[0])) == [1]
    filesystem, _ = open_store(store.location.path)
    read: list[str] = []
    real = type(filesystem).cat
    monkeypatch.setattr(type(filesystem), "cat", lambda self, paths, **_: read.extend(paths) or real(self, paths))
    write(store, 2)
    assert sorted(store.locate(SHARDS[0])) == [1, 2]
    assert len(read) == 1
    monkeypatch.setattr(module, "REFRESH_S", 1000.0)
    write(store, 3)
    assert sorted(store.locate(SHARDS[0])) == [1, 2]  # as this process will know it for a while
    assert sorted(cache(tmp_path).locate(SHARDS[0])) == [1, 2, 3]  # but not for the next job
    assert sorted(store.locate(SHARDS[0])) == [1, 2, 3]  # both jobs have one index


def flip(path: Path, byte: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= bit
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit of the header": lambda path: flip(path, 20),
    "a flipped bit of the numbers": lambda path: flip(path, path.stat().st_size // 2, 64),
    "a flipped bit of the last number": lambda path: flip(path, -module.CRC_BYTES - 1),
    "a flipped bit of the checksum": lambda path: flip(path, -1, 128),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "garbage": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("case", [*DAMAGE, "gone"])
def test_a_damaged_signal_is_not_read_and_the_others_are(tmp_path, caplog, case):
    store = cache(tmp_path)
    write(store, 1)
    (path,) = tmp_path.rglob("*.signals")
    write(store, 2)
    places = store.locate(SHARDS[0])
    DAMAGE.get(case, Path.unlink)(path)
    for _ in range(3):
        damaged, whole = store.fetch([places[1], places[2]])
        assert damaged is None
        assert_same(whole, signal(2))
    (record,) = caplog.records  # one for the file, and not one for each sample
    assert path.name in record.getMessage()
    assert "answers these samples again" in record.getMessage()


def test_a_flipped_bit_costs_one_signal_of_its_file(tmp_path):
    store = cache(tmp_path)
    write(store, *range(5))
    places = store.locate(SHARDS[0])
    (path,) = tmp_path.rglob("*.signals")
    flip(path, places[3].offset + places[3].length // 2)
    found = store.fetch([places[at] for at in range(5)])
    assert [one is None for one in found] == [False, False, False, True, False]


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_index_is_left_out_with_a_warning(tmp_path, caplog, case):
    store = cache(tmp_path)
    write(store, 1)
    (path,) = tmp_path.rglob("*.index")
    write(store, 2)
    DAMAGE[case](path)
    for _ in range(3):
        assert list(store.locate(SHARDS[0])) == [2]
    (record,) = caplog.records
    assert path.name in record.getMessage()


def test_a_store_that_fails_is_an_error_and_no_damage(tmp_path, monkeypatch):
    store = cache(tmp_path)
    write(store, 1)
    places = store.locate(SHARDS[0])

    def refused(*arguments: Any, **options: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(LocalFileSystem, "cat_file", refused)
    with pytest.raises(PermissionError):
        store.fetch([places[1]])


def test_a_cut_object_is_not_read(caplog):
    with served() as s3:
        storage = StorageSpec(endpoint_url=s3.endpoint_url, region="us-east-1")
        store = dataclasses.replace(cache("unused"), location=CacheSpec(path=f"s3://{s3.bucket}/c", storage=storage))
        write(store, 1, 2, 3)
        places = store.locate(SHARDS[0])
        filesystem = s3.filesystem()
        (path,) = filesystem.glob(f"{s3.bucket}/c/**/*.signals")
        filesystem.pipe_file(path, filesystem.cat_file(path)[: places[2].offset + 10])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "GAP_BYTES", -1)  # a request for each, the last one beyond the end
            found = store.fetch([places[at] for at in (1, 2, 3)])
    assert [one is None for one in found] == [False, True, True]
    assert len(caplog.records) == 1


def test_a_cache_of_an_older_format_is_another_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FORMAT", 2)
    write(cache(tmp_path), 1)
    monkeypatch.undo()
    assert cache(tmp_path).locate(SHARDS[0]) == {}


class Teacher:
    """Fake client whose answer to a sample is the signal of its first token."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def score(self, group: Sequence[Rendering]) -> Answer:
        asked = [int(one.input_ids[0]) for one in group]
        self.asked += asked
        return Answer([signal(at) for at in asked], {}, 0.0)


def answers_through(folder, members: range) -> tuple[list[int], list[Signal]]:
    """Return the samples that the teacher is asked for in a new process with this cache, and the signals of all."""
    module._index.cache_clear()
    store, teacher = cache(folder), Teacher()
    writer, places = CacheWriter(store, keep=False), store.locate(SHARDS[0])
    source = SignalSource(teacher, 8, store, writer, [SHARDS[0]], FACTS.dtype)
    source._to_compare = 0  # otherwise some of them are asked for in any case
    pendings = []
    for member in members:
        seen = Rendering(np.full(4, member, np.int32), np.ones(4, np.bool_))
        pendings.append(source.add(Sample(0, 0, member, member, str(member), seen, seen, places.get(member))))
    source.flush()
    signals = [cast(Signal, pending.said.result(30).signal) for pending in pendings]
    writer.close()
    source.close()
    return sorted(teacher.asked), signals


@pytest.mark.parametrize("case", ["a flipped bit of the numbers", "cut", "empty"])
def test_a_damaged_signal_is_asked_for_again_once_and_the_new_one_is_read_from_then_on(tmp_path, case):
    for member in range(8):
        answers_through(tmp_path, range(member, member + 1))  # a file for each
    assert answers_through(tmp_path, range(8))[0] == []
    for path in tmp_path.rglob("*.signals"):
        DAMAGE[case](path)
    flip(next(tmp_path.rglob("*.index")), 30)
    for asked in (list(range(8)), [], []):
        found = answers_through(tmp_path, range(8))
        assert found[0] == asked
        for member, one in enumerate(found[1]):
            assert_same(one, signal(member))


def test_a_full_disk_is_named_by_the_next_call(tmp_path, monkeypatch):
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = CacheWriter(cache(tmp_path), keep=False)
    monkeypatch.setattr(LocalFileSystem, "pipe_file", full)
    writer.add(SHARDS[0], 1, signal())
    with pytest.raises(OutputError, match=rf"disk is full: free some space in {tmp_path}"):
        writer.flush()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_write_that_fails_is_not_silent(tmp_path):
    store = dataclasses.replace(cache(tmp_path), location=CacheSpec(path="/proc/nowhere"))
    writer = CacheWriter(store, keep=False)
    writer.add(SHARDS[0], 1, signal())
    with pytest.raises(OSError, match="nowhere"):
        writer.flush()


def test_many_threads_add_to_one_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILE_BYTES", 20_000)
    store = cache(tmp_path)
    writer = CacheWriter(store, keep=False)
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(lambda at: writer.add(SHARDS[0], at, signal(at)), range(200)))
    writer.close()
    places = store.locate(SHARDS[0])
    assert sorted(places) == list(range(200))
    for at, one in enumerate(store.fetch([places[at] for at in range(200)])):
        assert_same(one, signal(at))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cache")]


def test_what_comes_again_before_it_could_be_read_is_still_in_memory_up_to_a_limit(tmp_path, monkeypatch):
    writer = CacheWriter(cache(tmp_path), keep=True)
    assert writer.known(SHARDS[0], 1) is None
    writer.add(SHARDS[0], 1, signal(1))
    known = writer.known(SHARDS[0], 1)
    assert known is not None
    assert_same(known, signal(1))
    assert writer.known(SHARDS[1], 1) is None
    writer.close()
    for keep, limit in ((True, 100), (False, 1 << 20)):
        monkeypatch.setattr(module, "KEPT_BYTES", limit)
        writer = CacheWriter(cache(tmp_path), keep=keep)
        writer.add(SHARDS[0], 1, signal(1))
        assert writer.known(SHARDS[0], 1) is None
        writer.close()


# ------------------------------------------------------------------------------------------------ comparing


def rounded(one: Signal, by: float) -> Signal:
    """Return the signal with relative noise of size `by` on every number."""
    changed, random = dict(one), np.random.default_rng(1)
    for name, array in one.items():
        if array.dtype == np.int32:
            continue
        numbers = torch.from_numpy(array.copy())
        numbers = numbers.view(torch.bfloat16).float() if array.dtype == np.uint16 else numbers
        noise = torch.from_numpy(random.standard_normal(numbers.shape)).to(numbers.dtype)
        numbers = numbers * (1 + by * noise)
        changed[name] = to_wire(numbers.bfloat16() if array.dtype == np.uint16 else numbers)
    return changed


@pytest.mark.parametrize("needs", [ALL, TOP_K], ids=lambda needs: needs.tag)
def test_answers_that_differ_by_rounding_are_alike_and_another_sample_s_is_not(needs):
    one, other = signal(0, needs=needs), signal(1, needs=needs)
    assert differs(one, one, "float32") is None
    assert differs(rounded(one, 1e-2), one, "bfloat16") is None
    found = differs(other, one, "bfloat16")
    assert found is not None
    assert "relative difference" in found


@pytest.mark.parametrize("name", sorted(ALL.parts | TOP_K.parts))
def test_the_part_that_differs_is_named_each_of_them(name):
    needs = Needs(ALL.parts | TOP_K.parts, top_k=4, vocab=9, layer=3)
    one = signal(0, needs=needs)
    assert (differs(one | {name: signal(1, needs=needs)[name]}, one, "bfloat16") or "").startswith(f"{name}: ")
    assert (differs(one | {name: one[name][:1]}, one, "bfloat16") or "").startswith(f"{name}: has shape")
    assert (differs(one, {part: array for part, array in one.items() if part != name}, "bfloat16") or "").startswith(
        f"{name}: has"
    )


def test_the_last_of_the_top_ids_may_change_places_with_the_next():
    ids = np.array([[0, 1, 2, 3]], np.int32)
    log_probs = np.log(np.array([[0.9, 0.05, 0.02, 0.001, 0.029]], np.float32))
    one = {"top_ids": ids, "top_log_probs": log_probs}
    assert differs({"top_ids": np.array([[1, 0, 2, 7]], np.int32), "top_log_probs": log_probs}, one, "float16") is None
    assert (
        differs({"top_ids": np.array([[7, 1, 2, 3]], np.int32), "top_log_probs": log_probs}, one, "bfloat16")
        is not None
    )


def test_a_teacher_that_is_sure_has_entropies_of_next_to_nothing():
    one = {"teacher_entropy": np.array([1e-4, 2e-4], np.float32)}
    assert differs({"teacher_entropy": np.array([3e-4, 5e-4], np.float32)}, one, "bfloat16") is None
    assert differs({"teacher_entropy": np.array([0.5, 1.0], np.float32)}, one, "bfloat16") is not None
