"""A student worker's side of the pool, with the real pool around teachers that only take their time: without Ray."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from benchmarks import teacher_balance
from benchmarks.fakes import Behaviour, FakePool, clients, rendering, stacked
from betakd_ray.background import in_background
from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.errors import TeacherError
from betakd_ray.spec import TeacherPoolSpec, TeacherSpec
from betakd_ray.teacher import client as module
from betakd_ray.teacher import pool as pool_module
from betakd_ray.teacher.answers import Answer
from betakd_ray.teacher.client import TeacherClient
from betakd_ray.teacher.ports import Teacher

DEADLY, BAD, STUCK = 97, 98, 99


def has(token: int):
    return lambda inputs: bool((inputs.input_ids == token).any())


def seconds(inputs: ModelInputs) -> float:
    return float("inf") if has(STUCK)(inputs) else 0.01


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the intervals of heartbeats, and the wait for teachers that leave, to a fraction of their values."""
    for name, value in (("HEARTBEAT_S", 0.1), ("CHECK_S", 0.1), ("POLL_S", (0.02, 0.1))):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(pool_module, "QUIET_S", 0.2)


def pool_of(count: int, max_restarts: int = 20, **behaviour) -> FakePool:
    fields = {"seconds": seconds, "is_deadly": has(DEADLY), "is_refused": has(BAD), **behaviour}
    pool = FakePool(Behaviour(**fields), TeacherPoolSpec(min=count, max_restarts=max_restarts))
    pool.pool.wait_until_ready(10.0)
    return pool


def client_of(pool: FakePool, opened: list[TeacherClient], **fields) -> TeacherClient:
    (client,) = clients(pool, 1, **fields)
    opened.append(client)
    return client


def group(*tokens: int):
    return [rendering(token) for token in tokens]


def assert_answers(answer: Answer, *tokens: int | None) -> None:
    """Check that each sample has its own answer, or none if `tokens` has None."""
    assert len(answer.signals) == len(tokens)
    for signal, token in zip(answer.signals, tokens, strict=True):
        if token is None:
            assert signal is None
        else:
            assert signal is not None
            np.testing.assert_array_equal(signal["hidden"], np.full((4, 2), token))


def test_every_sample_gets_its_own_answer_from_many_threads_at_once(opened) -> None:
    client = client_of(pool_of(3), opened)
    with ThreadPoolExecutor(16) as executor:
        answers = list(executor.map(client.score, [group(at, at + 1) for at in range(2, 80)]))
    for at, answer in zip(range(2, 80), answers, strict=True):
        assert_answers(answer, at, at + 1)
    assert client.in_flight == 0


@pytest.mark.parametrize(("teachers", "ranks"), [(4, 8), (3, 2), (7, 4), (216, 80)])
def test_ranks_spread_over_all_teachers_whatever_their_numbers(teachers: int, ranks: int, opened) -> None:
    """Counted without time: each rank sends the same number of groups, and they stay with their teachers."""
    pool = pool_of(teachers, seconds=lambda _: 1000.0)
    members = clients(pool, ranks)
    opened.extend(members)
    each = -(-4 * teachers // ranks)
    for _ in range(each):
        for client in members:
            client._send(client._stack(group(2)))
    asked = [len(teacher.work) for teacher in pool.teachers]
    assert max(asked) <= 1.10 * sum(asked) / len(asked) + 1


def test_the_simulation_of_many_ranks_runs_in_miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    found = teacher_balance.balance(4, 8, seconds=2.0)
    assert found.at_first < teacher_balance.LIMIT
    assert found.after_deaths < teacher_balance.LIMIT


def test_a_long_queue_is_no_reason_to_take_a_teacher_for_dead(opened) -> None:
    """Thirty groups of 0.1 s with one teacher: the last waits for three seconds, with a limit of half of one."""
    pool = pool_of(1, seconds=lambda _: 0.1)
    client = client_of(pool, opened, timeout_s=0.5)
    with ThreadPoolExecutor(30) as executor:
        answers = list(executor.map(client.score, [group(at) for at in range(2, 32)]))
    for at, answer in enumerate(answers):
        assert_answers(answer, at + 2)
    assert len(pool.teachers) == 1


def test_a_teacher_that_hangs_at_a_group_is_replaced_and_the_others_groups_go_elsewhere(opened) -> None:
    pool = pool_of(2)
    client = client_of(pool, opened, timeout_s=0.5)
    with ThreadPoolExecutor(8) as executor:
        stuck = executor.submit(client.score, group(2, STUCK))
        rest = [executor.submit(client.score, group(at)) for at in range(2, 9)]
        for at, answer in enumerate(rest):
            assert_answers(answer.result(30), at + 2)
        assert_answers(stuck.result(30), 2, None)
    assert "teacher.timeout_s = 0.5 s" in stuck.result().reasons[1]


def test_a_teacher_that_is_silent_is_replaced(opened) -> None:
    pool = pool_of(1)
    client = client_of(pool, opened, timeout_s=0.5)
    assert_answers(client.score(group(2)), 2)
    pool.teachers[0].is_silent = True
    assert_answers(client.score(group(3)), 3)
    assert [teacher.number for teacher in pool.members()] == [1]


def test_no_group_is_lost_with_a_teacher_and_none_is_suspected_for_long(opened) -> None:
    pool = pool_of(2, seconds=lambda _: 0.05)
    client = client_of(pool, opened)
    with ThreadPoolExecutor(12) as executor:
        answers = [executor.submit(client.score, group(at)) for at in range(2, 26)]
        time.sleep(0.1)
        pool.teachers[0].kill()
        for at, answer in enumerate(answers):
            assert_answers(answer.result(30), at + 2)
    assert len(pool.teachers) == 3


def test_a_deadly_sample_is_found_while_other_groups_go_on(opened) -> None:
    pool = pool_of(3, load_s=0.3)
    client = client_of(pool, opened)
    stop, went_on = threading.Event(), []

    def others() -> None:
        while not stop.is_set():
            assert_answers(client.score(group(5)), 5)
            went_on.append(time.monotonic())

    with ThreadPoolExecutor(4) as executor:
        other: Future[None] = executor.submit(others)
        begin = time.monotonic()
        answer = executor.submit(client.score, group(2, 3, DEADLY, 4)).result(60)
        took = time.monotonic() - begin
        stop.set()
        other.result(10)
    assert_answers(answer, 2, 3, None, 4)
    assert "died" in answer.reasons[2]
    # The others were answered throughout, and not only before and after the search.
    halves = [sum(1 for at in went_on if begin + part * took <= at < begin + (part + 0.5) * took) for part in (0, 0.5)]
    assert min(halves) > 5


def test_two_deadly_samples_are_found_by_two_searches_at_once(opened) -> None:
    pool = pool_of(3)
    client = client_of(pool, opened)
    with ThreadPoolExecutor(2) as executor:
        answers = [executor.submit(client.score, group(*tokens)) for tokens in ((2, DEADLY), (DEADLY, 3))]
        assert_answers(answers[0].result(60), 2, None)
        assert_answers(answers[1].result(60), None, 3)


def test_a_sample_that_a_teacher_cannot_score_costs_no_teacher(opened) -> None:
    pool = pool_of(1)
    client = client_of(pool, opened)
    answer = client.score(group(2, BAD, 3))
    assert_answers(answer, 2, None, 3)
    assert "IndexError" in answer.reasons[1]
    assert len(pool.teachers) == 1
    with pytest.raises(TeacherError, match="could not score any sample of a batch"):
        client.score(group(BAD, BAD))


def test_there_is_no_deadline_while_the_pool_is_replacing(opened) -> None:
    """The new one takes longer than every limit there is."""
    pool = pool_of(1)
    client = client_of(pool, opened, timeout_s=0.2, start_timeout_s=0.3)
    assert_answers(client.score(group(2)), 2)
    pool.pool.behaviour = Behaviour(seconds=seconds, load_s=1.5)
    pool.teachers[0].kill()
    begin = time.monotonic()
    assert_answers(client.score(group(3)), 3)
    assert time.monotonic() - begin > 1.4


def test_a_pool_that_has_given_up_is_that_error_for_everyone(opened) -> None:
    pool = pool_of(1, max_restarts=1)
    first, second = (client_of(pool, opened) for _ in range(2))
    assert_answers(first.score(group(2)), 2)
    with pool.lock:
        pool.pool._deaths = 1  # none was answered since; the heartbeats say otherwise
    pool.teachers[0].kill()
    for client in (first, second):
        with pytest.raises(TeacherError, match=r"more often in a row than cluster\.teacher\.max_restarts"):
            client.score(group(3))


def test_a_pool_without_any_teacher_to_come_is_an_error_in_the_end(opened) -> None:
    pool = pool_of(1)
    client = client_of(pool, opened, start_timeout_s=0.3)
    with pool.lock:
        pool.pool._members.clear()
        pool.pool._version += 1
    with pytest.raises(TeacherError, match=r"no teacher came back within cluster\.start_timeout_s = 0\.3 s"):
        client.score(group(2))


def test_the_head_comes_from_a_teacher_that_lives(opened) -> None:
    pool = pool_of(2)
    client = client_of(pool, opened)
    head = client.head()
    assert head is not None
    assert head[0, 0] == 0
    pool.teachers[0].kill()
    head = client.head()
    assert head is not None
    assert head[0, 0] == 1


def test_a_silent_teacher_is_waited_for_neither_at_the_start_of_a_client_nor_of_a_job(opened) -> None:
    pool = pool_of(2)
    client = client_of(pool, opened, timeout_s=0.2)
    pool.teachers[0].is_silent = True
    head = in_background(client.head, "head").result(10)
    assert head is not None
    assert head[0, 0] == 1
    pool.pool._teacher = TeacherSpec(path="org/none", timeout_s=0.2)
    pool.teachers[1].is_silent = True
    in_background(lambda: pool.pool.wait_until_ready(5.0), "ready").result(10)
    assert not {0, 1} & set(pool.pool._members)


def test_a_search_that_needed_a_teacher_of_its_own_goes_on_with_the_only_one(opened) -> None:
    """A teacher dies while a group is searched for the sample at which teachers raise an error."""
    deaths = iter([True])
    pool = pool_of(1, is_deadly=lambda inputs: not has(BAD)(inputs) and next(deaths, False))
    client = client_of(pool, opened)
    answer = in_background(lambda: client.score(group(2, BAD, 3)), "score").result(20)
    assert_answers(answer, 2, None, 3)
    assert not pool.pool.is_leasing()


def leased(pool: FakePool, holder: str) -> Teacher:
    """Poll the pool for a teacher of its own, as a client does."""
    deadline = time.monotonic() + 10
    while (teacher := pool.lease(holder)) is None:
        assert time.monotonic() < deadline, "no teacher was leased"
        time.sleep(0.02)
    return teacher


@pytest.mark.parametrize("count", [1, 2])
def test_a_teacher_that_hangs_while_it_finishes_its_groups_is_replaced(count: int) -> None:
    """Its group is one of a student that has died, so no client reports it."""
    pool = pool_of(count)
    pool.pool._teacher = TeacherSpec(path="org/none", timeout_s=0.2)
    hanging = pool.teachers[-1]
    hanging.submit(stacked(group(STUCK)))
    assert leased(pool, "a/0").number != hanging.number
    assert hanging.dies_at <= time.monotonic(), "it would keep its GPU"


def test_a_teacher_that_hangs_while_it_leaves_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "SHRINK_AFTER_S", 0.0)
    pool = FakePool(Behaviour(seconds=seconds), TeacherPoolSpec(min=1, max=2))
    pool.pool._teacher = TeacherSpec(path="org/none", timeout_s=0.2)
    pool.pool.wait_until_ready(10.0)
    pool.heartbeat("a", 1.0, 1, -1)
    hanging = pool.teachers[1]
    pool.members()
    hanging.submit(stacked(group(STUCK)))
    deadline = time.monotonic() + 10
    while hanging.dies_at > time.monotonic():
        assert time.monotonic() < deadline
        pool.heartbeat("a", 0.0, 1, -1)
        time.sleep(0.02)


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_pool_whose_teacher_is_leased_does_not_grow_beyond_its_maximum(is_alive: bool) -> None:
    pool = pool_of(2)
    leased(pool, "a/0")
    pool.heartbeat("b", 1.0, 1, -1)
    pool.end_lease("a/0", is_alive=is_alive)
    assert len(pool.members()) == 2
    assert len(pool.teachers) == (2 if is_alive else 3)


def test_the_pool_hears_how_long_students_wait_without_the_training_s_help(opened) -> None:
    pool = pool_of(1)
    client = client_of(pool, opened)
    for _ in range(10):
        began = time.monotonic()
        time.sleep(0.05)
        client.report_waiting(time.monotonic() - began)  # as long as it was: a busy machine sleeps longer
    assert max(share for _, share in pool.pool._reports.values()) > 0.4
    time.sleep(0.3)
    assert max(share for _, share in pool.pool._reports.values()) == 0.0


def test_who_waits_is_told_that_the_client_was_closed(opened) -> None:
    client = client_of(pool_of(1), opened)
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(client.score, group(STUCK))
        time.sleep(0.1)
        client.close()
        with pytest.raises(TeacherError, match="was closed"):
            waiting.result(10)
