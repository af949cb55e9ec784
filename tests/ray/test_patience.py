"""A whole job of two ranks whose teachers take longer to come back than any collective may take."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.data.pack import pack
from betakd_ray.job import BetaKDJob
from betakd_ray.run.audit import audit
from betakd_ray.spec import StorageSpec, parse_spec
from betakd_ray.teacher import sharing
from betakd_ray.teacher.answers import GroupAnswer
from betakd_ray.teacher.pool import TeacherPool
from betakd_ray.teacher.scorer import TeacherScorer
from tests.tiny import numbered_samples, save_tiny

LIMIT_S = 10.0
"""Value of `collective_timeout_s`, in seconds, long enough for two processes that start on a busy machine."""
DEADLY_TOKENS = 100
LOADED = "loaded"


class SlowToReturn(TeacherScorer):
    """Teacher that loads at once the first time, later in three times the ranks' limit, and dies of long samples."""

    def __init__(self, spec: Any, needs: Any) -> None:
        marker = Path(spec.path) / LOADED
        if marker.exists():
            time.sleep(3 * LIMIT_S)
        marker.touch()
        super().__init__(spec, needs)

    def score(self, inputs: ModelInputs) -> GroupAnswer:
        is_blank = len(np.unique(inputs.input_ids)) <= 2  # but for the tokens of its image
        if inputs.input_ids.shape[1] > DEADLY_TOKENS and not is_blank:
            os._exit(1)
        return super().score(inputs)


class Pool(TeacherPool):
    """Pool of teachers that are slow to return."""

    def _engine(self) -> type[TeacherScorer]:
        return SlowToReturn


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_students_wait_for_a_slow_teacher_and_for_the_search_of_a_deadly_sample(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "TeacherPool", Pool)
    save_tiny(tmp_path / "teacher", hidden=32, seed=1)
    save_tiny(tmp_path / "student", hidden=16, seed=2)
    samples = numbered_samples(48)
    samples[20]["conversations"][1]["value"] = "It is twenty. " * 40
    pack(samples, str(tmp_path / "shards"), samples_per_shard=12)
    spec = parse_spec(
        {
            "name": "patient",
            "data": {"train": str(tmp_path / "shards" / "*.tar"), "max_bad_fraction": 0.1},
            "teacher": {"path": str(tmp_path / "teacher"), "batch_tokens": 200, "timeout_s": 60, "check": "off"},
            "student": {"init": {"kind": "checkpoint", "path": str(tmp_path / "student")}},
            "objective": {"energies": ["fkl"], "weighting": "instance"},
            "training": {
                "global_batch_size": 8,
                "workers": 2,
                "precision": "fp32",
                "checkpoint_every": 1,
                "keep": 100,
                "collective_timeout_s": LIMIT_S,
            },
            "cluster": {"teacher": {"max_restarts": 20}},
            "output": str(tmp_path / "runs"),
            "tracking": {"progress": False},
        }
    )
    begin = time.monotonic()
    result = BetaKDJob(spec).fit()
    assert time.monotonic() - begin > 6 * LIMIT_S  # it did have to wait
    assert result.quarantined == 1
    assert result.consumed + result.tail + 1 == result.planned == 48
    attempts = {name.rpartition("-")[2] for name in os.listdir(Path(result.path) / "checkpoints")}
    assert len(attempts) == 1  # each start of the workers has another
    assert not audit(result.path, StorageSpec()).problems
