"""The easy-VQA questions of the recipes: subsets and wrong answers follow their seed."""

import sys
from collections import Counter

import pytest

from betakd_ray.data.pack import pack
from betakd_ray.data.shards import read_shard
from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec
from jobs.easy_vqa.samples import _kind, easy_vqa_samples


def answers(**options):
    return {s["id"]: (s["conversations"][1]["value"], s["type"]) for s in easy_vqa_samples("train", **options)}


def test_easy_vqa_gives_questions_with_their_image_and_kind(tmp_path):
    shards = pack(easy_vqa_samples("test", limit=40), str(tmp_path))
    read = [sample for shard in shards for sample in read_shard(shard, StorageSpec())]
    assert len(read) == 40
    assert all(sample.id.startswith("test-") and sample.images[0].startswith(b"\x89PNG") for sample in read)
    assert {sample.extra["type"] for sample in read} == {"yes/no", "open"}


def test_easy_vqa_takes_a_seeded_subset():
    assert answers(limit=50) == answers(limit=50)
    assert set(answers(limit=50)) != set(answers(limit=50, seed=1))
    assert len(answers(limit=10**6)) == 38575


def test_wrong_answers_are_the_asked_fraction_and_of_the_same_kind():
    clean, noisy = answers(limit=4000), answers(limit=4000, wrong_answers=0.25)
    assert list(clean) == list(noisy)
    changed = [(clean[name][0], noisy[name][0]) for name in clean if clean[name] != noisy[name]]
    assert len(changed) == 1000
    assert all(_kind(before) == _kind(after) for before, after in changed)
    instead_of_red = Counter(after for before, after in changed if before == "red")
    assert set(instead_of_red) <= {"green", "gray", "teal", "black", "yellow", "brown", "blue"}
    assert len(instead_of_red) >= 5


def test_wrong_answers_may_be_any_other():
    clean, noisy = answers(limit=4000), answers(limit=4000, wrong_answers=0.25, instead="any")
    changed = [(clean[name][0], noisy[name][0]) for name in clean if clean[name] != noisy[name]]
    assert len(changed) == 1000
    instead_of_yes = Counter(after for before, after in changed if before == "yes")
    assert len(instead_of_yes) == 12
    assert instead_of_yes["no"] < 0.2 * instead_of_yes.total()


def test_a_missing_easy_vqa_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(DataError, match=r"pip install --no-deps easy-vqa==1\.0"):
        next(easy_vqa_samples("train"))
