import io
import json
import os
import pickle
import random
import tarfile
import time

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tenacity import wait_none

from betakd_ray.data import shards as module
from betakd_ray.data.shards import (
    BadSample,
    RawSample,
    Shard,
    ShardDamaged,
    check_conversation,
    find_shards,
    index_shards,
    read_shard,
    read_shard_with_retry,
)
from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec

STORAGE = StorageSpec()
TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A circle."}]
JPG = b"\xff\xd8\xff not decoded here"


def record(**fields):
    return json.dumps({"id": "q1", "conversations": TURNS, **fields}).encode()


def good(key="a"):
    return [(f"{key}.json", record()), (f"{key}.jpg", JPG)]


def tar_bytes(members, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def written(folder, content, name="train-0.tar", manifest=True):
    """A file of the folder, and its entry, which says of its bytes what is true before anybody damages them."""
    (folder / name).write_bytes(content)
    return index_shards([str(folder / name)], STORAGE)[0] if manifest else None


def read_members(folder, members, **options):
    return list(read_shard(written(folder, tar_bytes(members)), STORAGE, **options))


def whole_shard(folder, samples=6):
    members = [member for number in range(samples) for member in good(f"{number:03d}")]
    return written(folder, tar_bytes(members)), folder / "train-0.tar"


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


def link(name):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "elsewhere.jpg"
    return info


def turns_json(*turns):
    return record(conversations=[{"from": speaker, "value": text} for speaker, text in turns])


BAD = {
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
    "link": ([("b.json", record()), (link("b.jpg"), b"")], "link"),
    "no conversation": ([("b.json", b'{"id": 1}'), ("b.jpg", JPG)], "conversations"),
    "unknown speaker": ([("b.json", turns_json(("system", "Hi"), ("gpt", "yes")))], "turn 0"),
    "no answer": ([("b.json", turns_json(("human", "<image>"))), ("b.jpg", JPG)], "no answer"),
    "blank answer": ([("b.json", turns_json(("human", "<image>"), ("gpt", " \n"))), ("b.jpg", JPG)], "no answer"),
    "placeholder in an answer": (
        [("b.json", turns_json(("human", "?"), ("gpt", "<image>"))), ("b.jpg", JPG)],
        "answer",
    ),
    "image missing": ([("b.json", record())], "1 <image> placeholders and 0 images"),
    "image too many": ([("b.json", record()), ("b.0.jpg", JPG), ("b.1.jpg", JPG)], "1 <image> placeholders and 2"),
    "number missing": ([("b.json", record()), ("b.0.jpg", JPG), ("b.2.jpg", JPG)], "not numbered"),
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
    monkeypatch.setattr(module, "MAX_MEMBER_BYTES", 1000)
    (sample,) = read_members(tmp_path, [("a.json", record()), ("a.jpg", bytes(1001))])
    assert "above the limit" in sample.reason


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


def flip(path, byte):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def headers(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [member.offset for member in tar]


def zeroed(content, at):
    return content[:at] + bytes(512) + content[at + 512 :]


DAMAGE = {
    "cut within a member": lambda c: c[: headers(c)[4] + 600],
    "cut at a header": lambda c: c[: headers(c)[4]],
    "cut before the end mark": lambda c: c.rstrip(b"\0") + b"\0",
    "zeroed first header": lambda c: zeroed(c, 0),
    "zeroed header": lambda c: zeroed(c, headers(c)[4]),
    "zeroed last header": lambda c: zeroed(c, headers(c)[-1]),
    "garbage header": lambda c: c[: headers(c)[4]] + b"\xa5" * 512 + c[headers(c)[4] + 512 :],
    "garbage": lambda c: random.Random(0).randbytes(len(c)),
    "a web page": lambda c: b"<html>503</html>",
    "empty file": lambda c: b"",
    "nothing but zeros": lambda c: bytes(len(c)),
    "a second archive behind": lambda c: c + c,
    "compressed and cut": lambda c: b"\x1f\x8b" + c[2:],
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_an_error_that_names_the_shard(tmp_path, case):
    shard, path = whole_shard(tmp_path)
    path.write_bytes(DAMAGE[case](path.read_bytes()))
    with pytest.raises(ShardDamaged, match=r"train-0\.tar.*Copy or pack it again"):
        list(read_shard(shard, STORAGE))


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_without_a_manifest_when_a_shard_is_indexed(tmp_path, case):
    shard, path = whole_shard(tmp_path)
    path.write_bytes(DAMAGE[case](path.read_bytes()))
    with pytest.raises(DataError, match=r"train-0\.tar"):
        index_shards([str(path)], STORAGE)
    assert find_manifest(tmp_path) == {"train-0.tar": shard.checksum}


def find_manifest(folder):
    rows = map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())
    return {row["shard"]: row["crc32"] for row in rows}


@pytest.mark.parametrize("samples", [5, 7])
def test_another_number_of_samples_than_the_manifest_says_is_damage(tmp_path, samples):
    shard, _ = whole_shard(tmp_path)
    wrong = Shard(shard.url, samples, shard.bytes, shard.checksum)
    indexes, error = read_until_damage(wrong)
    assert f"expected {samples} samples" in str(error)
    assert "found 6 samples" in str(error)
    assert indexes == list(range(min(samples, 6)))


def read_until_damage(shard):
    """Indexes yielded before the error, and the error; no error fails the test."""
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
        real = module.open_store

        def open_store(url, storage=None):
            filesystem, path = real(url, storage)
            return FlakyFiles(filesystem, self), path

        monkeypatch.setattr(module, "open_store", open_store)


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


# ------------------------------------------------------------------------------------------------- finding


def five_shards(folder):
    for number in range(5):
        written(folder, tar_bytes(good()), f"train-{number:02d}.tar")
    return folder


def names(shards):
    return [os.path.basename(shard.url) for shard in shards]


def test_braces_and_globs_give_each_shard_once_in_order(tmp_path):
    folder = five_shards(tmp_path)
    found = find_shards([f"{folder}/train-{{03..01}}.tar", f"{folder}/*"], STORAGE)
    assert names(found) == [f"train-{number:02d}.tar" for number in range(5)]
    assert pickle.loads(pickle.dumps(found)) == found


def test_urls_of_any_store_are_found_and_read():
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/shards/train-0.tar", tar_bytes(good()))
    indexed = index_shards(["memory://shards/*.tar"], STORAGE)
    assert find_shards(["memory://shards/train-{0..0}.tar"], STORAGE) == indexed
    assert indexed[0].url.startswith("memory://")
    assert len(list(read_shard(indexed[0], STORAGE))) == 1


def test_a_manifest_is_read_once_for_each_folder(tmp_path, monkeypatch):
    folder = five_shards(tmp_path)
    read, real = [], module.read_manifest
    monkeypatch.setattr(module, "read_manifest", lambda folder, storage: read.append(folder) or real(folder, storage))
    find_shards([f"{folder}/*.tar"], STORAGE)
    assert read == [str(folder)]


def fails_to_find(pattern, *words, kind=DataError):
    with pytest.raises(kind) as caught:
        find_shards([str(pattern)], STORAGE)
    for word in words:
        assert word in str(caught.value)


def test_nothing_matching_is_an_error(tmp_path):
    fails_to_find(tmp_path / "train-*.tar", "train-*.tar", "no shard matches", "betakd pack")


def test_a_named_shard_that_is_missing_is_an_error_that_counts(tmp_path):
    fails_to_find(five_shards(tmp_path) / "train-{03..07}.tar", "train-05.tar", "3 of 5", "betakd pack")
    fails_to_find(tmp_path / "nowhere" / "train-00.tar", "nowhere", "1 of 1")


def test_braces_that_do_not_pair_are_an_error(tmp_path):
    fails_to_find(tmp_path / "train-{00..07.tar", "braces", "{00..07}")


def test_a_shard_outside_of_the_manifest_is_an_error_with_the_remedy(tmp_path):
    written(tmp_path, tar_bytes(good()), "train-0.tar", manifest=False)
    fails_to_find(tmp_path / "*.tar", "there is no manifest.jsonl", "betakd index", "train-0.tar")
    written(tmp_path, tar_bytes(good()), "train-1.tar")
    fails_to_find(tmp_path / "*.tar", "no entry", "betakd index", "train-0.tar")


def test_a_size_unlike_the_manifests_is_an_error_with_both(tmp_path):
    shard, path = whole_shard(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    fails_to_find(path, str(shard.bytes), str(shard.bytes - 1), "betakd index", kind=ShardDamaged)


@pytest.mark.parametrize("line", ["nonsense", "{}", "[]", '{"shard": "a", "samples": null, "bytes": 1, "crc32": ""}'])
def test_a_broken_manifest_is_an_error_that_names_its_line(tmp_path, line):
    _, path = whole_shard(tmp_path)
    with (tmp_path / "manifest.jsonl").open("a") as manifest:
        manifest.write(line + "\n")
    fails_to_find(path, "manifest.jsonl, line 2", "betakd index")


def test_indexing_merges_by_name_and_leaves_no_other_file(tmp_path):
    shard, path = whole_shard(tmp_path)
    written(tmp_path, tar_bytes(good()), "test-0.tar")
    path.write_bytes(tar_bytes(good()))
    index_shards([str(path)], STORAGE)
    manifest = find_manifest(tmp_path)
    assert list(manifest) == ["test-0.tar", "train-0.tar"]
    assert manifest["train-0.tar"] != shard.checksum
    assert sorted(os.listdir(tmp_path)) == ["manifest.jsonl", "test-0.tar", "train-0.tar"]


def test_a_foreign_shard_without_samples_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"holds no sample.*betakd pack"):
        written(tmp_path, tar_bytes([("README", b"x")]))


class Refusing(fsspec.AbstractFileSystem):
    cachable = False

    def __init__(self, error):
        super().__init__()
        self.error = error

    def glob(self, path, **options):
        raise self.error


def refused(monkeypatch, error, storage):
    monkeypatch.setattr(module, "open_store", lambda url, storage=None: (Refusing(error), url))
    with pytest.raises(DataError) as caught:
        find_shards(["s3://bucket/train-*.tar"], storage)
    return str(caught.value)


def test_refused_credentials_name_the_endpoint_and_the_variables_but_no_value(monkeypatch):
    from botocore.exceptions import NoCredentialsError

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    storage = StorageSpec(endpoint_url="http://user:pass@store.example:9000")
    for error in (PermissionError("Forbidden for hunter2"), NoCredentialsError()):
        message = refused(monkeypatch, error, storage)
        for word in ("s3://bucket/train-*.tar", "http://store.example:9000", "AWS_ACCESS_KEY_ID", "anonymous"):
            assert word in message
        assert "hunter2" not in message
        assert "pass@" not in message


def test_an_unreachable_store_names_the_endpoint_and_where_it_is_set(monkeypatch):
    from botocore.exceptions import EndpointConnectionError

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://10.0.0.1:9000")
    message = refused(monkeypatch, EndpointConnectionError(endpoint_url="http://10.0.0.1:9000"), STORAGE)
    assert "the store at http://10.0.0.1:9000 gives no usable answer" in message
    assert "storage.endpoint_url" in message


def test_a_protocol_nobody_knows_is_an_error():
    fails_to_find("nope://bucket/*.tar", "nope://bucket/*.tar", "nope")


def test_a_closed_port_is_reported_within_seconds(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    start = time.monotonic()
    with pytest.raises(DataError, match=r"127\.0\.0\.1:1 "):
        find_shards(["s3://bucket/*.tar"], StorageSpec(endpoint_url="http://127.0.0.1:1"))
    assert time.monotonic() - start < 15
