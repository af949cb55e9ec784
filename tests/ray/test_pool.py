"""The teacher pool with real actors: it outlives its members, and is as large as the students need."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from betakd_ray.errors import TeacherError
from betakd_ray.models.inputs import ModelInputs
from betakd_ray.spec import TeacherPoolSpec, TeacherSpec
from betakd_ray.teacher import pool as pool_module
from betakd_ray.teacher.pool import TeacherClient, TeacherPool, start_pool
from betakd_ray.teacher.signal import Needs
from tests.tiny import save_tiny

NEEDS = Needs(hidden=True)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherSpec:
    return TeacherSpec(path=save_tiny(tmp_path_factory.mktemp("teacher"), seed=1))


def _inputs(token: int) -> ModelInputs:
    """Two text-only samples of four tokens, the last of them the answer."""
    ids = np.full((2, 4), token, dtype=np.int64)
    nowhere = np.zeros(0, dtype=np.int64)
    return ModelInputs(
        input_ids=ids,
        attention_mask=np.ones_like(ids),
        pixels=None,
        answer_rows=np.array([2, 6]),
        row_sample=np.array([0, 1]),
        targets=np.array([token, token]),
        visual_sample=nowhere,
        visual_position=nowhere,
    )


def _pid(actor) -> int:
    return ray.get(actor.__ray_call__.remote(lambda _self: os.getpid()))


@pytest.mark.timeout(200)
def test_a_killed_teacher_is_replaced_and_no_batch_is_lost(ray_cluster: str, teacher: TeacherSpec) -> None:
    pool = start_pool(teacher, NEEDS, TeacherPoolSpec(min=1), 0.0)
    ray.get(pool.wait_until_ready.remote(60.0))
    client = TeacherClient(pool, rank=0, timeout_s=60.0, start_timeout_s=60.0)
    before = client.result(client.submit(_inputs(40)))
    requests = [client.submit(_inputs(token)) for token in (40, 41, 42)]
    (actor,) = ray.get(pool.members.remote()).values()
    os.kill(_pid(actor), signal.SIGKILL)
    requests += [client.submit(_inputs(40))]
    signals = [client.result(request) for request in requests]
    for one in (signals[0], signals[-1]):
        assert before.hidden
        assert one.hidden
        assert np.array_equal(one.hidden.array, before.hidden.array)
    assert list(ray.get(pool.members.remote())) == [1]  # the first is gone, the second is there


@pytest.mark.timeout(200)
def test_a_batch_that_the_teacher_cannot_score_is_an_error_and_kills_no_teacher(
    ray_cluster: str, teacher: TeacherSpec
) -> None:
    pool = start_pool(teacher, NEEDS, TeacherPoolSpec(min=1), 0.0)
    ray.get(pool.wait_until_ready.remote(60.0))
    client = TeacherClient(pool, rank=0, timeout_s=60.0, start_timeout_s=60.0)
    with pytest.raises(TeacherError, match="cannot score a batch"):
        client.result(client.submit(_inputs(10**6)))  # no such token
    assert client.result(client.submit(_inputs(40))).valid.all()
    assert list(ray.get(pool.members.remote())) == [0]


@pytest.mark.timeout(200)
def test_the_pool_grows_while_students_wait_and_shrinks_when_they_do_not(
    ray_cluster: str, teacher: TeacherSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "SHRINK_AFTER_S", 0.5)
    pool = TeacherPool(teacher, NEEDS, TeacherPoolSpec(min=1, max=2, cpus=0.5), 0.0)
    pool.wait_until_ready(60.0)
    assert len(pool.heartbeat(client=0, waiting=0.01)) == 1
    deadline = time.monotonic() + 60
    while len(pool.heartbeat(client=1, waiting=0.5)) < 2:  # the slowest student decides
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for _ in range(5):
        assert len(pool.heartbeat(client=1, waiting=0.5)) == 2  # never above max
    assert len(pool.heartbeat(client=1, waiting=0.0)) == 2  # the calm begins here
    time.sleep(0.6)
    assert len(pool.heartbeat(client=1, waiting=0.0)) == 1
    time.sleep(0.6)
    assert len(pool.heartbeat(client=1, waiting=0.0)) == 1  # never below min


@pytest.mark.timeout(200)
def test_a_teacher_that_cannot_load_is_that_error_and_not_an_endless_restart(ray_cluster: str, tmp_path: Path) -> None:
    pool = TeacherPool(TeacherSpec(path=str(tmp_path / "nothing")), NEEDS, TeacherPoolSpec(min=1, max_restarts=1), 0.0)
    with pytest.raises(TeacherError, match=r"max_restarts.*nothing"):
        pool.wait_until_ready(60.0)
