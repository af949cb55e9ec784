"""What is wrong with the trackers of a job, before it asks for resources."""

import logging
from importlib.util import find_spec
from typing import Any

from betakd_ray.errors import TrackerError, without_secrets
from betakd_ray.spec import JobSpec
from betakd_ray.trackers.services import ASK_S, TRACKERS, answers, goes_offline

_LOG = logging.getLogger(__name__)


def check_trackers(spec: JobSpec) -> None:
    """Raise TrackerError if a tracker of the job lacks its package, or if its server does not answer.

    The latter is a warning with `tracking.unreachable: offline`.
    """
    for name in spec.tracking.trackers:
        tracker = TRACKERS[name]
        if find_spec(tracker.package) is None:
            raise TrackerError(
                f"tracking.trackers: {name} needs a package that is not installed here: pip install "
                f"'betakd-ray[{name}]', on every node. Or leave {name} out."
            )
        wrong = _what_is_wrong(tracker)
        if wrong and not goes_offline(spec):
            raise TrackerError(
                f"tracking.trackers: {name}: {wrong}. With tracking.unreachable: offline its files go into the run's "
                "folder instead."
            )
        if wrong:
            _LOG.warning("%s: %s: %s: its files go into the run's folder", spec.name, name, wrong)


def _what_is_wrong(tracker: Any) -> str:
    address = tracker.server()
    if address and not answers(address):
        return f"no server answers at {without_secrets(address)} within {ASK_S:g} s"
    return tracker.lacks() if hasattr(tracker, "lacks") else ""
