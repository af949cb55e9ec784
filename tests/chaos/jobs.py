"""The job that is disturbed: tiny models, and shards and output in an object store."""

import re
from pathlib import Path
from typing import Any

from betakd_ray.spec import JobSpec, parse_spec
from tests.tiny import save_tiny

SHARDS = "shards"
"""Folder of the shards in the bucket."""


def save_models(folder: Path) -> None:
    """Write the teacher and the student to start from into a folder."""
    save_tiny(folder / "teacher", hidden=32, seed=1)
    save_tiny(folder / "student", hidden=16, seed=2)


def disturbed_job(
    name: str,
    bucket: str,
    models: Path,
    storage: dict[str, str],
    *,
    lr: float = 1e-3,
    batch_tokens: int = 8192,
    **training: Any,
) -> JobSpec:
    """Return the spec of a job that survives many failures; `training` has its epochs, workers and checkpoints."""
    return parse_spec(
        {
            "name": name,
            "data": {
                "train": f"s3://{bucket}/{SHARDS}/train-*.tar",
                "storage": storage,
                "shuffle": False,
                "max_bad_fraction": 0.5,
            },
            "teacher": {"path": str(models / "teacher"), "timeout_s": 60, "batch_tokens": batch_tokens},
            "student": {"init": {"kind": "checkpoint", "path": str(models / "student")}},
            "objective": {"energies": ["fkl", "fd"], "weighting": "instance"},
            "optimizer": {"lr": lr},
            "training": {
                "global_batch_size": 6,
                "micro_batch_size": 3,
                "precision": "fp32",
                "log_every": 1,
                "max_failures": 20,
                "collective_timeout_s": 40,
                **training,
            },
            "cluster": {
                "teacher": {"resources": {"teacher_slot": 1}, "max_restarts": 10},
                "student": {"resources": {"student_slot": 1}},
            },
            "output": {"path": f"s3://{bucket}/runs", "storage": storage},
            "tracking": {"progress": False},
        }
    )


def altered(shard: bytes) -> bytes:
    """Return a shard of `numbered_samples` with other answers: as long, and a whole tar as well."""
    other = re.sub(rb"It is (\d)", lambda found: b"It is %d" % (9 - int(found[1])), shard)
    if other == shard or len(other) != len(shard):
        raise ValueError("the shard is not one of numbered_samples: it has no answer 'It is NUMBER.'")
    return other
