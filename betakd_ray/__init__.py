"""Uncertainty-aware knowledge distillation of vision–language models, as Ray jobs (Beta-KD, arXiv 2603.21426)."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from betakd_ray import errors
from betakd_ray.spec import JobSpec, load_spec

if TYPE_CHECKING:
    from betakd_ray.check.teacher import check_teacher
    from betakd_ray.energies import energy
    from betakd_ray.evaluation.suite import evaluate
    from betakd_ray.job import BetaKDJob, JobResult
    from betakd_ray.weighting import BetaWeighting

__version__ = "0.1.0"
__all__ = [
    "BetaKDJob",
    "BetaWeighting",
    "JobResult",
    "JobSpec",
    "__version__",
    "check_teacher",
    "energy",
    "errors",
    "evaluate",
    "load_spec",
]

# DeepSpeed and Ray read these variables when they are imported. A value that is already set is kept.
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "PYTHON worker processes have been started")

_HEAVY = {
    "BetaKDJob": "job",
    "JobResult": "job",
    "BetaWeighting": "weighting",
    "energy": "energies",
    "check_teacher": "check.teacher",
    "evaluate": "evaluation.suite",
}


def __getattr__(name: str) -> Any:
    """Import a name that needs torch or Ray at its first use, so that a spec is checked without importing either."""
    if name in _HEAVY:
        return getattr(import_module(f"betakd_ray.{_HEAVY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return every public name, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
