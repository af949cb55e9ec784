"""Uncertainty-aware knowledge distillation of vision–language models, as Ray jobs (Beta-KD, arXiv 2603.21426)."""

from typing import TYPE_CHECKING, Any

from betakd_ray import errors
from betakd_ray.spec import JobSpec, load_spec

if TYPE_CHECKING:
    from betakd_ray.job import BetaKDJob, JobResult

__all__ = ["BetaKDJob", "JobResult", "JobSpec", "errors", "load_spec"]


def __getattr__(name: str) -> Any:
    """BetaKDJob and JobResult bring torch and Ray with them; a spec is checked without either."""
    if name in ("BetaKDJob", "JobResult"):
        from betakd_ray import job

        return getattr(job, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
