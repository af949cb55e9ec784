"""The result of a finished job, and the files with which a run is finished."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from betakd_ray.data.plan import Plan
from betakd_ray.output import output_errors
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.folder import MODEL, QUARANTINE, RESULT
from betakd_ray.run.lease import Permit
from betakd_ray.run.metrics import to_jsonl
from betakd_ray.run.plan import tail_of, write_tail
from betakd_ray.spec import JobSpec
from betakd_ray.storage import join, open_store, replace_file


@dataclass(frozen=True)
class JobResult:
    """Result of a finished job."""

    name: str
    path: str
    """Folder of the run, with metrics.jsonl, quarantine.jsonl, checkpoints/ and model/."""
    model: str
    """Folder that transformers' `from_pretrained` loads."""
    metrics: dict[str, Any]
    """Metrics of the last step that was logged."""
    steps: int
    planned: int
    """Number of samples over all epochs."""
    consumed: int
    """Number of samples that took part in a step."""
    quarantined: int
    tail: int
    """Number of samples left over: fewer than one global batch, or beyond `training.max_steps`."""
    skipped_steps: int
    """Number of steps that were skipped because a gradient was not finite."""
    token: int = 0
    """Token of the driver that finished the job (`run.lease`): it is also in the last checkpoint and in the model."""


def conclude(spec: JobSpec, run: str, permit: Permit, outcome: dict[str, Any], plan: Plan) -> JobResult:
    """Write the tail, the quarantine and the result of a job whose workers have ended; return the result.

    `outcome` is what rank 0 returned. Raises OutputError, and RunTaken if another driver has taken the run over.
    """
    storage = spec.output.storage
    store = CheckpointStore(run, storage)
    last = store.latest()
    assert last is not None  # the workers saved it before they returned
    ledger, quarantined = store.ledger(last, plan), store.quarantined(last, plan)
    permit.check()
    write_tail(run, storage, tail_of(plan, ledger, quarantined, spec.training.global_batch_size))
    result = JobResult(
        name=spec.name,
        path=run,
        model=join(run, MODEL),
        metrics=outcome["metrics"],
        steps=last.step,
        planned=plan.samples,
        consumed=ledger.count,
        quarantined=len(quarantined),
        tail=plan.samples - ledger.count - len(quarantined),
        skipped_steps=outcome["skipped_steps"],
        token=permit.token,
    )
    filesystem, root = open_store(run, storage)
    with output_errors(run):
        replace_file(filesystem, join(root, QUARANTINE), to_jsonl(map(asdict, quarantined)).encode())
        # Last, because this file makes the job a finished one.
        replace_file(filesystem, join(root, RESULT), json.dumps(asdict(result), indent=2).encode())
    return result
