"""The cluster: a connection to it, and whether it can hold a job."""

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources

from betakd_ray.errors import ClusterError
from betakd_ray.sigterm import kept_sigterm
from betakd_ray.spec import GPUPoolSpec, JobSpec, PoolSpec

PLURALS = {"GPU": "GPUs", "CPU": "CPUs"}
ACCELERATOR = "accelerator_type:"
"""Before the model of a node's GPUs, a resource that each node has one of; Ray takes a thousandth for a process."""


@contextmanager
def connected(spec: Any, jobs: int = 1) -> Iterator[None]:
    """A connection to Ray: the one that is there, the one the spec names, or a local one, with room for so many jobs
    at a time."""
    _quiet()
    if ray.is_initialized():
        yield
        return
    address = spec.cluster.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address}
    if address in (None, "", "local"):
        options = {"address": "local", "include_dashboard": False, "num_cpus": _logical_cpus(spec, jobs)}
    try:
        with kept_sigterm():
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise ClusterError(f"cluster.address: no Ray cluster answers at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _logical_cpus(spec: Any, jobs: int) -> int:
    """Return the CPUs of a local cluster: the machine's, and at least one for every reader, teacher and worker."""
    pools = spec.cluster
    workers = spec.training.workers.max if isinstance(spec, JobSpec) else 1
    asked = pools.teacher.min * pools.teacher.cpus + jobs * (workers * pools.student.cpus + pools.readers.cpus)
    return max(os.cpu_count() or 1, math.ceil(asked))


def _quiet() -> None:
    """Ray's and its libraries' chatter goes to their log files, not to the user's terminal."""
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def placement(pool: GPUPoolSpec, gpus: float) -> dict[str, Any]:
    """The options of an actor or a task that takes one place of the pool."""
    return {
        "num_cpus": pool.cpus,
        "num_gpus": gpus,
        "accelerator_type": pool.accelerator_type,
        "resources": pool.resources or None,
        "label_selector": pool.labels or None,
    }


def gpus_each(asked: float | str) -> float:
    """GPUs of one process of a pool: what the spec says, or one where the cluster has any."""
    if asked == "auto":
        return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
    return float(asked)


@dataclass(frozen=True)
class Demand:
    """Processes of one pool, and what each needs of its node."""

    pool: str
    count: int
    resources: dict[str, float]
    labels: dict[str, str]
    remedy: str

    @classmethod
    def of(cls, pool: str, count: int, spec: PoolSpec, gpus: float, remedy: str) -> "Demand":
        needs = {"GPU": gpus, "CPU": spec.cpus, **spec.resources}
        if isinstance(spec, GPUPoolSpec) and spec.accelerator_type:
            needs[ACCELERATOR + spec.accelerator_type] = 0.001
        return cls(pool, count, {name: amount for name, amount in needs.items() if amount}, spec.labels, remedy)

    def __str__(self) -> str:
        needs = ", ".join(map(_need, self.resources, self.resources.values()))
        labels = ", ".join(f"{key}={value}" for key, value in self.labels.items())
        return f"{self.count} × ({needs})" + (f" with label {labels}" if labels else "")


def _need(resource: str, amount: float) -> str:
    if resource.startswith(ACCELERATOR):
        return f"of type {resource.removeprefix(ACCELERATOR)}"
    return f"{amount:g} {PLURALS.get(resource, resource)}"


@dataclass(frozen=True)
class Node:
    """What a node has."""

    resources: dict[str, float]
    labels: dict[str, str]


ASK_TIMEOUT_S = 30.0
"""An autoscaler that has not answered by then is not waited for: the pools wait for their nodes anyway."""


def check_feasible(spec: JobSpec) -> list[tuple[Demand, int]]:
    """What the job asks for, and how many processes of each pool the nodes that are up have room for.

    A pool that lacks some has to wait for nodes that the autoscaler is to bring. Raises ClusterError when the pools ask
    for what the cluster does not have and can never have.
    """
    wanted = demands(spec)
    lacking = without_room(wanted, alive_nodes())
    if lacking and not has_autoscaler():
        raise _no_room(*lacking[0], len(alive_nodes()))
    if lacking and _is_out_of_reach(wanted):
        asked = "; ".join(f"cluster.{demand.pool}: {demand}" for demand in wanted)
        raise ClusterError(
            f"the job asks for more than the cluster can grow to. It asks for {asked}. There is room now for "
            f"{', '.join(f'{placed} of {demand.pool}' for demand, placed in lacking)}, and its autoscaler answers that "
            "no number of nodes within its limits has room for all. Raise maxReplicas (max_workers) of the node types "
            "with these labels and resources, or lower cluster.teacher.min or training.workers."
        )
    room = {demand.pool: placed for demand, placed in lacking}
    return [(demand, room.get(demand.pool, demand.count)) for demand in wanted]


def alive_nodes() -> list[Node]:
    """What the connected cluster has now."""
    return [Node(dict(node["Resources"]), dict(node["Labels"])) for node in ray.nodes() if node["Alive"]]


def demands(spec: JobSpec) -> list[Demand]:
    """The least that a job runs on, on the connected cluster."""
    pools = spec.cluster
    readers = Demand.of("readers", 1, pools.readers, 0.0, "Lower cluster.readers.cpus")
    students = Demand.of(
        "student", spec.training.workers.min, pools.student, gpus_each(pools.student.gpus),
        "Lower training.workers or what cluster.student asks for",
    )  # fmt: skip
    if spec.teacher is None:
        return [students, readers]
    teachers = Demand.of(
        "teacher", pools.teacher.min, pools.teacher, gpus_each(pools.teacher.gpus),
        "Lower cluster.teacher.min or what cluster.teacher asks for",
    )  # fmt: skip
    return [teachers, students, readers]


def check_room(demands: Sequence[Demand], nodes: Sequence[Node]) -> None:
    """Raises ClusterError for the first demand that finds no place beside those before it.

    Ray would wait for a place in silence.
    """
    if lacking := without_room(demands, nodes):
        raise _no_room(*lacking[0], len(nodes))


def without_room(demands: Sequence[Demand], nodes: Sequence[Node]) -> list[tuple[Demand, int]]:
    """The demands that find no place beside those before them, and how much of each does.

    Demands with labels choose first, as they have the fewest nodes to go to.
    """
    left = [dict(node.resources) for node in nodes]
    lacking = []
    for demand in sorted(demands, key=lambda demand: not demand.labels):
        placed = 0
        for node, free in zip(nodes, left, strict=True):
            while placed < demand.count and _matches(demand.labels, node.labels) and _take(demand.resources, free):
                placed += 1
        if placed < demand.count:
            lacking.append((demand, placed))
    return lacking


def _no_room(demand: Demand, placed: int, nodes: int) -> ClusterError:
    return ClusterError(
        f"cluster.{demand.pool}: asks for {demand}; the cluster's {nodes} nodes have room for {placed} of them beside "
        f"the job's other pools. {demand.remedy}, or add nodes."
    )


def _take(needs: dict[str, float], free: dict[str, float]) -> bool:
    if any(free.get(name, 0.0) < amount for name, amount in needs.items()):
        return False
    for name, amount in needs.items():
        free[name] -= amount
    return True


def _matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Ray's label selectors: `a`, `!a`, `in(a,b)`, `!in(a,b)`."""
    for key, wanted in selector.items():
        choices = wanted.removeprefix("!").removeprefix("in(").removesuffix(")").split(",")
        if (labels.get(key) in [choice.strip() for choice in choices]) == wanted.startswith("!"):
            return False
    return True


def has_autoscaler() -> bool:
    """Whether one (version 2) reports to the connected cluster."""
    return _status().autoscaling_state.autoscaler_state_version > 0


def _is_out_of_reach(demands: Sequence[Demand]) -> bool:
    """Whether the autoscaler says that the cluster, fully grown and with nobody else on it, cannot hold all demands.

    Ray publishes no limits of its node types. But a request for resources is checked against them, whatever is in use,
    and one that cannot be met starts nothing and is reported. One that can starts the nodes that the job needs anyway.
    """
    bundles = [demand.resources for demand in demands for _ in range(demand.count)]
    selectors = [demand.labels for demand in demands for _ in range(demand.count)]
    request_resources(bundles=bundles, bundle_label_selectors=selectors)
    try:
        asked = _status().cluster_resource_state.cluster_resource_state_version
        deadline = time.monotonic() + ASK_TIMEOUT_S
        while time.monotonic() < deadline:
            state = _status().autoscaling_state
            if state.last_seen_cluster_resource_state_version > asked:
                return any(_is_same(bundles, refused) for refused in state.infeasible_cluster_resource_constraints)
            time.sleep(0.5)
        return False
    finally:
        request_resources(bundles=[])


def _is_same(bundles: Sequence[dict[str, float]], refused: Any) -> bool:
    """Whether it is our request: another job's may have taken its place."""
    there = [dict(each.request.resources_bundle) for each in refused.resource_requests for _ in range(each.count)]
    return Counter(map(_shape, bundles)) == Counter(map(_shape, there))


def _shape(bundle: dict[str, float]) -> frozenset[tuple[str, float]]:
    return frozenset((name, float(amount)) for name, amount in bundle.items())


def _status() -> Any:
    """What the cluster and its autoscaler last reported (`GetClusterStatusReply`)."""
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]  # compiled
    from ray.core.generated.autoscaler_pb2 import (
        GetClusterStatusReply,  # pyright: ignore[reportAttributeAccessIssue]  # generated
    )

    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    return reply
