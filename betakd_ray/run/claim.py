"""A run's folder belongs to one job: the job claims it at its first start, and recognises it later."""

from betakd_ray.errors import OutputError
from betakd_ray.run.checkpoint import output_errors
from betakd_ray.run.folder import SPEC
from betakd_ray.spec import JobSpec
from betakd_ray.storage import join, open_store, replace_file

FREE_TO_CHANGE = {
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
    "teacher": ("cache", "window", "timeout_s", "batch_tokens"),
}
"""Fields that may differ between two runs of one job."""
UPLOADED = "/working_dir_files/"
"""Part of the path of the folder in which a submitted job runs."""


def was_here(run: str, spec: JobSpec) -> bool:
    """Return whether the job of `spec` was started before in the folder `run`.

    Raises OutputError if the folder has another job, or if Ray will remove the folder.
    """
    if UPLOADED in run:
        raise OutputError(
            f"output.path: {run} is in the folder that `ray job submit --working-dir` uploaded, which Ray "
            "removes after the job. Give a URL, or an absolute path that remains after the cluster is gone."
        )
    filesystem, root = open_store(run, spec.output.storage)
    path = join(root, SPEC)
    with output_errors(run):
        if not filesystem.exists(path):
            return False
        content = filesystem.cat_file(path)
    try:
        there = JobSpec.model_validate_json(content)
    except ValueError as error:
        raise OutputError(f"output.path: {path} is not a spec of this version; choose another name") from error
    _require_same_job(run, there, spec)
    return True


def claim(run: str, spec: JobSpec) -> None:
    """Write spec.json, unless this same job was started before. Raises OutputError as `was_here`."""
    if was_here(run, spec):
        return
    filesystem, root = open_store(run, spec.output.storage)
    with output_errors(run):
        filesystem.makedirs(root, exist_ok=True)
        replace_file(filesystem, join(root, SPEC), spec.model_dump_json(indent=2).encode())


def _require_same_job(run: str, there: JobSpec, asked: JobSpec) -> None:
    """Raise OutputError if the run's folder has another job.

    Fields that change the stream or the model must be equal. The other fields may differ between runs.
    """
    free = {"cluster", "tracking", "output"}
    before, now = (each.model_dump(mode="json", exclude=free) for each in (there, asked))
    for tree in (before, now):
        for section, fields in FREE_TO_CHANGE.items():
            for field in fields if tree[section] else ():
                tree[section].pop(field)
    differing = [section for section in now if before[section] != now[section]]
    if differing:
        raise OutputError(
            f"output.path: {run} holds another job of this name (its {', '.join(differing)} differ). Choose another "
            "`name`, another output.path, or remove the folder."
        )
