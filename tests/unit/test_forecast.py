"""What `betakd plan` says, held to what a job really sends, reads and keeps."""

from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from betakd_ray.batch.packing import stack
from betakd_ray.cli import app
from betakd_ray.data.ledger import Ledger
from betakd_ray.data.pack import pack
from betakd_ray.errors import DataError, ModelError
from betakd_ray.forecast.forecast import Forecast, feasibility, forecast, signal_bytes
from betakd_ray.forecast.memory import teacher_model
from betakd_ray.forecast.samples import AssumedData, SampleSize
from betakd_ray.job import BetaKDJob
from betakd_ray.on_ray.cluster import Demand
from betakd_ray.spec import PoolSpec, StorageSpec, parse_spec
from betakd_ray.teacher.parts import Needs
from betakd_ray.teacher.scorer import TeacherScorer
from tests.tiny import IMAGE_TOKENS, VOCAB, numbered_samples, save_tiny

ASSUMED = AssumedData(samples=1000, prompt_tokens=20, answer_tokens=30, samples_per_shard=300)


def _job(folder: Path, **sections: Any) -> BetaKDJob:
    if not (folder / "teacher").exists():
        save_tiny(folder / "teacher", hidden=32)
        save_tiny(folder / "student")
    tree: dict[str, Any] = {
        "name": "planned",
        "data": {"train": str(folder / "shards/*.tar")},
        "teacher": {"path": str(folder / "teacher")},
        "student": {"init": {"kind": "checkpoint", "path": str(folder / "student")}},
        "objective": {"energies": ["fkl"]},
        "training": {"global_batch_size": 8, "micro_batch_size": 4, "epochs": 2},
        "output": str(folder / "runs"),
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return BetaKDJob(parse_spec(tree))


def _table(found: Forecast) -> dict[str, str]:
    return {quantity: value for _, quantity, value in found.rows()}


def test_it_counts_the_shards_that_are_there_and_writes_nothing(tmp_path: Path) -> None:
    pack(numbered_samples(50), str(tmp_path / "shards"), samples_per_shard=20, storage=StorageSpec())
    found = forecast(_job(tmp_path))
    assert (len(found.plan.shards), found.plan.samples) == (3, 100)
    assert (found.total_steps, found.tail) == (12, 4)
    assert found.sample.answer_tokens > 3
    assert 0 < found.sample.image_tokens < IMAGE_TOKENS  # some samples are text only
    assert not (tmp_path / "runs").exists()


def test_a_weight_counts_in_samples_and_not_in_what_the_cache_holds(tmp_path: Path) -> None:
    pack(numbered_samples(50), str(tmp_path / "shards"), samples_per_shard=20, storage=StorageSpec())
    plain = forecast(_job(tmp_path))
    train = {"path": str(tmp_path / "shards/*.tar"), "weight": 1.5}
    found = forecast(_job(tmp_path, data={"train": train}))
    assert found.plan.samples == 150
    assert found.cache == plain.cache
    assert _table(found)["shards, found"] == "3, in 6 passes an epoch"


def test_what_is_wrong_is_said_as_fit_says_it(tmp_path: Path) -> None:
    for job, error in ((_job(tmp_path), DataError), (_job(tmp_path, teacher={"path": "./nowhere"}), ModelError)):
        with pytest.raises(error) as planned:
            forecast(job)
        with pytest.raises(error) as fitted:
            job.check()
        assert str(planned.value) == str(fitted.value)


def test_data_can_be_assumed(tmp_path: Path) -> None:
    found = forecast(_job(tmp_path), ASSUMED)
    assert [shard.samples for shard in found.plan.shards] == [300, 300, 300, 100]
    assert found.sample.answer_tokens == 30
    assert found.sample.image_tokens == IMAGE_TOKENS
    with pytest.raises(DataError, match=r"data\.max_length is 80; .* Raise data\.max_length, or assume fewer tokens"):
        forecast(_job(tmp_path, data={"max_length": 80}), ASSUMED)
    with pytest.raises(DataError, match=r"data\.max_length: has no room for one image"):
        forecast(_job(tmp_path, data={"max_length": 8}), ASSUMED)


@pytest.mark.parametrize(
    ("objective", "teacher"),
    [
        ({"energies": ["fkl"], "weighting": "task"}, {}),
        ({"energies": ["fkl", "fd"], "weighting": "instance"}, {"dtype": "bfloat16"}),
        ({"energies": ["fkl", {"kind": "fd", "layer": {"teacher": 1, "student": 2}}], "weighting": "equal"}, {}),
        ({"energies": ["fkl"]}, {"signal": {"kind": "top_k", "k": 8}}),
        ({"energies": ["align_attention", {"kind": "align_topk", "tokens": 2}], "weighting": "equal"}, {}),
    ],
    ids=str,
)
def test_the_teachers_answer_has_the_bytes_that_were_promised(tmp_path, objective, teacher) -> None:
    job = _job(tmp_path, objective=objective, teacher=teacher)
    spec = job.spec
    assert spec.teacher
    renderer = job.renderers()["student"]
    inputs = stack([ASSUMED.rendering(renderer)] * 3, renderer.pad_token_id, renderer.image_token_id)
    needs = Needs.of(spec.teacher, spec.objective, VOCAB)
    answer = TeacherScorer(spec.teacher, needs).score(inputs)
    sent = sum(array.nbytes for array in answer.arrays.values())
    model = teacher_model(spec.teacher, needs, inputs, renderer.processor)
    assert signal_bytes(needs, model, SampleSize.of(inputs)) == pytest.approx(sent / 3)


def test_the_ledger_is_no_larger_than_was_promised(tmp_path: Path) -> None:
    found = forecast(_job(tmp_path), AssumedData(3_000_000, 8, 8, samples_per_shard=1000))
    at_most, each = found.ledger
    ledger, rng = Ledger([shard.samples for shard in found.plan.shards]), np.random.default_rng(0)
    for epoch in range(2):
        ledger._completed(epoch)[:] = rng.random(3000) < 0.5
    assert len(ledger.to_json()) == pytest.approx(at_most, rel=0.1)
    assert each == 1000 // 6


def test_speeds_are_said_only_where_they_are_assumed(tmp_path: Path) -> None:
    assert not any("speed" in section for section, *_ in forecast(_job(tmp_path), ASSUMED).rows())
    found = forecast(_job(tmp_path), ASSUMED, tflops=1e-3)
    slower = forecast(_job(tmp_path, training={"gradient_checkpointing": True}), ASSUMED, tflops=1e-3)
    assert found.teacher
    assert found.student_speed(1e-3) == pytest.approx(1e9 / (6 * found.student.parameters * found.sample.tokens))
    assert slower.student_speed(1e-3) == pytest.approx(found.student_speed(1e-3) * 6 / 8)
    assert found.teacher_speed(1e-3) == pytest.approx(1e9 / (2 * found.teacher.parameters * found.sample.tokens))


def test_a_larger_teacher_is_spread_over_gpus_that_take_turns(tmp_path: Path) -> None:
    one, two = (forecast(_job(tmp_path, cluster={"teacher": {"gpus": n}}), ASSUMED, tflops=1e-3) for n in (1, 2))
    assert one.teacher
    assert two.teacher
    assert one.teacher.largest_share == one.teacher.weights
    assert one.teacher.weights / 2 <= two.teacher.largest_share < one.teacher.weights
    assert two.teacher_speed(1e-3) == one.teacher_speed(1e-3)
    assert "weights on its fullest GPU" in _table(two)
    assert "weights on its fullest GPU" not in _table(one)


@pytest.mark.parametrize(("stage", "times"), [(0, 2), (1, 2), (2, 3)])
def test_ranks_send_their_gradients_and_weights_in_rings(tmp_path: Path, stage: int, times: int) -> None:
    training = {"zero_stage": stage, "workers": 4, "micro_batch_size": 1, "precision": "fp32"}  # two of them a step
    found = forecast(_job(tmp_path, training=training), ASSUMED)
    assert found.exchanged == pytest.approx(times * 4 * found.student.trained * 3 / 4)
    assert "gradients and weights from each rank, a step" in _table(found)


def test_what_a_rank_keeps_with_the_teachers_is_a_step_and_a_window_of_groups(tmp_path: Path) -> None:
    found = forecast(_job(tmp_path, teacher={"window": 3, "batch_tokens": 4096}), ASSUMED)
    samples = found.spec.training.global_batch_size + 3 * 4096 / found.sample.tokens
    assert found.held == pytest.approx(samples * (found.sample.bytes + found.signal))


def test_gpus_are_counted_where_the_spec_says_how_many(tmp_path: Path) -> None:
    pools = {"teacher": {"gpus": 2, "min": 3}, "student": {"gpus": 1}}
    training = {"workers": 2}
    assert forecast(_job(tmp_path, cluster=pools, training=training), ASSUMED).gpus == 8
    assert forecast(_job(tmp_path), ASSUMED).gpus is None


def test_a_pool_has_room_or_waits_for_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = _job(tmp_path, cluster={"address": "10.0.0.1:6379", "start_timeout_s": 90}).spec
    pools = (("teacher", 4), ("student", 8))
    wanted = [Demand.of(pool, count, PoolSpec(cpus=2), 1.0, "Lower it") for pool, count in pools]
    monkeypatch.setattr("betakd_ray.forecast.forecast.connected", nullcontext)
    monkeypatch.setattr("betakd_ray.forecast.forecast.check_feasible", lambda spec: [(wanted[0], 4), (wanted[1], 3)])
    assert list(feasibility(spec)) == [
        ("cluster at 10.0.0.1:6379", "teacher", "4 × (1 GPUs, 2 CPUs): has room"),
        ("cluster at 10.0.0.1:6379", "student", "8 × (1 GPUs, 2 CPUs): room for 3 now, waits for nodes up to 90 s"),
    ]


def test_the_command_prints_it(tmp_path: Path) -> None:
    job = _job(tmp_path)
    (tmp_path / "job.yaml").write_text(job.spec.model_dump_json())
    arguments = ["plan", str(tmp_path / "job.yaml"), "--samples", "1000", "--tokens-per-answer", "30"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0
    assert "steps                                          250 of 8 samples" in shown.output
    assert "memory of a student rank (of 1)" in shown.output
    assert CliRunner().invoke(app, arguments[:2]).exit_code == 2
    assert len(_table(forecast(job, ASSUMED))) > len(fields(Forecast))
