"""Samples that are drawn for a check: always the same, from everywhere, and without reading more than is needed."""

from pathlib import Path
from typing import Any

import pytest

from betakd_ray.data import draw
from betakd_ray.data.draw import draw_samples
from betakd_ray.data.manifest import find_shards
from betakd_ray.data.pack import pack
from betakd_ray.data.plan import Pass, Plan
from betakd_ray.data.samples import BadSample, RawSample
from betakd_ray.data.shards import read_shard_with_retry
from betakd_ray.errors import DataError
from betakd_ray.spec import DataSpec, StorageSpec
from tests.tiny import numbered_samples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    """Return two folders: of 60 samples with broken ones, and of 12 without images."""
    folder = tmp_path_factory.mktemp("data")
    pack(numbered_samples(60), str(folder / "many"), samples_per_shard=10)
    texts = [{**sample, "id": f"t{sample['id']}"} for sample in numbered_samples(84) if not sample["images"]]
    pack(texts, str(folder / "texts"), samples_per_shard=3)
    return DataSpec(train=(str(folder / "many/*.tar"), str(folder / "texts/*.tar")))  # type: ignore[arg-type]


def plan_of(data: DataSpec, seed: int = 0) -> Plan:
    shards = find_shards(data.paths, StorageSpec())
    return Plan.of([Pass(shard, shard.samples) for shard in shards], 3, seed, True)


def ids(samples: list[RawSample]) -> list[str]:
    return [sample.id for sample in samples]


def test_the_draw_is_the_same_for_every_run_of_the_same_data(data: DataSpec) -> None:
    first = draw_samples(plan_of(data), data, 24)
    assert ids(first) == ids(draw_samples(plan_of(data, seed=7), data, 24))
    assert len(set(ids(first))) == len(first) == 24


def test_it_is_spread_over_folders_and_shards_and_mixes_both_kinds(data: DataSpec) -> None:
    first = draw_samples(plan_of(data), data, 24)[:16]
    assert sum(sample.id.startswith("t") for sample in first) >= 2
    assert len({int(sample.id) // 10 for sample in first if not sample.id.startswith("t")}) >= 3
    has_image = [bool(sample.images) for sample in first]
    assert 0 < has_image.count(False) <= 6
    assert has_image[:4] == [True, True, True, False]


def test_fewer_samples_than_asked_for_are_all_there_are(data: DataSpec) -> None:
    found = draw_samples(plan_of(data), data, 1000)
    # Of each shard no more than its share, and not of every shard.
    assert 20 < len(found) <= 72
    assert len(set(ids(found))) == len(found)


def test_only_the_beginning_of_a_large_shard_is_read(data: DataSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def read(*args: Any, **options: Any) -> Any:
        for sample in read_shard_with_retry(*args, **options):
            seen.append(sample.index)
            yield sample

    monkeypatch.setattr(draw, "read_shard_with_retry", read)
    monkeypatch.setattr(draw, "DEPTH", 2)
    monkeypatch.setattr(draw, "SHARDS", 8)
    found = draw_samples(plan_of(data), data, 8)
    assert len(seen) == len(found) == 8
    assert max(seen) < 2


def test_a_sample_that_cannot_be_used_is_left_out(data: DataSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: Any, **options: Any) -> Any:
        for sample in read_shard_with_retry(*args, **options):
            yield BadSample(sample.key, sample.index, "no answer") if sample.index == 0 else sample

    monkeypatch.setattr(draw, "read_shard_with_retry", read)
    found = draw_samples(plan_of(data), data, 72)
    assert found
    assert all(sample.index for sample in found)


def test_a_shard_that_is_gone_is_an_error_that_names_it(data: DataSpec, tmp_path: Path) -> None:
    pack(numbered_samples(4), str(tmp_path), samples_per_shard=4)
    gone = DataSpec(train=(f"{tmp_path}/*.tar",))  # type: ignore[arg-type]
    plan = plan_of(gone)
    next(tmp_path.glob("*.tar")).unlink()
    with pytest.raises(DataError, match=r"\.tar"):
        draw_samples(plan, gone, 4)
