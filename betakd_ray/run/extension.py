"""A run whose job has become longer: more epochs, or more steps, also after it was finished."""

import logging

from betakd_ray.data.plan import Plan
from betakd_ray.output import output_errors
from betakd_ray.run.claim import changes
from betakd_ray.run.files import SPEC_FILE, stored
from betakd_ray.run.folder import PLAN, RESULT, SPEC
from betakd_ray.run.lease import Permit
from betakd_ray.run.plan import plan_to_json
from betakd_ray.spec import JobSpec
from betakd_ray.storage import join, open_store, replace_file

_LOG = logging.getLogger(__name__)


def is_extended(run: str, spec: JobSpec) -> bool:
    """Return whether `spec` is longer than the one that the run has."""
    there = stored(run, spec.output.storage, SPEC_FILE)
    return there is not None and any(change.is_growth for change in changes(there, spec))


def extend(run: str, spec: JobSpec, plan: Plan, permit: Permit) -> None:
    """Let a run go on to the end of a longer spec: it is not finished, and its spec and plan are the new ones.

    Call it only with the run's lease. Raises OutputError, and RunTaken if another driver has taken the run over.
    """
    permit.check()
    filesystem, root = open_store(run, spec.output.storage)
    with output_errors(run):
        if filesystem.exists(join(root, RESULT)):
            filesystem.rm_file(join(root, RESULT))
        replace_file(filesystem, join(root, PLAN), plan_to_json(plan).encode())
        # Last: until it is there, the next driver does all of this again.
        replace_file(filesystem, join(root, SPEC), spec.model_dump_json(indent=2).encode())
    _LOG.warning(
        "%s: goes on to step %d, as its spec now says. The schedules of the learning rate and of energies end there",
        spec.name, spec.training.steps(plan.samples),
    )  # fmt: skip
