"""Shards by name: what is found, what does not match its manifest, and what a store says when it is asked."""

import json
import os
import pickle
import time

import fsspec
import pytest

from betakd_ray.data import manifest as module
from betakd_ray.data.manifest import find_shards, index_shards
from betakd_ray.data.shards import ShardDamaged, read_shard
from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec
from tests.tars import DAMAGE, STORAGE, good, tar_bytes, whole_shard, written


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
    read, real = [], module.read_manifest_file
    monkeypatch.setattr(
        module, "read_manifest_file", lambda folder, storage: read.append(folder) or real(folder, storage)
    )
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


def find_manifest(folder):
    rows = map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())
    return {row["shard"]: row["crc32"] for row in rows}


def test_indexing_merges_by_name_and_leaves_no_other_file(tmp_path):
    shard, path = whole_shard(tmp_path)
    written(tmp_path, tar_bytes(good()), "test-0.tar")
    path.write_bytes(tar_bytes(good()))
    index_shards([str(path)], STORAGE)
    manifest = find_manifest(tmp_path)
    assert list(manifest) == ["test-0.tar", "train-0.tar"]
    assert manifest["train-0.tar"] != shard.checksum
    assert sorted(os.listdir(tmp_path)) == ["manifest.jsonl", "test-0.tar", "train-0.tar"]


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_without_a_manifest_when_a_shard_is_indexed(tmp_path, case):
    shard, path = whole_shard(tmp_path)
    path.write_bytes(DAMAGE[case](path.read_bytes()))
    with pytest.raises(DataError, match=r"train-0\.tar"):
        index_shards([str(path)], STORAGE)
    assert find_manifest(tmp_path) == {"train-0.tar": shard.checksum}


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
    monkeypatch.setattr(module, "open_store", lambda url, storage, attempts: (Refusing(error), url))
    with pytest.raises(DataError) as caught:
        find_shards(["s3://bucket/train-*.tar"], storage)
    return str(caught.value)


def test_refused_credentials_name_the_endpoint_and_the_variables_but_no_value(monkeypatch):
    from botocore.exceptions import NoCredentialsError

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:pass@store.example:9000")
    for error in (PermissionError("Forbidden for hunter2"), NoCredentialsError()):
        message = refused(monkeypatch, error, STORAGE)
        for word in ("s3://bucket/train-*.tar", "http://store.example:9000", "AWS_ACCESS_KEY_ID", "anonymous"):
            assert word in message
        assert "hunter2" not in message
        assert "pass@" not in message


def test_an_unreachable_store_names_the_endpoint_and_where_it_is_set(monkeypatch):
    from botocore.exceptions import EndpointConnectionError

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://10.0.0.1:9000")
    message = refused(monkeypatch, EndpointConnectionError(endpoint_url="http://10.0.0.1:9000"), STORAGE)
    assert "the store at http://10.0.0.1:9000 gives no valid answer" in message
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
