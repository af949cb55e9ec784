"""Two processes that pack into one folder at once: neither mixes its shards or its manifest with the other's."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import pytest

from betakd_ray.data import claims as module
from betakd_ray.data import manifest, replacing
from betakd_ray.data.claims import Claims, Content, claimed
from betakd_ray.data.manifest import find_shards, index_shards, read_manifest
from betakd_ray.data.manifest_file import Packing
from betakd_ray.data.pack import pack
from betakd_ray.data.shards import read_shard
from betakd_ray.errors import DataError
from betakd_ray.holder import Holder
from betakd_ray.spec import StorageSpec
from tests.s3 import served
from tests.tiny import numbered_samples

Place = tuple[str, StorageSpec]
ELSEWHERE = Holder("elsewhere", 7, "another machine", "1")
PREFIX = "manifest.jsonl.claims/prefix-train"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_S", 0.1)
    monkeypatch.setattr(module, "EXPIRE_S", 2.0)
    monkeypatch.setattr(module, "POLL_S", 0.02)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[Place]:
    """Yield a folder for shards, and how it is reached."""
    if request.param == "local":
        yield str(tmp_path / "packed"), StorageSpec()
        return
    with served() as s3:
        yield f"s3://{s3.bucket}/packed", StorageSpec(endpoint_url=s3.endpoint_url, region="us-east-1")


def ids(place: Place, pattern: str = "*.tar") -> list[str]:
    folder, storage = place
    shards = find_shards([f"{folder}/{pattern}"], storage)
    return [str(getattr(sample, "id", sample)) for shard in shards for sample in read_shard(shard, storage)]


def numbers(*them: int) -> list[str]:
    return [str(number) for number in them]


def packed(place: Place, samples: Any, **options: Any) -> None:
    pack(samples, place[0], samples_per_shard=2, storage=place[1], **options)


def test_a_second_packing_of_a_prefix_is_refused_and_the_first_is_whole(place: Place) -> None:
    packed(place, numbered_samples(3))
    refused = []

    def first() -> Iterator[dict[str, Any]]:
        for number, sample in enumerate(numbered_samples(5)):
            if number == 3:
                with pytest.raises(DataError) as caught:
                    packed(place, numbered_samples(2))
                refused.append(str(caught.value))
            yield sample

    packed(place, first())
    assert f"another `betakd pack`, process {os.getpid()} on " in refused[0]
    assert place[0] in refused[0]
    assert ids(place) == numbers(0, 1, 2, 3, 4)
    packed(place, numbered_samples(1))
    assert ids(place) == numbers(0)


def test_another_process_is_refused_by_its_message_and_one_that_was_killed_is_replaced_at_once(tmp_path: Any) -> None:
    code = f"""
import sys, time
from betakd_ray.data.pack import pack
from tests.tiny import numbered_samples

def slow():
    for sample in numbered_samples(5):
        yield sample
        print("packed", flush=True)
        sys.stdin.readline()

pack(slow(), {str(tmp_path)!r}, samples_per_shard=1)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin
        assert other.stdout
        for _ in range(2):
            other.stdout.readline()
            other.stdin.write(b"\n")
            other.stdin.flush()
        # It renews its claim each five seconds.
        module.EXPIRE_S = 30.0
        with pytest.raises(DataError, match=f"another `betakd pack`, process {other.pid} on "):
            pack(numbered_samples(2), str(tmp_path))
        other.kill()
    begun = time.monotonic()
    pack(numbered_samples(2), str(tmp_path))
    assert time.monotonic() - begun < 20.0
    assert ids((str(tmp_path), StorageSpec()), "*") == numbers(0, 1)
    assert sorted(os.listdir(tmp_path)) == ["manifest.jsonl", "train-000000.1.tar"]


def test_of_many_that_begin_at_once_one_packs_and_the_others_say_so(place: Place) -> None:
    together = threading.Barrier(4)

    def begin(number: int) -> str:
        together.wait()
        try:
            packed(place, [sample | {"id": f"{number}-{sample['id']}"} for sample in numbered_samples(3)])
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(4) as threads:
        said = list(threads.map(begin, range(4)))
    done = [number for number, refusal in enumerate(said) if not refusal]
    assert done
    assert all("another `betakd pack`" in refusal for refusal in said if refusal)
    assert ids(place) in [[f"{number}-{each}" for each in range(3)] for number in done]


def test_a_packing_that_stood_still_and_was_replaced_keeps_nothing_and_harms_nothing(place: Place) -> None:
    folder, storage = place
    packed(place, numbered_samples(1))
    prefix = Claims(f"{folder}/{PREFIX}", storage)

    def overtaken() -> Iterator[dict[str, Any]]:
        for number, sample in enumerate(numbered_samples(5)):
            if number == 3:  # in the middle of its second shard
                now, content = prefix.newest()
                assert content
                prefix.create(now + 1, Content(ELSEWHERE, "x"))  # as one does that waited for long
                prefix.remove(now + 1)
                packed(place, numbered_samples(2))
            yield sample

    with pytest.raises(DataError, match=r"another process has taken over what this process was doing|elsewhere"):
        packed(place, overtaken())
    assert ids(place, "*") == numbers(0, 1)
    assert len(read_manifest(folder, storage)) == 1


def test_a_packing_that_was_cleared_is_not_committed_under_the_number_of_another(place: Place) -> None:
    """The last defence: the claim may be lost between the last look at it and the commit."""
    folder, storage = place
    with pytest.raises(DataError, match="has removed the shards of this one"):
        replacing.commit_packing(folder, Packing("train", 0), [], storage)
    assert read_manifest(folder, storage) == {}


def test_a_claim_of_another_machine_is_taken_over_when_it_is_not_renewed(place: Place) -> None:
    folder, storage = place
    prefix = Claims(f"{folder}/{PREFIX}", storage)
    assert prefix.create(3, Content(ELSEWHERE, "x"))
    begun = time.monotonic()
    packed(place, numbered_samples(1))
    assert time.monotonic() - begun > 2.0
    assert prefix.create(3, Content(ELSEWHERE, "x"))
    renewing = threading.Timer(0.5, prefix.renew, (3, Content(ELSEWHERE, "x", 1)))
    renewing.start()
    with pytest.raises(DataError, match="another `betakd pack`, process 7 on elsewhere, is writing"):
        packed(place, numbered_samples(2))
    renewing.join()
    assert ids(place, "*") == numbers(0)


def test_packings_of_several_prefixes_at_once_lose_no_entry_of_the_manifest(place: Place) -> None:
    together = threading.Barrier(4)

    def begin(prefix: str) -> None:
        together.wait()
        for _ in range(3):
            packed(place, numbered_samples(3), prefix=prefix)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(begin, "abcd"))
    assert len(read_manifest(*place)) == 8
    for prefix in "abcd":
        assert ids(place, f"{prefix}-*.tar") == numbers(0, 1, 2)


def test_an_index_that_is_made_during_a_packing_keeps_its_entries(tmp_path: Any) -> None:
    place = (str(tmp_path), StorageSpec())
    packed(place, numbered_samples(1), prefix="other")
    (tmp_path / "manifest.jsonl").unlink()

    def meanwhile() -> Iterator[dict[str, Any]]:
        yield from numbered_samples(2)
        index_shards([f"{tmp_path}/other-*.tar"], StorageSpec())

    packed(place, meanwhile())
    assert ids(place, "other-*") == numbers(0)
    assert ids(place, "train-*") == numbers(0, 1)


def test_a_claim_leaves_no_file_and_is_no_data(place: Place) -> None:
    folder, storage = place
    packed(place, numbered_samples(1))
    filesystem, path = manifest.open_store(folder, storage)
    before = filesystem.find(path)
    with claimed(f"{folder}/manifest.jsonl", "prefix-b", storage, waits=False):
        assert len(filesystem.find(path)) == len(before) + 1
        for pattern in ("*", "**"):
            assert ids(place, pattern) == numbers(0)
    assert filesystem.find(path) == before


def test_a_claim_is_renewed_while_it_is_held(tmp_path: Any) -> None:
    with claimed(f"{tmp_path}/manifest.jsonl", "change", StorageSpec(), waits=True) as claim:
        deadline = time.monotonic() + 20.0
        while (there := claim.claims.newest()[1]) is not None and not there.renewals:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert there is not None
        assert replace(there, renewals=0) == claim.content
        assert json.loads(json.dumps(asdict(there)))["holder"]["pid"] == os.getpid()
