"""The teacher pool with real actors: it outlives its members, and is as large as the students need."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.errors import TeacherError
from betakd_ray.spec import TeacherPoolSpec, TeacherSpec
from betakd_ray.teacher import pool as pool_module
from betakd_ray.teacher.client import TeacherClient
from betakd_ray.teacher.pool import TeacherPool, start_pool
from betakd_ray.teacher.scorer import TeacherScorer
from betakd_ray.teacher.signal import Needs, Signal
from tests.tiny import save_tiny

NEEDS = Needs(hidden=True)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherSpec:
    return TeacherSpec(path=save_tiny(tmp_path_factory.mktemp("teacher"), seed=1))


def _inputs(*tokens: int) -> ModelInputs:
    """Two text-only samples of four tokens (one token throughout), the last of them the answer."""
    ids = np.array([[token] * 4 for token in (tokens * 2)[:2]], dtype=np.int64)
    nowhere = np.zeros(0, dtype=np.int64)
    return ModelInputs(
        input_ids=ids,
        attention_mask=np.ones_like(ids),
        images={},
        image_rows={},
        answer_rows=np.array([2, 6]),
        row_sample=np.array([0, 1]),
        targets=ids[:, 3],
        visual_sample=nowhere,
        visual_position=nowhere,
    )


def _pid(actor) -> int:
    return ray.get(actor.__ray_call__.remote(lambda _self: os.getpid()))


@pytest.mark.timeout(200)
def test_a_killed_teacher_is_replaced_and_no_batch_is_lost(ray_cluster: str, teacher: TeacherSpec) -> None:
    pool = start_pool(teacher, NEEDS, TeacherPoolSpec(min=1), 0.0, "tests")
    ray.get(pool.wait_until_ready.remote(150.0))
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
    os.kill(_pid(ray.get(pool.members.remote())[1]), signal.SIGKILL)  # while no student is there to notice
    ray.get(pool.wait_until_ready.remote(150.0))  # the next job's
    assert list(ray.get(pool.members.remote())) == [2]


@pytest.mark.timeout(200)
def test_a_sample_that_the_teacher_cannot_score_takes_no_part_and_the_rest_of_its_batch_does(
    ray_cluster: str, teacher: TeacherSpec
) -> None:
    pool = start_pool(teacher, NEEDS, TeacherPoolSpec(min=1, max_restarts=2), 0.0, "tests")
    ray.get(pool.wait_until_ready.remote(150.0))
    client = TeacherClient(pool, rank=0, timeout_s=60.0, start_timeout_s=60.0)
    requests = [client.submit(_inputs(*tokens)) for tokens in [(40, 10**6), (41,)]]  # there is no such token
    half, whole = (client.result(request) for request in requests)
    assert list(half.valid) == [True, False]
    assert "IndexError" in half.reasons[1]
    assert whole.valid.all()
    expected = client.result(client.submit(_inputs(40)))
    assert half.hidden
    assert expected.hidden
    assert np.allclose(half.hidden.array[0], expected.hidden.array[0], atol=1e-5)
    assert list(ray.get(pool.members.remote())) == [0]  # it raised, and lives


DEADLY = 77


class MortalScorer(TeacherScorer):
    """Dies of one token."""

    def score(self, inputs: ModelInputs) -> Signal:
        if (inputs.input_ids == DEADLY).any():
            os._exit(1)
        return super().score(inputs)


class MortalPool(TeacherPool):
    """Of such teachers."""

    _scorer = MortalScorer


@pytest.mark.timeout(300)
def test_a_sample_that_kills_its_teachers_is_found_and_every_other_answered(
    ray_cluster: str, teacher: TeacherSpec
) -> None:
    pool = (
        ray.remote(MortalPool).options(num_cpus=0).remote(teacher, NEEDS, TeacherPoolSpec(min=1, max_restarts=2), 0.0)
    )
    ray.get(pool.wait_until_ready.remote(150.0))
    client = TeacherClient(pool, rank=0, timeout_s=60.0, start_timeout_s=60.0)
    requests = [client.submit(_inputs(*tokens)) for tokens in [(40,), (DEADLY, 41), (42,)]]
    first, half, last = (client.result(request) for request in requests)
    assert first.valid.all()
    assert list(half.valid) == [False, True]
    assert "died" in half.reasons[0]
    assert last.valid.all()  # it was queued behind the deadly one, and is not suspected for it


@pytest.mark.timeout(200)
def test_a_teacher_that_cannot_score_anything_is_an_error(ray_cluster: str, teacher: TeacherSpec) -> None:
    pool = start_pool(teacher, NEEDS, TeacherPoolSpec(min=1, max_restarts=2), 0.0, "tests")
    ray.get(pool.wait_until_ready.remote(150.0))
    client = TeacherClient(pool, rank=0, timeout_s=60.0, start_timeout_s=60.0)
    with pytest.raises(TeacherError, match="cannot score a batch"):
        client.result(client.submit(_inputs(10**6)))


@pytest.mark.timeout(200)
def test_a_teacher_that_hangs_is_replaced_and_its_batches_go_elsewhere(ray_cluster: str, teacher: TeacherSpec) -> None:
    pool = start_pool(teacher, NEEDS, TeacherPoolSpec(min=1), 0.0, "tests")
    ray.get(pool.wait_until_ready.remote(150.0))
    client = TeacherClient(pool, rank=0, timeout_s=3.0, start_timeout_s=60.0)
    (actor,) = ray.get(pool.members.remote()).values()
    os.kill(_pid(actor), signal.SIGSTOP)
    requests = [client.submit(_inputs(token)) for token in (40, 41)]
    assert all(client.result(request).valid.all() for request in requests)
    assert list(ray.get(pool.members.remote())) == [1]


@pytest.mark.timeout(200)
def test_the_pool_grows_while_students_wait_and_shrinks_when_they_do_not(
    ray_cluster: str, teacher: TeacherSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "SHRINK_AFTER_S", 0.5)
    pool = TeacherPool(teacher, NEEDS, TeacherPoolSpec(min=1, max=2, cpus=0.5), 0.0)
    pool.wait_until_ready(150.0)
    assert len(pool.heartbeat(client="a", waiting=0.01, answers=1)) == 1
    deadline = time.monotonic() + 60
    while len(pool.heartbeat(client="b", waiting=0.5, answers=1)) < 2:  # the slowest student decides
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for _ in range(5):
        assert len(pool.heartbeat(client="b", waiting=0.5, answers=1)) == 2  # never above max
    assert len(pool.heartbeat(client="b", waiting=0.0, answers=1)) == 2  # the calm begins here
    time.sleep(0.6)
    assert len(pool.heartbeat(client="b", waiting=0.0, answers=1)) == 1
    time.sleep(0.6)
    assert len(pool.heartbeat(client="b", waiting=0.0, answers=1)) == 1  # never below min


@pytest.mark.timeout(200)
def test_a_teacher_that_cannot_load_is_that_error_and_not_an_endless_restart(ray_cluster: str, tmp_path: Path) -> None:
    pool = TeacherPool(TeacherSpec(path=str(tmp_path / "nothing")), NEEDS, TeacherPoolSpec(min=1, max_restarts=1), 0.0)
    with pytest.raises(TeacherError, match=r"max_restarts.*nothing"):
        pool.wait_until_ready(150.0)
