"""One shard: its samples, the effects of damage to it, and the effects of a failing store on its reader."""

import bz2
import gzip
import json
import lzma
import pickle
import tarfile
import tracemalloc

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tenacity import wait_none

from betakd_ray.data import files
from betakd_ray.data import shards as module
from betakd_ray.data.samples import BadSample, RawSample, check_conversation
from betakd_ray.data.shards import Shard, ShardDamaged, read_shard, read_shard_with_retry
from betakd_ray.errors import DataError
from tests.tars import DAMAGE, JPG, STORAGE, TURNS, flip, good, headers, record, tar_bytes, whole_shard, written


def read_members(folder, members, **options):
    return list(read_shard(written(folder, tar_bytes(members)), STORAGE, **options))


# ------------------------------------------------------------------------------------------------- samples


def test_a_sample_comes_with_its_turns_images_id_and_other_fields(tmp_path):
    (sample,) = read_members(tmp_path, [("x/a.json", record(type="open")), ("x/a.jpg", JPG)])
    assert sample == RawSample("x/a", 0, "q1", TURNS, [JPG], {"type": "open"})


def test_several_images_come_in_the_order_of_their_numbers(tmp_path):
    turns = [{"from": "human", "value": "<image>" * 11}, TURNS[1]]
    names = sorted(f"a.{number}.png" for number in range(11))
    members = [("a.json", record(conversations=turns)), *((name, name.encode()) for name in names)]
    (sample,) = read_members(tmp_path, members)
    assert sample.images == [f"a.{number}.png".encode() for number in range(11)]


def test_images_without_a_placeholder_go_before_the_first_human_turn():
    turns = [{"from": "human", "value": "Both?"}, {"from": "gpt", "value": "Yes."}]
    assert check_conversation(turns, 2)[0]["value"] == "<image>\n<image>\nBoth?"
    assert turns[0]["value"] == "Both?"


def test_a_conversation_about_no_image_is_fine(tmp_path):
    turns = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]
    (sample,) = read_members(tmp_path, [("a.json", record(conversations=turns))])
    assert (sample.conversation, sample.images) == (turns, [])


def test_the_key_stands_for_a_missing_id(tmp_path):
    (sample,) = read_members(tmp_path, [("a.json", json.dumps({"conversations": TURNS}).encode()), ("a.jpg", JPG)])
    assert sample.id == "a"


def special(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "elsewhere.jpg"
    return info


def extended_header(size):
    """Return a header whose content GNU tar reads as the next member's name."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    return info


def turns_json(*turns):
    return record(conversations=[{"from": speaker, "value": text} for speaker, text in turns])


BAD = {
    "empty JSON": ([("b.json", b""), ("b.jpg", JPG)], "not JSON"),
    "a name twice in the JSON": (
        [("b.json", b'{"id": "a", "id": "b"}'), ("b.jpg", JPG)],
        "occurs twice in ['id', 'id']",
    ),
    "cut JSON": ([("b.json", record()[:-9]), ("b.jpg", JPG)], "not JSON"),
    "deeply nested JSON": ([("b.json", b"[" * 200_000)], "not JSON"),
    "JSON of another kind": ([("b.json", b"[1]")], "holds a list"),
    "invalid UTF-8": ([("b.json", b'{"id": "\xff"}')], "not UTF-8"),
    "half a surrogate pair": ([("b.json", turns_json(("human", "\ud800"), ("gpt", "yes")))], "surrogate"),
    "half a surrogate pair in the id": ([("b.json", record(id="\ud800")), ("b.jpg", JPG)], "surrogates"),
    "no json member": ([("b.jpg", JPG)], "no json member"),
    "pickle": ([*good("b"), ("b.pkl", pickle.dumps(1))], "refused"),
    "torch file": ([("b.features.PT", b"x"), *good("b")], "refused"),
    "pth file": ([*good("b"), ("b.pth", b"x")], "refused"),
    "path traversal": ([("../b.json", record())], "outside"),
    "path traversal without an extension": ([("x/../../passwd", b"root")], "outside"),
    "absolute path": ([("/etc/b.json", record())], "outside"),
    "member twice": ([*good("b"), ("b.jpg", JPG)], "twice"),
    "member twice but for case": ([*good("b"), ("b.JPG", JPG)], "twice"),
    "link": ([("b.json", record()), (special("b.jpg", tarfile.SYMTYPE), b"")], "link"),
    "device": ([*good("b"), (special("b.txt", tarfile.CHRTYPE), b"")], "special file"),
    "more members than a sample has": ([*good("b"), *((f"b.{n}.txt", b"") for n in range(1000))], "1000 members"),
    "empty conversation": ([("b.json", record(conversations=[])), ("b.jpg", JPG)], "not a list of turns"),
    "two questions in a row": (
        [("b.json", turns_json(("human", "<image>"), ("human", "?"), ("gpt", "yes"))), ("b.jpg", JPG)],
        "turn 1 is from human, like the turn before",
    ),
    "two answers in a row": (
        [("b.json", turns_json(("human", "<image>"), ("gpt", "yes"), ("gpt", "no"))), ("b.jpg", JPG)],
        "turn 2 is from gpt, like the turn before",
    ),
    "no conversation": ([("b.json", b'{"id": 1}'), ("b.jpg", JPG)], "conversations"),
    "unknown speaker": ([("b.json", turns_json(("narrator", "Hi"), ("gpt", "yes")))], "turn 0"),
    "no answer": ([("b.json", turns_json(("human", "<image>"))), ("b.jpg", JPG)], "no answer"),
    "blank answer": ([("b.json", turns_json(("human", "<image>"), ("gpt", " \n"))), ("b.jpg", JPG)], "no answer"),
    "placeholder in an answer": (
        [("b.json", turns_json(("human", "?"), ("gpt", "<image>"))), ("b.jpg", JPG)],
        "answer",
    ),
    "image missing": ([("b.json", record())], "1 <image> placeholders, but 0 images"),
    "image too many": ([("b.json", record()), ("b.0.jpg", JPG), ("b.1.jpg", JPG)], "1 <image> placeholders, but 2"),
    "number missing": ([("b.json", record()), ("b.0.jpg", JPG), ("b.2.jpg", JPG)], "not numbered"),
    "numbers that begin late": ([("b.json", record()), ("b.3.jpg", JPG)], "not numbered"),
    "two unnumbered images": ([*good("b"), ("b.png", JPG)], "not numbered"),
    "images and nobody to show them to": ([("b.json", turns_json(("gpt", "yes"))), ("b.jpg", JPG)], "no human turn"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_keeps_its_place_and_says_why(tmp_path, case):
    members, reason = BAD[case]
    before, bad, after = read_members(tmp_path, [*good("a"), *members, *good("c")])
    assert isinstance(bad, BadSample)
    assert reason in bad.reason
    assert [sample.index for sample in (before, bad, after)] == [0, 1, 2]
    assert isinstance(before, RawSample)
    assert isinstance(after, RawSample)


def test_an_oversized_member_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_SAMPLE_BYTES", 1000)
    (sample,) = read_members(tmp_path, [("a.json", record()), ("a.jpg", bytes(1001))])
    assert "above the limit" in sample.reason


def test_the_limit_is_for_all_members_of_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_SAMPLE_BYTES", 1000)
    (sample,) = read_members(tmp_path, [("a.json", record()), ("a.0.jpg", bytes(600)), ("a.1.jpg", bytes(600))])
    assert "with member 'a.1.jpg', the sample has" in sample.reason


def test_a_key_that_comes_again_later_is_refused_there(tmp_path):
    first, _, again = read_members(tmp_path, [*good("a"), *good("b"), *good("a")])
    assert isinstance(first, RawSample)
    assert again == BadSample("a", 2, "key 'a' occurs twice, first as sample 0")


def test_a_repeated_key_is_known_when_the_first_was_skipped(tmp_path):
    (again,) = read_members(tmp_path, [*good("a"), *good("b"), *good("a")], skip={0, 1})
    assert again == BadSample("a", 2, "key 'a' occurs twice, first as sample 0")


def test_a_sample_whose_members_are_apart_is_refused_in_both_places(tmp_path):
    (json_b, jpg_b) = good("b")
    samples = read_members(tmp_path, [json_b, *good("a"), jpg_b])
    assert [type(sample) for sample in samples] == [BadSample, RawSample, BadSample]
    assert "1 <image> placeholders, but 0 images" in samples[0].reason
    assert "occurs twice" in samples[2].reason


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_whatever_the_dialect(tmp_path, tar_format):
    key = "/".join(["ünï" * 10] * 9)
    content = tar_bytes(good(key), tar_format=tar_format)
    (sample,) = read_shard(written(tmp_path, content), STORAGE)
    assert sample.key == key


def test_members_that_webdataset_passes_over_make_no_sample(tmp_path):
    extras = [("README", b"x"), ("._a.json", b"x"), ("__meta__/x.json", b"x")]
    assert [sample.index for sample in read_members(tmp_path, [*extras, *good("a")])] == [0]


def test_a_member_name_that_is_no_utf8_gives_a_key_that_is(tmp_path):
    content = tar_bytes(good("b#")).replace(b"b#", b"b\xe9")
    for at in [i for i in range(0, len(content), 512) if content[i : i + 2] == b"b\xe9"]:
        header = tarfile.TarInfo.frombuf(tar_bytes([("b#.json", b"")])[:512], "utf-8", "strict")
        assert header.name == "b#.json"
        block = content[at : at + 148] + b" " * 8 + content[at + 156 : at + 512]
        content = content[: at + 148] + f"{sum(block):06o}\0 ".encode() + content[at + 156 :]
    (sample,) = read_shard(written(tmp_path, content), STORAGE)
    assert sample.key == "b\\udce9"


def test_compressed_shards_are_read_and_checked_as_they_lie_in_the_store(tmp_path):
    shard = written(tmp_path, tar_bytes(good(), mode="w:gz"), "train-0.tar.gz")
    assert shard.bytes == (tmp_path / "train-0.tar.gz").stat().st_size
    assert len(list(read_shard(shard, STORAGE))) == 1


def test_a_gzip_of_several_streams_is_read_to_its_end(tmp_path):
    content = tar_bytes([*good("a"), *good("b")])
    streams = gzip.compress(content[:700]) + gzip.compress(content[700:])
    assert len(list(read_shard(written(tmp_path, streams, "train-0.tar.gz"), STORAGE))) == 2


@pytest.mark.parametrize(
    "behind", [gzip.compress(tar_bytes(good("b"))), b"not gzip"], ids=["a second archive", "garbage"]
)
def test_what_stands_behind_a_gzipped_archive_is_damage(tmp_path, behind):
    with pytest.raises(ShardDamaged, match="Copy or pack it again"):
        written(tmp_path, gzip.compress(tar_bytes(good("a"))) + behind, "train-0.tar.gz")


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress, lambda tar: b"\x28\xb5\x2f\xfd" + tar])
def test_other_compression_is_refused_by_name(tmp_path, compress):
    with pytest.raises(ShardDamaged, match="compressed, but not by gzip"):
        written(tmp_path, compress(tar_bytes(good())))


BOMBS = {
    "a member": [*good("a"), ("a.txt", bytes(30 << 20))],
    "many members": [(f"a.{number}.jpg", bytes(3 << 20)) for number in range(10)],
    "many samples": [(f"{number}.jpg", bytes(3 << 20)) for number in range(10)],
    "a header": [(extended_header(8 << 20), bytes(8 << 20)), *good("a"), ("b.txt", bytes(22 << 20))],
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_is_damage_and_never_in_memory(tmp_path, monkeypatch, case):
    monkeypatch.setattr(module, "MAX_SAMPLE_BYTES", 2 << 20)
    content = gzip.compress(tar_bytes(BOMBS[case]))
    assert len(content) < 100_000
    written(tmp_path, content, "train-0.tar.gz", manifest=False)
    tracemalloc.start()
    try:
        with pytest.raises(ShardDamaged, match=r"gzip unpack to|extended header"):
            list(read_shard(Shard(str(tmp_path / "train-0.tar.gz"), 10, 0, ""), STORAGE))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_gzip_of_what_compresses_well_is_no_bomb(tmp_path):
    members = [member for number in range(500) for member in good(f"{number:03d}")]
    content = gzip.compress(tar_bytes([*members, ("500.txt", bytes(10 << 20))]), 9)
    assert len(list(read_shard(written(tmp_path, content, "train-0.tar.gz"), STORAGE))) == 501


@pytest.mark.parametrize(
    "skip", [{0, 3}, lambda index: index in (0, 3), np.array([True, False, False, True, False, False])]
)
def test_skipped_indexes_are_read_past_and_the_shard_is_still_checked(tmp_path, skip):
    shard, path = whole_shard(tmp_path)
    assert [sample.index for sample in read_shard(shard, STORAGE, skip)] == [1, 2, 4, 5]
    flip(path, 600)
    with pytest.raises(ShardDamaged):
        list(read_shard(shard, STORAGE, skip))


def test_an_array_of_indexes_is_not_taken_for_a_mask(tmp_path):
    shard, _ = whole_shard(tmp_path)
    with pytest.raises(TypeError):  # beartype's, or outside of tests our own
        next(read_shard(shard, STORAGE, np.array([0, 3])))


# -------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_an_error_that_names_the_shard(tmp_path, case):
    shard, path = whole_shard(tmp_path)
    path.write_bytes(DAMAGE[case](path.read_bytes()))
    with pytest.raises(ShardDamaged, match=r"train-0\.tar.*Copy or pack it again"):
        list(read_shard(shard, STORAGE))


@pytest.mark.parametrize("size", [b"77777777777", b"\x80" + b"\x7f" * 11, b"\xff" * 12], ids=["8 GiB", "2**88", "-1"])
def test_a_size_from_nowhere_is_damage_and_found_at_once(tmp_path, size):
    _, path = whole_shard(tmp_path)
    content = path.read_bytes()
    at = headers(content)[4]
    header = content[at : at + 124] + size.ljust(12, b"\0") + b" " * 8 + content[at + 144 + 12 : at + 512]
    header = header[:148] + f"{sum(header):06o}\0 ".encode() + header[156:]
    reads = []
    path.write_bytes(content[:at] + header + content[at + 512 :])
    whole = files.ChecksumStream.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.ChecksumStream, "read", lambda self, size=-1: reads.append(size) or whole(self, size))
        with pytest.raises(ShardDamaged, match=r"train-0\.tar"):
            module.scan_shard(str(path), STORAGE)
    assert len(reads) < 100


@pytest.mark.parametrize("samples", [5, 7])
def test_another_number_of_samples_than_the_manifest_says_is_damage(tmp_path, samples):
    shard, _ = whole_shard(tmp_path)
    wrong = Shard(shard.url, samples, shard.bytes, shard.checksum)
    indexes, error = read_until_damage(wrong)
    assert f"expected {samples} samples" in str(error)
    assert "found 6 samples" in str(error)
    assert indexes == list(range(min(samples, 6)))


def read_until_damage(shard):
    """Return the indexes yielded before the error, and the error; the test fails without an error."""
    indexes = []
    try:
        for sample in read_shard(shard, STORAGE):
            indexes.append(sample.index)
    except ShardDamaged as error:
        return indexes, error
    return pytest.fail(f"{len(indexes)} samples and no error")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_mutation_passes_unnoticed(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    shard, path = whole_shard(folder, samples=4)
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "overwrite", "swap blocks"]))
    noise = data.draw(st.binary(min_size=1, max_size=600))
    block = at // 512 * 512
    mutated = {
        "flip": content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :],
        "cut": content[:at],
        "insert": content[:at] + noise + content[at:],
        "overwrite": content[:at] + noise + content[at + len(noise) :],
        "swap blocks": content[:block]
        + content[block + 512 : block + 1024]
        + content[block : block + 512]
        + content[block + 1024 :],
    }[kind]
    path.write_bytes(mutated)
    if mutated == content:
        assert len(list(read_shard(shard, STORAGE))) == 4
    else:
        indexes, _ = read_until_damage(shard)
        assert indexes == list(range(len(indexes)))
        assert len(indexes) <= 4


# ------------------------------------------------------------------------------------------------- retries


class Flaky:
    """A store whose files break off at given bytes, once each."""

    def __init__(self, monkeypatch, breaks, error=None):
        self.breaks, self.opened = list(breaks), 0
        self.error = error or ConnectionResetError("reset by peer")
        real = files.open_store

        def open_store(url, storage):
            filesystem, path = real(url, storage)
            return FlakyFiles(filesystem, self), path

        monkeypatch.setattr(files, "open_store", open_store)


class FlakyFiles(fsspec.AbstractFileSystem):
    cachable = False

    def __init__(self, inner, flaky):
        super().__init__()
        self.inner, self.flaky = inner, flaky

    def open(self, path, mode="rb", **options):
        self.flaky.opened += 1
        return FlakyFile(self.inner.open(path, mode), self.flaky)


class FlakyFile:
    def __init__(self, inner, flaky):
        self.inner, self.flaky = inner, flaky
        self.left = flaky.breaks.pop(0) if flaky.breaks else None

    def read(self, size):
        data = self.inner.read(size)
        if self.left is not None:
            self.left -= len(data)
            if self.left < 0:
                raise self.flaky.error
        return data

    def close(self):
        self.inner.close()


def retried(shard, **options):
    return read_shard_with_retry(shard, STORAGE, wait=wait_none(), **options)


def test_a_broken_connection_is_resumed_without_repeating_an_index(tmp_path, monkeypatch):
    shard, _ = whole_shard(tmp_path, samples=200)
    flaky = Flaky(monkeypatch, [70_000, 140_000, 0])
    assert [sample.index for sample in retried(shard, skip={7})] == [i for i in range(200) if i != 7]
    assert flaky.opened == 4


def test_errors_of_client_libraries_are_retried_too(tmp_path, monkeypatch):
    from aiohttp import ClientPayloadError
    from botocore.exceptions import ReadTimeoutError

    shard, _ = whole_shard(tmp_path)
    for error in (ClientPayloadError("cut"), ReadTimeoutError(endpoint_url="http://s3")):
        Flaky(monkeypatch, [0], error)
        assert len(list(retried(shard))) == 6


def test_a_store_that_keeps_failing_is_named_after_the_last_attempt(tmp_path, monkeypatch):
    shard, _ = whole_shard(tmp_path)
    flaky = Flaky(monkeypatch, [0] * 9)
    with pytest.raises(DataError, match=r"train-0\.tar.*ConnectionResetError: reset by peer"):
        list(retried(shard))
    assert flaky.opened == 4


def test_damage_is_read_again_and_then_named(tmp_path, monkeypatch):
    shard, path = whole_shard(tmp_path)
    flip(path, 600)
    flaky = Flaky(monkeypatch, [])
    with pytest.raises(ShardDamaged, match=r"train-0\.tar"):
        list(retried(shard, attempts=3))
    assert flaky.opened == 3


def test_damage_on_the_way_is_mended_by_another_reading(tmp_path):
    shard, path = whole_shard(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: headers(content)[6]])
    samples = retried(shard)
    indexes = [next(samples).index]
    path.write_bytes(content)
    assert indexes + [sample.index for sample in samples] == list(range(6))


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("Forbidden")])
def test_what_waiting_does_not_mend_is_not_retried(tmp_path, monkeypatch, error):
    shard, _ = whole_shard(tmp_path)
    flaky = Flaky(monkeypatch, [0] * 9, error)
    with pytest.raises(DataError, match=type(error).__name__):
        list(retried(shard))
    assert flaky.opened == 1


def test_a_reader_that_stops_early_closes_the_file(tmp_path, monkeypatch):
    shard, _ = whole_shard(tmp_path, samples=200)
    closed = []
    monkeypatch.setattr(FlakyFile, "close", lambda self: closed.append(self.inner.close()))
    Flaky(monkeypatch, [])
    samples = retried(shard)
    next(samples)
    samples.close()
    assert len(closed) == 1


def test_an_error_of_the_consumer_is_not_taken_for_damage(tmp_path):
    shard, _ = whole_shard(tmp_path)
    with pytest.raises(ZeroDivisionError):
        [sample.index / 0 for sample in retried(shard)]
