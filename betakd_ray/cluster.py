"""The cluster: a connection to it, and whether it can hold a job."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from betakd_ray.errors import ClusterError
from betakd_ray.spec import JobSpec


@contextmanager
def connected(spec: Any) -> Iterator[None]:
    """A connection to Ray: the one that is there, the one the spec names, or a local one while the job runs."""
    _quiet()
    if ray.is_initialized():
        yield
        return
    address = spec.cluster.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address}
    if not address:
        options = {"address": "local", "include_dashboard": False, "num_cpus": _logical_cpus(spec)}
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise ClusterError(f"cluster.address: no Ray cluster answers at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _logical_cpus(spec: Any) -> int:
    """For a local cluster: what the machine has, and at least a place for every reader, teacher and worker."""
    pools = spec.cluster
    workers = spec.training.workers.max if isinstance(spec, JobSpec) else 1
    asked = pools.teacher.min * pools.teacher.cpus + workers * pools.student.cpus + pools.readers.cpus
    return max(os.cpu_count() or 1, math.ceil(asked))


def _quiet() -> None:
    """Ray's and its libraries' chatter goes to their log files, not to the user's terminal."""
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def gpus_each(asked: float | str) -> float:
    """GPUs of one process of a pool: what the spec says, or one where the cluster has any."""
    if asked == "auto":
        return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
    return float(asked)


def check_feasible(spec: JobSpec, gpus: dict[str, float]) -> None:
    """Raises ClusterError when the pools ask for more GPUs than the cluster has."""
    teachers = spec.cluster.teacher.min if spec.teacher else 0
    students = spec.training.workers.min
    asked = teachers * gpus["teacher"] + students * gpus["student"]
    available = ray.cluster_resources().get("GPU", 0.0)
    if asked > available:
        raise ClusterError(
            f"cluster: {teachers} teachers × {gpus['teacher']:g} GPUs and {students} students × "
            f"{gpus['student']:g} GPUs ask for {asked:g}; the cluster has {available:g}. Lower cluster.teacher.min, "
            "training.workers or the pools' gpus, or add nodes."
        )
    pools = spec.cluster
    cpus = teachers * pools.teacher.cpus + students * pools.student.cpus + pools.readers.cpus
    if cpus > (there := ray.cluster_resources().get("CPU", 0.0)):
        # Ray would wait for a place in silence.
        raise ClusterError(
            f"cluster: teachers, students and one reader ask for {cpus:g} CPUs; the cluster has {there:g}. Lower "
            "cluster.teacher.cpus, cluster.student.cpus or training.workers, or add nodes."
        )
