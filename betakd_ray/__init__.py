"""Uncertainty-aware knowledge distillation of vision–language models, as Ray jobs (Beta-KD, arXiv 2603.21426)."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from betakd_ray import errors
from betakd_ray.spec import JobSpec, load_spec

if TYPE_CHECKING:
    from betakd_ray.energies import energy
    from betakd_ray.job import BetaKDJob, JobResult
    from betakd_ray.weighting import BetaWeighting

__all__ = ["BetaKDJob", "BetaWeighting", "JobResult", "JobSpec", "energy", "errors", "load_spec"]

# These libraries read them when they are imported. What is set already wins.
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "PYTHON worker processes have been started")

_HEAVY = {"BetaKDJob": "job", "JobResult": "job", "BetaWeighting": "weighting", "energy": "energies"}


def __getattr__(name: str) -> Any:
    """What brings torch or Ray with it is imported when it is asked for; a spec is checked without either."""
    if name in _HEAVY:
        return getattr(import_module(f"betakd_ray.{_HEAVY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
