"""Evaluation during training: equal on all ranks, and the training goes on as if there were none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from betakd_ray.batch.packing import stack
from betakd_ray.batch.sample import Rendering
from betakd_ray.data.held_out import HeldOutData
from betakd_ray.data.manifest import find_shards
from betakd_ray.data.mixture import find_passes
from betakd_ray.data.pack import pack
from betakd_ray.data.plan import Plan
from betakd_ray.data.render import Renderer
from betakd_ray.errors import DataError
from betakd_ray.job import BetaKDJob
from betakd_ray.spec import JobSpec, parse_spec
from betakd_ray.teacher.answers import Answer
from betakd_ray.teacher.scorer import TeacherScorer
from betakd_ray.train.held_out import HeldOut
from betakd_ray.train.learner import Learner
from tests.learning import Study, collator_of, spawned
from tests.tiny import job_tree, numbered_samples, raw_sample, save_tiny

STEPS, SAMPLES = 3, 10


def spec_of(home: Path, **changed: Any) -> JobSpec:
    tree = job_tree(home, home / "out") | {
        "objective": {"energies": ["fkl", "ctkd"], "weighting": "instance"},
        "evaluation": {"data": str(home / "shards" / "held-*.tar"), "every": 2, "samples": SAMPLES},
        "optimizer": {"lr": 1e-2, "beta_lr": 1e-2, "warmup_fraction": 0.0},
    }
    tree["training"] |= {"zero_stage": 0, "precision": "fp32"}
    return parse_spec(tree | changed)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    save_tiny(folder / "teacher", seed=1)
    save_tiny(folder / "student", seed=2)
    for prefix, count, broken in (("train", 16, None), ("held", 14, 4)):
        pack(numbered_samples(count, broken), str(folder / "shards"), prefix=prefix, total=count)
    return folder


def data_of(spec: JobSpec) -> HeldOutData:
    found = HeldOutData.of(spec, Plan.of(find_passes(spec.data), 1, 0, True), BetaKDJob(spec).renderers())
    assert found is not None
    return found


class LocalTeacher:
    """The teacher in this process."""

    def __init__(self, scorer: TeacherScorer, view: Renderer) -> None:
        self._scorer, self._view = scorer, view

    def score(self, group: Sequence[Rendering]) -> Answer:
        inputs = stack(group, self._view.pad_token_id, self._view.image_token_id)
        return Answer(self._scorer.score(inputs).signals(), {}, 0.0)


def _held_out(spec: JobSpec, learner: Learner) -> HeldOut:
    assert spec.teacher is not None
    job = BetaKDJob(spec)
    view, needs = job.renderers()["student"], job.needs(spec.teacher)
    scorer = TeacherScorer(spec.teacher, needs)
    collator = collator_of(spec, view, needs, scorer.facts())
    return HeldOut.of(data_of(spec), collator, LocalTeacher(scorer, view), learner.host_group)


def _trained(home: Path, ranks: int, zero: int, evaluates: bool) -> tuple[list[float], list[dict[str, float]]]:
    """Return the losses of some steps, and what was found after each; after the first step twice."""
    spec = spec_of(home, training={"global_batch_size": 4, "workers": ranks, "zero_stage": zero, "precision": "fp32"})
    study = Study.of(spec, [raw_sample(at, "It is blue.", has_image=at % 2 == 0) for at in range(4)])
    held_out = _held_out(spec, study.learner) if evaluates else None
    records, losses = [], []
    for number in range(1, STEPS + 1):
        losses += study.steps(1)
        if held_out:
            state = torch.get_rng_state()
            records += [held_out.evaluate(study.learner) for _ in range(1 + (number == 1))]
            assert torch.equal(torch.get_rng_state(), state)
    return losses, records


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 2), (2, 3)])
def test_the_losses_of_the_training_are_the_same_to_the_last_digit(
    home: Path, tmp_path: Path, ranks: int, zero: int
) -> None:
    folders = [tmp_path / name for name in ("with", "without")]
    for folder in folders:
        folder.mkdir()
    evaluated, records = spawned(_trained, folders[0], home, ranks, zero, True, ranks=ranks)
    plain, _ = spawned(_trained, folders[1], home, ranks, zero, False, ranks=ranks)
    assert evaluated == plain
    assert records[0] == records[1], "two evaluations of the same weights are equal"
    assert records[1]["eval/loss"] != records[2]["eval/loss"], "the weights have changed"
    # Of the first ten samples, one has a broken image.
    assert (records[0]["eval/samples"], records[0]["eval/dropped_samples"]) == (SAMPLES - 1, 1)
    assert {"eval/energy/ce", "eval/energy/fkl", "eval/energy/ctkd", "eval/top1_agreement"} <= records[0].keys()


def test_each_rank_has_its_part_of_the_same_samples(home: Path) -> None:
    data = data_of(spec_of(home))
    whole = [sample.key if sample else None for sample in data.part(0, 1)]
    assert len(whole) == SAMPLES
    assert whole.count(None) == 1
    parts = [[sample.key if sample else None for sample in data.part(rank, 3)] for rank in range(3)]
    assert [parts[at % 3][at // 3] for at in range(SAMPLES)] == whole


def test_shards_that_are_trained_on_are_no_held_out_ones(home: Path) -> None:
    with pytest.raises(DataError, match=r"evaluation.data: .*train-.*is also in data.train"):
        data_of(spec_of(home, evaluation={"data": str(home / "shards" / "*.tar")}))
    (held,) = {shard.url for shard in find_shards([str(home / "shards" / "held-*.tar")], spec_of(home).data.storage)}
    with pytest.raises(DataError, match=r"is also in data\.train"):
        data_of(spec_of(home, data={"train": held}))
    with pytest.raises(DataError):
        data_of(spec_of(home, evaluation={"data": str(home / "shards" / "none-*.tar")}))


def test_a_job_without_the_section_has_no_held_out_data(home: Path) -> None:
    spec = spec_of(home, evaluation=None)
    assert HeldOutData.of(spec, Plan.of(find_passes(spec.data), 1, 0, True), {}) is None
