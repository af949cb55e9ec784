"""The teacher pool with real actors: it survives the death of its members, and is as large as the students need."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import ray

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.packing import stack
from betakd_ray.batch.sample import Rendering
from betakd_ray.errors import TeacherError
from betakd_ray.spec import TeacherPoolSpec, TeacherSpec
from betakd_ray.teacher import pool as pool_module
from betakd_ray.teacher.answers import GroupAnswer
from betakd_ray.teacher.client import TeacherClient
from betakd_ray.teacher.parts import Needs
from betakd_ray.teacher.pool import TeacherPool
from betakd_ray.teacher.remote import RemotePool
from betakd_ray.teacher.scorer import TeacherScorer
from betakd_ray.teacher.sharing import start_pool
from tests.tiny import IDS, IMAGE, PAD, save_tiny

NEEDS = Needs(frozenset({"hidden"}))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherSpec:
    return TeacherSpec(path=save_tiny(tmp_path_factory.mktemp("teacher"), seed=1), timeout_s=60.0)


def _client(pool, teacher: TeacherSpec, opened: list[TeacherClient]) -> TeacherClient:
    client = TeacherClient(
        RemotePool(pool), 0, 1, teacher, 60.0, lambda group: stack(list(group), IDS[PAD], IDS[IMAGE])
    )
    opened.append(client)
    return client


def _group(*tokens: int) -> list[Rendering]:
    """Return text-only samples of four equal tokens, of which the last one is the answer."""
    return [Rendering(np.full(4, token, np.int32), np.arange(4) == 3) for token in tokens]


def _members(pool) -> dict:
    return ray.get(pool.members.remote())


def _pid(teacher) -> int:
    return ray.get(teacher.actor.__ray_call__.remote(lambda _self: os.getpid()))


@pytest.mark.timeout(200)
def test_a_killed_teacher_is_replaced_and_no_group_is_lost(ray_cluster: str, teacher: TeacherSpec, opened) -> None:
    pool = start_pool(teacher, NEEDS, TeacherPoolSpec(min=1), 0.0, "tests")
    ray.get(pool.wait_until_ready.remote(150.0))
    client = _client(pool, teacher, opened)
    (before,) = client.score(_group(40)).signals
    assert before is not None
    with ThreadPoolExecutor(4) as executor:
        answers = [executor.submit(client.score, _group(token)) for token in (40, 41, 42)]
        (member,) = _members(pool).values()
        os.kill(_pid(member), signal.SIGKILL)
        answers.append(executor.submit(client.score, _group(40)))
        signals = [answer.result().signals[0] for answer in answers]
    for one in (signals[0], signals[-1]):
        assert one is not None
        np.testing.assert_array_equal(one["hidden"], before["hidden"])
    assert list(_members(pool)) == [1]  # the first is gone, the second is there
    os.kill(_pid(_members(pool)[1]), signal.SIGKILL)  # while no student is there to notice
    ray.get(pool.wait_until_ready.remote(150.0))  # the next job's
    assert list(_members(pool)) == [2]


@pytest.mark.timeout(200)
def test_a_sample_that_the_teacher_cannot_score_takes_no_part_and_the_rest_of_its_group_does(
    ray_cluster: str, teacher: TeacherSpec, opened
) -> None:
    pool = start_pool(teacher, NEEDS, TeacherPoolSpec(min=1, max_restarts=2), 0.0, "tests")
    ray.get(pool.wait_until_ready.remote(150.0))
    client = _client(pool, teacher, opened)
    half, whole = (client.score(_group(*tokens)) for tokens in [(40, 10**6), (41, 41)])  # there is no such token
    assert half.signals[1] is None
    assert "IndexError" in half.reasons[1]
    assert None not in whole.signals
    (expected,) = client.score(_group(40)).signals
    assert half.signals[0] is not None
    assert expected is not None
    assert np.allclose(half.signals[0]["hidden"], expected["hidden"], atol=1e-5)
    assert list(_members(pool)) == [0]  # it raised, and lives


@pytest.mark.timeout(200)
def test_the_head_goes_from_a_teacher_to_the_students_as_one_object(ray_cluster: str, teacher: TeacherSpec, opened):
    pool = start_pool(teacher, NEEDS, TeacherPoolSpec(min=1), 0.0, "tests")
    facts = ray.get(pool.wait_until_ready.remote(150.0))
    head = _client(pool, teacher, opened).head()
    assert head is not None
    np.testing.assert_array_equal(head, TeacherScorer(teacher, NEEDS).head())
    assert head.shape[1] == facts.width
    (member,) = _members(pool).values()
    first, second = (ray.get(member.actor.head_reference.remote())[0] for _ in range(2))
    assert first == second  # so that a node that has it need not fetch it again


class SlowScorer(TeacherScorer):
    """Teacher that needs long for one group, while others arrive."""

    def _receive(self, inputs: ModelInputs):
        self.received = getattr(self, "received", 0) + 1
        return super()._receive(inputs)

    def _score(self, inputs: ModelInputs) -> GroupAnswer:
        answer = super()._score(inputs)
        time.sleep(1.0)  # on its way out
        return answer


class SlowPool(TeacherPool):
    """Pool of slow teachers."""

    def _engine(self) -> type[TeacherScorer]:
        return SlowScorer


@pytest.mark.timeout(200)
def test_a_teacher_takes_in_the_next_group_while_it_sends_and_says_how_it_is(
    ray_cluster: str, teacher: TeacherSpec, opened
) -> None:
    pool = ray.remote(SlowPool).options(num_cpus=0).remote(teacher, NEEDS, TeacherPoolSpec(min=1), 0.0)
    ray.get(pool.wait_until_ready.remote(150.0))
    client = _client(pool, teacher, opened)
    client.score(_group(40))
    begin = time.monotonic()
    with ThreadPoolExecutor(3) as executor:
        answers = [executor.submit(client.score, _group(token)) for token in (41, 42, 43)]
        time.sleep(0.3)
        (member,) = _members(pool).values()
        asked = time.monotonic()
        assert member.health(10.0) < 1.0
        assert time.monotonic() - asked < 0.5  # at once, with three groups in hand
        assert all(None not in answer.result().signals for answer in answers)
    assert time.monotonic() - begin < 2.5  # one after the other it would be 3 s


DEADLY = 77


class MortalScorer(TeacherScorer):
    """Teacher that dies when it scores a certain token."""

    def _score(self, inputs: ModelInputs) -> GroupAnswer:
        if (inputs.input_ids == DEADLY).any():
            os._exit(1)
        return super()._score(inputs)


class MortalPool(TeacherPool):
    """Pool of mortal teachers."""

    def _engine(self) -> type[TeacherScorer]:
        return MortalScorer


@pytest.mark.timeout(300)
def test_a_sample_that_kills_its_teachers_is_found_and_every_other_answered(
    ray_cluster: str, teacher: TeacherSpec, opened
) -> None:
    pool = (
        ray.remote(MortalPool).options(num_cpus=0).remote(teacher, NEEDS, TeacherPoolSpec(min=1, max_restarts=2), 0.0)
    )
    ray.get(pool.wait_until_ready.remote(150.0))
    client = _client(pool, teacher, opened)
    with ThreadPoolExecutor(3) as executor:
        groups = [(40, 40), (DEADLY, 41), (42, 42)]
        first, half, last = executor.map(client.score, [_group(*tokens) for tokens in groups])
    assert None not in first.signals
    assert [signal is None for signal in half.signals] == [True, False]
    assert "died" in half.reasons[0]
    assert None not in last.signals


@pytest.mark.timeout(200)
def test_a_teacher_that_cannot_score_anything_is_an_error(ray_cluster: str, teacher: TeacherSpec, opened) -> None:
    pool = start_pool(teacher, NEEDS, TeacherPoolSpec(min=1, max_restarts=2), 0.0, "tests")
    ray.get(pool.wait_until_ready.remote(150.0))
    with pytest.raises(TeacherError, match="could not score any sample of a batch"):
        _client(pool, teacher, opened).score(_group(10**6, 10**6))


@pytest.mark.timeout(200)
def test_a_teacher_that_hangs_is_replaced_and_its_groups_go_elsewhere(
    ray_cluster: str, teacher: TeacherSpec, opened
) -> None:
    pool = start_pool(teacher, NEEDS, TeacherPoolSpec(min=1), 0.0, "tests")
    ray.get(pool.wait_until_ready.remote(150.0))
    client = _client(pool, teacher.model_copy(update={"timeout_s": 3.0}), opened)
    (member,) = _members(pool).values()
    os.kill(_pid(member), signal.SIGSTOP)
    with ThreadPoolExecutor(2) as executor:
        for answer in executor.map(client.score, [_group(40), _group(41)]):
            assert None not in answer.signals
    assert list(_members(pool)) == [1]


def _size(pool: TeacherPool, client: str, waiting: float) -> int:
    """Send a heartbeat and return the number of members."""
    roster = pool.heartbeat(client, waiting, answers=1)
    assert roster.members is not None
    assert pool.roster(roster.version).members is None  # handles travel only to who does not have them
    return len(roster.members)


@pytest.mark.timeout(200)
def test_the_pool_grows_while_students_wait_and_shrinks_when_they_do_not(
    ray_cluster: str, teacher: TeacherSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "SHRINK_AFTER_S", 0.5)
    monkeypatch.setattr(pool_module, "QUIET_S", 0.5)
    pool = TeacherPool(teacher, NEEDS, TeacherPoolSpec(min=1, max=2, cpus=0.5), 0.0)
    pool.wait_until_ready(150.0)
    assert _size(pool, client="a", waiting=0.01) == 1
    deadline = time.monotonic() + 60
    while _size(pool, client="b", waiting=0.5) < 2:  # the slowest student decides
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for _ in range(5):
        assert _size(pool, client="b", waiting=0.5) == 2  # never above max
    assert _size(pool, client="b", waiting=0.0) == 2  # the calm begins here
    time.sleep(0.6)
    assert _size(pool, client="b", waiting=0.0) == 1
    time.sleep(0.6)
    assert _size(pool, client="b", waiting=0.0) == 1  # never below min


@pytest.mark.timeout(200)
def test_a_teacher_that_cannot_load_is_that_error_and_not_an_endless_restart(ray_cluster: str, tmp_path: Path) -> None:
    pool = TeacherPool(TeacherSpec(path=str(tmp_path / "nothing")), NEEDS, TeacherPoolSpec(min=1, max_restarts=1), 0.0)
    with pytest.raises(TeacherError, match=r"max_restarts.*nothing"):
        pool.wait_until_ready(150.0)
