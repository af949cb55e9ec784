"""A run that an earlier version began goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.folder import PROGRESS
from betakd_ray.run.metrics import read_metrics
from betakd_ray.spec import JobSpec, StorageSpec, parse_spec
from betakd_ray.tracking import MetricsWriter
from betakd_ray.train import checkpoint
from betakd_ray.train.loop import COUNTS
from tests.learning import Study, spawned
from tests.tiny import raw_sample, save_tiny

RUN = Path(__file__).parents[1] / "data" / "run-0.1.0"


def job(folder: Path) -> JobSpec:
    """Return the job that the run is of, with its models in `folder`."""
    return parse_spec(
        {
            "name": "before",
            "data": {"train": str(folder / "shards" / "*.tar")},
            "teacher": {"path": str(folder / "teacher")},
            "student": {"init": {"kind": "checkpoint", "path": str(folder / "student")}},
            "objective": {"energies": ["fkl", "fd"], "weighting": "instance"},
            "training": {
                "epochs": 2, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "zero_stage": 1,
            },
            "output": str(folder),
        }
    )  # fmt: skip


def resumed(folder: Path) -> dict[str, Any]:
    """Load the run's checkpoint into a new learner; return what it has then, and the loss of one more step."""
    study = Study.of(job(folder), [raw_sample(number, "yes", has_image=True) for number in range(4)])
    learner = study.learner
    store = CheckpointStore(str(folder / "before"), StorageSpec())
    manifest = store.latest()
    assert manifest
    with checkpoint.on_disk(store, manifest, "attempt", learner.host_group) as files:
        learner.load(files)
    weights = {name: weight.clone() for name, weight in learner.engine.module.state_dict().items()}
    beta = {name: value.clone() for name, value in learner.weighting.state_dict().items()}
    return {"steps": learner.engine.global_steps, "weights": weights, "beta": beta, "loss": study.steps(1)[0]}


def test_its_weights_its_beta_and_its_step_come_back(tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher", hidden=8, seed=1)
    save_tiny(tmp_path / "student", hidden=8, seed=2)
    shutil.copytree(RUN, tmp_path / "before")
    found = spawned(resumed, tmp_path, tmp_path)
    checkpoint = next((RUN / "checkpoints").iterdir())
    kept = torch.load(checkpoint / "deepspeed" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert found["steps"] == 6
    assert found["weights"].keys() >= kept.keys()
    assert all(torch.equal(found["weights"][name], weight) for name, weight in kept.items())
    beta = torch.load(checkpoint / "beta.pt", weights_only=True)["weighting"]
    assert all(torch.equal(found["beta"][name], value) for name, value in beta.items())
    assert 0 < found["loss"] < 7


def test_its_samples_and_its_metrics_come_back(tmp_path: Path) -> None:
    shutil.copytree(RUN, tmp_path / "before")
    run = str(tmp_path / "before")
    store = CheckpointStore(run, StorageSpec())
    manifest = store.latest()
    assert manifest
    assert store.ledger(manifest).count == 24
    assert not store.quarantined(manifest)
    progress = json.loads(store.read_text(manifest, PROGRESS))
    assert {name: progress[name] for name in COUNTS} == dict.fromkeys(COUNTS, 0) | {"samples": 24}
    reference = checkpoint.metrics_reference(store, manifest)
    metrics = MetricsWriter(job(tmp_path), run)
    metrics.restore(reference)
    metrics.log({"step": 7, "loss": 0.5})
    metrics.close()
    assert [record["step"] for record in read_metrics(run)] == list(range(1, 8))
