"""A run's folder belongs to one job: the job claims it at its first start, and recognises it later.

The run's spec.json and plan.json may be lost or replaced. So each checkpoint has the spec as well, and digests of the
plan, the models and the renderings. A resume compares them with what it would go on with.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from betakd_ray.data.plan import Plan
from betakd_ray.errors import OutputError, shortened
from betakd_ray.output import output_errors
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.files import SPEC_FILE, stored
from betakd_ray.run.folder import SPEC
from betakd_ray.run.plan import plan_digest
from betakd_ray.spec import JobSpec
from betakd_ray.storage import create_file, join, make_folder, open_store

FREE_TO_CHANGE = {
    "objective": ("chunk_rows",),
    "training": (
        "workers",
        "micro_batch_size",
        "micro_batch_tokens",
        "checkpoint_every",
        "keep",
        "log_every",
        "max_failures",
        "max_skipped_steps",
        "collective_timeout_s",
    ),
    "teacher": ("cache", "window", "timeout_s", "batch_tokens", "check"),
}
"""Fields that may differ between two runs of one job."""
PLAN_ORIGIN, VERSION = "plan", "version of "
"""Names of origins: that of the plan, and the start of those of packages."""
VERSIONS = (
    "betakd_ray",
    "torch",
    "transformers",
    "tokenizers",
    "deepspeed",
    "safetensors",
    "numpy",
    "pillow",
    "peft",
)
"""Packages whose versions are noted. They may differ: most updates change results by rounding at most.

A resume warns of them. If they change what the models see, the digest of the rendering differs. If they change what the
teacher answers, its canary differs (`train.teacher_checks`). Both end the resume.
"""
UPLOADED = "/working_dir_files/"
"""Part of the path of the folder in which a submitted job runs."""

NAMED = 6
"""Largest number of changed fields that a message names."""
_LOG = logging.getLogger(__name__)


def was_here(run: str, spec: JobSpec) -> bool:
    """Return whether the job of `spec` was started before in the folder `run`.

    Raises OutputError if the folder has another job, or if Ray will remove the folder.
    """
    if UPLOADED in run:
        raise OutputError(
            f"output.path: {run} is in the folder that `ray job submit --working-dir` uploaded, which Ray "
            "removes after the job. Give a URL, or an absolute path that remains after the cluster is gone."
        )
    there = stored(run, spec.output.storage, SPEC_FILE, partial(output_errors, run))
    if there is None:
        return False
    _require_same_job(run, there, spec)
    return True


def claim(run: str, spec: JobSpec) -> None:
    """Write spec.json, unless this same job was started before. Raises OutputError as `was_here`."""
    if was_here(run, spec):
        return
    filesystem, root = open_store(run, spec.output.storage)
    with output_errors(run):
        make_folder(filesystem, root)
        is_ours = create_file(filesystem, join(root, SPEC), spec.model_dump_json(indent=2).encode())
    if not is_ours:  # another driver was as fast, maybe with another job
        was_here(run, spec)


def origins_of(plan: Plan, digests: Mapping[str, str]) -> dict[str, str]:
    """Return what a run is made from, as name → digest or version, for the manifests of its checkpoints.

    `digests` are those of the models and renderings, which need transformers; an empty one is not known.
    """
    known = {name: digest for name, digest in digests.items() if digest}
    versions = {VERSION + name: number for name, number in library_versions().items()}
    return {PLAN_ORIGIN: plan_digest(plan)} | known | versions


def library_versions() -> dict[str, str]:
    """Return the versions of the packages of `VERSIONS` that are installed: name → version."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an optional one
            continue
    return found


def require_same_origins(
    store: CheckpointStore, run: str, spec: JobSpec, origins: Mapping[str, str], plan: Plan
) -> None:
    """Raise OutputError if the newest checkpoint belongs to another job, or was made from other data or models.

    What this version notes and the checkpoint's did not, is not compared.
    """
    found = store.newest_with(lambda last: store.parsed(last, SPEC_FILE) if SPEC in last.files else None)
    if found is None:
        return
    last, there = found
    if there:
        _require_same_job(run, there, spec)
        # It may have had fewer epochs: the plan that it was made with is the first part of this one.
        origins = {**origins, PLAN_ORIGIN: plan_digest(replace(plan, epochs=there.training.epochs))}
    differing = [name for name in last.origins.keys() & origins.keys() if last.origins[name] != origins[name]]
    updated = sorted(name for name in differing if name.startswith(VERSION))
    if changed := sorted(set(differing) - set(updated)):
        raise OutputError(
            f"output.path: {run} was begun with another {' and another '.join(changed)}. What is behind the same path "
            f"was replaced since {last.name}. Restore it as it was, or start a new run under another `name`."
        )
    for name in updated:
        _LOG.warning("%s: goes on with another %s: %s, and %s before", run, name, origins[name], last.origins[name])


def _require_same_job(run: str, there: JobSpec, asked: JobSpec) -> None:
    """Raise OutputError if the run's folder has another job.

    Fields that change the stream or the model must be equal. The other fields may differ between runs.
    """
    refused = [str(each) for each in changes(there, asked) if not each.is_growth]
    if refused:
        more = f"; and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
        raise OutputError(
            f"output.path: {run} holds another job of this name: {'; '.join(refused[:NAMED])}{more}. Restore these "
            "fields, choose another `name`, another output.path, or remove the folder. training.max_steps and "
            "training.epochs may grow."
        )


@dataclass(frozen=True)
class Change:
    """A field that differs between the spec with which a run was begun and the one that is to go on with it."""

    field: str
    before: Any
    now: Any

    @property
    def is_growth(self) -> bool:
        """Return whether the job only becomes longer."""
        if self.field == "training.max_steps":
            return self.now is None or (self.before is not None and self.now > self.before)
        return self.field == "training.epochs" and self.now > self.before

    def __str__(self) -> str:
        return f"{self.field} was {shortened(self.before)} and is {shortened(self.now)}"


def changes(there: JobSpec, asked: JobSpec) -> list[Change]:
    """Return the fields in which two specs differ, without those that a run may change."""
    free = {"cluster", "tracking", "output", "evaluation"}
    before, now = (each.model_dump(mode="json", exclude=free) for each in (there, asked))
    for tree in (before, now):
        for section, fields in FREE_TO_CHANGE.items():
            for field in fields if tree[section] else ():
                tree[section].pop(field)
    return list(_changes(before, now, ""))


def _changes(before: Any, now: Any, field: str) -> Iterator[Change]:
    if before == now:
        return
    if not (isinstance(before, dict) and isinstance(now, dict)):
        yield Change(field, before, now)
        return
    for name in [*before, *(name for name in now if name not in before)]:
        yield from _changes(before.get(name), now.get(name), f"{field}.{name}" if field else name)
