"""A whole job on a local cluster: shards and output in a real S3 server, one teacher, two student workers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import yaml

from betakd_ray.data.pack import pack
from betakd_ray.errors import ClusterError, OutputError, TooManyBadSamples
from betakd_ray.job import BetaKDJob, JobResult
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.metrics import read_metrics
from betakd_ray.spec import (
    DataSpec,
    JobSpec,
    OutputSpec,
    QuestionsSpec,
    StorageSpec,
    SweepSpec,
    parse_spec,
)
from betakd_ray.storage import open_store
from betakd_ray.sweep import Sweep
from betakd_ray.teacher.sharing import start_pool
from tests.nodes import title
from tests.s3 import SeaweedServer
from tests.tiny import numbered_samples, save_tiny

REPOSITORY = Path(__file__).parents[2]
SAMPLES = 96
BATCH = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "teacher", hidden=32, seed=1)
    save_tiny(folder / "student", hidden=16, seed=2)
    return folder


def _spec(s3: SeaweedServer, models: Path, name: str, **training: object) -> JobSpec:
    storage = {"endpoint_url": s3.endpoint_url, "region": "us-east-1"}
    return parse_spec(
        {
            "name": name,
            "data": {
                "train": f"s3://{s3.bucket}/{name}/shards/train-*.tar",
                "storage": storage,
                "max_bad_fraction": 0.5,
                "template": "tests.plugins:line_by_line",
            },
            # What a user adds from a module of their own goes through the same actors and workers.
            "teacher": {"path": str(models / "teacher"), "engine": "tests.plugins:OwnScorer"},
            "student": {"init": {"kind": "checkpoint", "path": str(models / "student")}},
            "objective": {"energies": ["fkl", "fd", "tests.plugins:brier"], "weighting": "instance"},
            "optimizer": {"lr": 1e-3},
            "training": {
                "epochs": 2,
                "global_batch_size": BATCH,
                "micro_batch_size": 2,
                "workers": 2,
                "precision": "fp32",
                "log_every": 1,
                "checkpoint_every": 4,
                **training,
            },
            "cluster": {"student": {"cpus": 1}, "readers": {"gpus": 0, "cpus": 1}},
            "output": {"path": f"s3://{s3.bucket}/{name}/runs", "storage": storage},
            "tracking": {"progress": False},
        }
    )


@pytest.mark.timeout(400)
def test_every_planned_sample_is_used_once_or_quarantined_or_in_the_tail(
    s3: SeaweedServer, ray_cluster: str, models: Path
) -> None:
    spec = _spec(s3, models, "whole")
    pack(
        numbered_samples(SAMPLES, broken=40),
        f"s3://{s3.bucket}/whole/shards",
        samples_per_shard=17,
        storage=spec.data.storage,
    )
    result = BetaKDJob(spec).fit()
    assert result.quarantined == 2  # the broken image, once an epoch
    assert result.planned == 2 * SAMPLES
    assert result.planned == result.steps * BATCH + result.quarantined + result.tail
    assert result.consumed == result.steps * BATCH  # distinct samples in the ledger: none doubled, none lost
    assert result.tail < BATCH
    _the_history_has_each_step_once(spec, result)
    _the_result_loads_without_this_package(spec, result)
    with pytest.raises(OutputError, match="holds another job"):
        BetaKDJob(_spec(s3, models, "whole", epochs=1)).fit()
    assert BetaKDJob(spec).fit() == result  # done already


def _the_history_has_each_step_once(spec: JobSpec, result: JobResult) -> None:
    history = read_metrics(result.path, spec.output.storage)
    assert [record["step"] for record in history] == list(range(1, result.steps + 1))
    assert history[-1]["energy/ce"] < history[0]["energy/ce"]


def _the_result_loads_without_this_package(spec: JobSpec, result: JobResult) -> None:
    import tempfile

    from transformers import AutoModelForImageTextToText, AutoProcessor

    filesystem, root = open_store(result.model, StorageSpec.model_validate(spec.output.storage.model_dump()))
    with tempfile.TemporaryDirectory() as folder:
        filesystem.get(root + "/", folder + "/", recursive=True)
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert model.config.text_config.hidden_size == 16
        assert AutoProcessor.from_pretrained(folder).image_token_id == model.config.image_token_id


@pytest.mark.timeout(600)
def test_a_killed_driver_pool_and_worker_lose_and_double_nothing(
    s3: SeaweedServer, ray_cluster: str, models: Path, tmp_path: Path
) -> None:
    spec = _spec(s3, models, "killed")
    pack(
        numbered_samples(SAMPLES, broken=4),
        f"s3://{s3.bucket}/killed/shards",
        samples_per_shard=17,
        storage=spec.data.storage,
    )
    file = tmp_path / "killed.yaml"
    file.write_text(spec.model_dump_json())  # JSON is YAML

    command = [sys.executable, str(REPOSITORY / "jobs" / "distill.py"), "--spec", str(file)]
    driver = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "RAY_ADDRESS": ray_cluster})
    first = _wait_for_a_checkpoint(spec, after=0, has_ended=lambda: driver.poll() is not None)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL  # it was still at work

    with ThreadPoolExecutor(max_workers=1) as executor:
        before = _processes("TeacherPool")
        running = executor.submit(BetaKDJob(spec).fit)
        while not (pools := [pool for pool in _processes("TeacherPool") if pool not in before]):
            time.sleep(0.05)
        pools[0].kill()
        second = _wait_for_a_checkpoint(spec, after=first, has_ended=running.done)
        assert not running.done()
        _processes("RayTrainWorker")[0].kill()
        result = running.result()

    assert result.steps > second
    assert result.quarantined == 2
    assert result.planned == result.steps * BATCH + result.quarantined + result.tail
    assert result.consumed == result.steps * BATCH
    assert result.tail < BATCH
    _the_history_has_each_step_once(spec, result)


def _wait_for_a_checkpoint(spec: JobSpec, after: int, has_ended: Callable[[], bool]) -> int:
    """Wait for the first committed checkpoint after step `after`, and return its step."""
    store = CheckpointStore(BetaKDJob(spec).run, spec.output.storage)
    while not has_ended():
        newest = store.latest()
        if newest and newest.step > after:
            return newest.step
        time.sleep(0.05)
    raise AssertionError("the job ended before another checkpoint")


def _processes(role: str) -> list[psutil.Process]:
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if role in title(process)]


@pytest.mark.timeout(300)
def test_a_grid_asks_the_teacher_once_and_is_resumable(ray_cluster: str, models: Path, tmp_path: Path) -> None:
    pack(numbered_samples(24), str(tmp_path / "shards"))
    template = {
        "name": "template",
        "data": {"train": str(tmp_path / "shards" / "*.tar"), "shuffle": False},
        "teacher": {"path": str(models / "teacher"), "cache": str(tmp_path / "signals")},
        "student": {"init": {"kind": "checkpoint", "path": str(models / "student")}},
        "objective": {"energies": ["cosine_probs"]},
        "training": {
            "max_steps": 3,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "precision": "fp32",
            "zero_stage": 0,
            "log_every": 1,
        },
        "tracking": {"progress": False},
    }
    (tmp_path / "template.yaml").write_text(yaml.safe_dump(template))
    sweep = Sweep(
        SweepSpec(
            name="grid",
            template=str(tmp_path / "template.yaml"),
            axes={"objective.weighting": ("equal", "task", "instance")},
            parallel=2,
            evaluation=QuestionsSpec(data=DataSpec(train=(str(tmp_path / "shards" / "*.tar"),)), max_new_tokens=2),
            output=OutputSpec(path=str(tmp_path / "out")),
        )
    )
    with patch("betakd_ray.teacher.sharing.start_pool", wraps=start_pool) as started:
        rows = sweep.run()
    assert started.call_count == 1  # and serves every cell, though only the last asks for features
    assert [row["objective.weighting"] for row in rows] == ["equal", "task", "instance"]
    assert all({"loss", "accuracy"} <= row.keys() for row in rows)
    busy = [_busy(tmp_path / "out" / "grid" / cell.job.name) for cell in sweep.cells]
    assert min(busy[0]) > 0
    assert max(busy[1] + busy[2]) == 0  # the others found every answer in the cache
    assert sweep.run() == rows
    assert (tmp_path / "out" / "grid" / "table.md").read_text().count("\n") == 5


def _busy(run: Path) -> list[float]:
    return [record["teacher_busy"] for record in read_metrics(str(run))]


@pytest.mark.timeout(300)
def test_too_many_bad_samples_stop_the_job_and_name_the_last(ray_cluster: str, s3: SeaweedServer, models: Path) -> None:
    tree = _spec(s3, models, "bad").model_dump(mode="json")
    tree["data"]["max_bad_fraction"] = 0.005
    pack(numbered_samples(16, broken=4), f"s3://{s3.bucket}/bad/shards", storage=parse_spec(tree).data.storage)
    with pytest.raises(TooManyBadSamples, match=r"max_bad_fraction.*cannot be decoded"):
        BetaKDJob(parse_spec(tree)).fit()


def test_gpus_that_the_cluster_cannot_have_are_an_error_before_any_training(
    s3: SeaweedServer, ray_cluster: str, models: Path
) -> None:
    spec = _spec(s3, models, "greedy")
    pack(numbered_samples(16), f"s3://{s3.bucket}/greedy/shards", storage=spec.data.storage)
    tree = spec.model_dump(mode="json")
    tree["cluster"]["teacher"]["gpus"] = 4
    with pytest.raises(ClusterError, match=r"teacher.*4 GPUs"):
        BetaKDJob(parse_spec(tree)).fit()
