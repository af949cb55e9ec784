"""Checks that the nodes' resources are enough for a job."""

import time
from typing import Any

import pytest
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

from betakd_ray.errors import ClusterError
from betakd_ray.on_ray import cluster
from betakd_ray.on_ray.cluster import Demand, Node, check_room
from betakd_ray.spec import PoolSpec, TeacherPoolSpec

POOL = "betakd.io/pool"


def _node(gpus: int, cpus: int, pool: str = "any", **resources: int) -> Node:
    has = {"GPU": gpus, "CPU": cpus, **resources}
    return Node({name: float(amount) for name, amount in has.items()}, {POOL: pool})


def _demand(pool: str, count: int, gpus: int, **fields: object) -> Demand:
    return Demand.of(pool, count, PoolSpec.model_validate({"cpus": 1, **fields}), float(gpus), "Lower it")


def test_what_fits_side_by_side_is_feasible() -> None:
    check_room([_demand("teacher", 1, 4), _demand("student", 4, 1), _demand("readers", 1, 0)], [_node(8, 6)])


def test_processes_are_not_cut_in_two() -> None:
    with pytest.raises(
        ClusterError, match=r"cluster\.teacher: asks for 1 × \(4 GPUs, 1 CPUs\).*2 nodes have room for 0"
    ):
        check_room([_demand("teacher", 1, 4)], [_node(3, 8), _node(3, 8)])


@pytest.mark.parametrize(("gpus", "cpus"), [(3, 8), (8, 2)])
def test_pools_do_not_share_what_one_of_them_has(gpus: int, cpus: int) -> None:
    with pytest.raises(ClusterError, match=r"cluster\.student: .* room for 1 of them"):
        check_room([_demand("teacher", 1, 2), _demand("student", 2, 1)], [_node(gpus, cpus)])


def test_a_label_restricts_and_whoever_has_one_chooses_first() -> None:
    teacher = _demand("teacher", 1, 1, labels={POOL: "teacher"})
    student = _demand("student", 1, 1)
    check_room([student, teacher], [_node(1, 2, "teacher"), _node(1, 2, "student")])
    with pytest.raises(ClusterError, match=r"cluster\.teacher: .* with label betakd\.io/pool=teacher; .* room for 0"):
        check_room([teacher], [_node(8, 8, "student")])


@pytest.mark.parametrize(
    ("selector", "fits"),
    [("cpu", True), ("!cpu", False), ("!student", True), ("in(student, cpu)", True), ("!in(student,cpu)", False)],
)
def test_label_selectors_are_rays(selector: str, fits: bool) -> None:
    demand = _demand("readers", 1, 0, labels={POOL: selector})
    if fits:
        check_room([demand], [_node(0, 1, "cpu")])
    else:
        with pytest.raises(ClusterError):
            check_room([demand], [_node(0, 1, "cpu")])


def test_custom_resources_count() -> None:
    slots = _demand("student", 3, 0, resources={"student_slot": 1})
    check_room([slots], [_node(0, 2, student_slot=1), _node(0, 4, student_slot=2)])
    with pytest.raises(ClusterError, match=r"1 student_slot.*room for 2"):
        check_room([slots], [_node(0, 8, student_slot=2)])


def test_a_type_of_gpu_is_asked_for_and_does_not_run_out() -> None:
    pool = TeacherPoolSpec(accelerator_type="H100", resources={"teacher_slot": 1})
    teachers = Demand.of("teacher", 4, pool, 1.0, "Lower it")
    check_room([teachers], [_node(8, 8, teacher_slot=8, **{"accelerator_type:H100": 1})])
    with pytest.raises(ClusterError, match=r"4 × \(1 GPUs, 1 CPUs, 1 teacher_slot, of type H100\); .* room for 0"):
        check_room([teachers], [_node(8, 8, teacher_slot=8, **{"accelerator_type:L40S": 1})])


@pytest.mark.parametrize("refuses", [None, "ours", "another's"])
def test_what_the_autoscaler_refuses_can_never_be_met(refuses: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = GetClusterStatusReply()
    reply.cluster_resource_state.cluster_resource_state_version = 7
    reply.autoscaling_state.last_seen_cluster_resource_state_version = 8
    if refuses:
        request = reply.autoscaling_state.infeasible_cluster_resource_constraints.add().resource_requests.add()
        request.count = 3 if refuses == "ours" else 1
        request.request.resources_bundle.update({"GPU": 1.0, "CPU": 1.0})
    asked: list[Any] = []
    monkeypatch.setattr(cluster, "_status", lambda: reply)
    monkeypatch.setattr(cluster, "request_resources", lambda **request: asked.append(request["bundles"]))
    assert cluster._is_out_of_reach([_demand("teacher", 3, 1)], time.sleep) == (refuses == "ours")
    assert asked == [[{"GPU": 1.0, "CPU": 1.0}] * 3, []]  # and taken back
