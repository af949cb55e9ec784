"""ZeRO-3 with a parameter that no module of its own holds: LLaVA-NeXT's `image_newline`, of every row of crops."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from betakd_ray.models.student import build_student
from betakd_ray.run.lease import Permit
from betakd_ray.spec import JobSpec, StorageSpec, parse_spec
from betakd_ray.train.export import export_student
from tests.families import FAMILIES
from tests.learning import Study, spawned
from tests.tiny import raw_sample

NEXT = FAMILIES["llava_next"]
SAVED = "model/model.safetensors"


def spec(home: Path, stage: int) -> JobSpec:
    # Else DeepSpeed would leave parameters as small as these whole.
    zero = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return parse_spec(
        {
            "name": f"zero-{stage}",
            "data": {"train": "unused.tar"},
            "student": {"init": {"kind": "config", "config": NEXT.config(), "processor": str(home)}},
            "objective": {"weighting": "equal"},
            "optimizer": {"lr": 1e-2, "warmup_fraction": 0},
            "training": {
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "zero_stage": stage,
                "precision": "fp32",
                "deepspeed": {"zero_optimization": zero},
            },
        }
    )


def learn(home: Path, stages: tuple[int, ...]) -> dict[int, list[float]]:
    found = {}
    for stage in stages:
        job = spec(home, stage)
        study = Study.of(job, [raw_sample(at, f"It is {at}.", has_image=at < 3) for at in range(4)])
        found[stage] = study.steps(3)
        export_student(study.learner.engine, job, Permit(str(home / job.name), StorageSpec()), {})
    return found


@pytest.mark.timeout(600)
def test_stage_3_trains_it_as_stage_0_does(tmp_path: Path) -> None:
    NEXT.processor().save_pretrained(tmp_path)
    losses = spawned(learn, tmp_path, tmp_path, (0, 3))
    assert losses[3] == pytest.approx(losses[0], rel=1e-5)
    weights: list[dict[str, Any]] = [load_file(tmp_path / f"zero-{stage}" / SAVED) for stage in (0, 3)]
    (newline,) = (name for name in weights[0] if "image_newline" in name)
    torch.testing.assert_close(weights[1][newline], weights[0][newline], rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    before: Any = build_student(spec(tmp_path, 3).student, torch.float32)
    assert not torch.equal(weights[1][newline], before.model.image_newline)
