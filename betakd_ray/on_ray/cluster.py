"""Connection to the Ray cluster, and the check whether the cluster can hold a job."""

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from betakd_ray.errors import BetaKDError, ClusterError
from betakd_ray.on_ray.local import closed, driven
from betakd_ray.sigterm import kept_sigterm
from betakd_ray.spec import GPUPoolSpec, JobSpec, PoolSpec

PLURALS = {"GPU": "GPUs", "CPU": "CPUs"}
ACCELERATOR = "accelerator_type:"
"""Prefix of the resource that names the model of a node's GPUs. A node has 1.0 of it; a process takes 0.001."""


@contextmanager
def connected(spec: Any, jobs: int = 1) -> Iterator[None]:
    """Connect to Ray for the block: use the connection that exists, or the cluster of the spec, or start a local one.

    A local cluster has enough logical CPUs for `jobs` concurrent jobs.
    """
    _quiet()
    if ray.is_initialized():
        yield
        return
    address = spec.cluster.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address}
    if is_local := address in (None, "", "local"):
        options = {"address": "local", "include_dashboard": False, "num_cpus": _logical_cpus(spec, jobs)}
    try:
        with kept_sigterm(), closed() if is_local else nullcontext():
            context: Any = ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except BetaKDError:
        raise
    except Exception as error:  # Ray raises a plain Exception if its own processes do not start in time
        if is_local:
            raise ClusterError(
                f"cluster.address: Ray did not start on this machine: {error} The machine may be too busy, or short of "
                "memory. Run the command again, or name a cluster that runs."
            ) from error
        raise ClusterError(f"cluster.address: no Ray cluster answers at {address}: {error}") from error
    with driven(Path(context.address_info["session_dir"])) if is_local else nullcontext():
        try:
            yield
        finally:
            ray.shutdown()


def _logical_cpus(spec: Any, jobs: int) -> int:
    """Return the logical CPUs of a local cluster: the machine's, or more if the job's processes need more."""
    pools = spec.cluster
    workers = spec.training.workers.max if isinstance(spec, JobSpec) else 1
    asked = pools.teacher.min * pools.teacher.cpus + jobs * (workers * pools.student.cpus + pools.readers.cpus)
    return max(os.cpu_count() or 1, math.ceil(asked))


def _quiet() -> None:
    """Keep messages of Ray and its libraries off the user's terminal; they still go to log files."""
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def placement(pool: GPUPoolSpec, gpus: float) -> dict[str, Any]:
    """Return the options of an actor or task that runs as one process of the pool."""
    return {
        "num_cpus": pool.cpus,
        "num_gpus": gpus,
        "accelerator_type": pool.accelerator_type,
        "resources": pool.resources or None,
        "label_selector": pool.labels or None,
    }


def on_driver_node() -> NodeAffinitySchedulingStrategy:
    """Return the strategy that places an actor on the driver's node: if that node fails, the job ends anyway."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def gpus_each(asked: float | str) -> float:
    """Return the GPUs of one process of a pool: as in the spec; `auto` is 1.0 if the cluster has GPUs, or 0.0."""
    if asked == "auto":
        return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
    return float(asked)


@dataclass(frozen=True)
class Demand:
    """Processes of one pool, and the resources and labels that each needs of its node."""

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
    """Resources and labels of a node."""

    resources: dict[str, float]
    labels: dict[str, str]


ASK_TIMEOUT_S = 30.0
"""Timeout in seconds for the autoscaler's answer. After it the job starts; the pools wait for their nodes."""


def check_feasible(spec: JobSpec, pause: Callable[[float], None] = time.sleep) -> list[tuple[Demand, int]]:
    """Return the demand of each pool, and how many of its processes the present nodes have room for.

    `pause(seconds)` is called between two looks at the autoscaler's answer. What it raises ends the check.

    A pool with room for fewer than it asks for has to wait until the autoscaler adds nodes. Raises ClusterError if the
    pools ask for more than the cluster has and can ever have.
    """
    wanted = demands(spec)
    lacking = without_room(wanted, alive_nodes())
    if lacking and not has_autoscaler():
        raise _no_room(*lacking[0], len(alive_nodes()))
    if lacking and _is_out_of_reach(wanted, pause):
        asked = "; ".join(f"cluster.{demand.pool}: {demand}" for demand in wanted)
        raise ClusterError(
            f"the job asks for more than the cluster can grow to. It asks for {asked}. There is room now for "
            f"{', '.join(f'{placed} of {demand.pool}' for demand, placed in lacking)}, and the autoscaler answers that "
            "even all nodes within its limits have no room for the rest. Raise maxReplicas (max_workers) of the node "
            "types with these labels and resources, or lower cluster.teacher.min or training.workers."
        )
    room = {demand.pool: placed for demand, placed in lacking}
    return [(demand, room.get(demand.pool, demand.count)) for demand in wanted]


def alive_nodes() -> list[Node]:
    """Return the nodes of the connected cluster that are alive now."""
    return [Node(dict(node["Resources"]), dict(node["Labels"])) for node in ray.nodes() if node["Alive"]]


def demands(spec: JobSpec) -> list[Demand]:
    """Return the smallest demand with which a job can run on the connected cluster."""
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
    """Raise ClusterError for the first demand that does not fit on the nodes beside the demands before it.

    Without this check Ray would wait for resources without a message.
    """
    if lacking := without_room(demands, nodes):
        raise _no_room(*lacking[0], len(nodes))


def without_room(demands: Sequence[Demand], nodes: Sequence[Node]) -> list[tuple[Demand, int]]:
    """Return the demands that do not fit beside those before them, and how many processes of each do fit.

    Demands with labels are placed first, because the fewest nodes suit them.
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
        f"cluster.{demand.pool}: asks for {demand}; the cluster's {nodes} nodes have room for {placed} of them, next "
        f"to the job's other pools. {demand.remedy}, or add nodes."
    )


def _take(needs: dict[str, float], free: dict[str, float]) -> bool:
    if any(free.get(name, 0.0) < amount for name, amount in needs.items()):
        return False
    for name, amount in needs.items():
        free[name] -= amount
    return True


def _matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Return whether labels match a selector of Ray: values are `a`, `!a`, `in(a,b)` or `!in(a,b)`."""
    for key, wanted in selector.items():
        choices = wanted.removeprefix("!").removeprefix("in(").removesuffix(")").split(",")
        if (labels.get(key) in [choice.strip() for choice in choices]) == wanted.startswith("!"):
            return False
    return True


def has_autoscaler() -> bool:
    """Return whether the connected cluster has an autoscaler (of version 2)."""
    return _status().autoscaling_state.autoscaler_state_version > 0


def _is_out_of_reach(demands: Sequence[Demand], pause: Callable[[float], None]) -> bool:
    """Return whether the autoscaler says that even the fully scaled, otherwise idle cluster cannot hold all demands.

    Ray does not publish the limits of its node types. But the autoscaler checks a request for resources against these
    limits, regardless of what is in use. If the request cannot be met, it starts no node and reports the request as
    infeasible. If it can be met, it starts the nodes that the job needs anyway.
    """
    bundles = [demand.resources for demand in demands for _ in range(demand.count)]
    selectors = [demand.labels for demand in demands for _ in range(demand.count)]
    request_resources(bundles=bundles, bundle_label_selectors=selectors)
    try:
        # The autoscaler has seen the request once it has seen a state newer than the one right after the request.
        asked = _status().cluster_resource_state.cluster_resource_state_version
        deadline = time.monotonic() + ASK_TIMEOUT_S
        while time.monotonic() < deadline:
            state = _status().autoscaling_state
            if state.last_seen_cluster_resource_state_version > asked:
                return any(_is_same(bundles, refused) for refused in state.infeasible_cluster_resource_constraints)
            pause(0.5)
        return False
    finally:
        # A request holds until the next one. Without this, the autoscaler would keep the nodes after the job.
        request_resources(bundles=[])


def _is_same(bundles: Sequence[dict[str, float]], refused: Any) -> bool:
    """Return whether a refused request is ours: a request of another job may have replaced it."""
    there = [dict(each.request.resources_bundle) for each in refused.resource_requests for _ in range(each.count)]
    return Counter(map(_shape, bundles)) == Counter(map(_shape, there))


def _shape(bundle: dict[str, float]) -> frozenset[tuple[str, float]]:
    return frozenset((name, float(amount)) for name, amount in bundle.items())


def _status() -> Any:
    """Return the last report of the cluster and its autoscaler (`GetClusterStatusReply`)."""
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]  # compiled
    from ray.core.generated.autoscaler_pb2 import (
        GetClusterStatusReply,  # pyright: ignore[reportAttributeAccessIssue]  # generated
    )

    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    return reply
