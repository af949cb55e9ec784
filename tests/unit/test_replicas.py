"""Every teacher of a pool is the checked one: the real pool, with teachers whose answers depend on their number."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.fakes import Behaviour, FakePool, answered, rendering, stacked
from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.errors import TeacherError
from betakd_ray.spec import TeacherPoolSpec
from betakd_ray.teacher import pool as module
from betakd_ray.teacher.answers import GroupAnswer
from betakd_ray.teacher.canary import KnownAnswer, Replica, digest_of
from betakd_ray.teacher.ports import Unanswered

INPUTS = stacked([rendering(5)])
(SIGNAL,) = answered(INPUTS).signals()
assert SIGNAL is not None
CANARY = KnownAnswer(INPUTS, SIGNAL, "float32", Replica("node-of-the-first", "cpu", {"torch": "0.1"}))


def scaled(hidden_by: float) -> Callable[[ModelInputs], GroupAnswer]:
    def answer(inputs: ModelInputs) -> GroupAnswer:
        whole = answered(inputs)
        return replace(whole, arrays={"hidden": np.float32(hidden_by) * whole.arrays["hidden"]})

    return answer


def not_finite(inputs: ModelInputs) -> GroupAnswer:
    return replace(answered(inputs), is_finite=np.zeros(inputs.size, dtype=bool))


def refused(inputs: ModelInputs) -> GroupAnswer:
    raise Unanswered("IndexError: no such token", is_deadly=False)


OTHERS: dict[str, Callable[[ModelInputs], GroupAnswer]] = {
    "other weights": scaled(1.1),
    "another sign": scaled(-1.0),
    "not finite": not_finite,
}


def pool_of(others: dict[int, Callable[[ModelInputs], GroupAnswer]], **size: Any) -> tuple[FakePool, list[str]]:
    """Return a pool whose first teacher is checked, and what it tells. `others` has the teachers that differ."""

    def answer(number: int, inputs: ModelInputs) -> GroupAnswer:
        return others.get(number, answered)(inputs)

    pool = FakePool(Behaviour(answer=answer), TeacherPoolSpec(max_restarts=20, **size))
    pool.pool.wait_until_ready(10.0)
    said: list[str] = []
    pool.pool.require_answer(CANARY, 0, said.append)
    return pool, said


def settled(pool: FakePool) -> list[int]:
    """Return the numbers of the members, once no teacher is starting."""
    for _ in range(20):
        members = sorted(pool.pool.members())
        if not pool.pool._pending:
            return members
    raise AssertionError("the pool starts teachers for ever")


@pytest.mark.parametrize("other", OTHERS)
def test_a_replica_that_differs_is_ended_and_replaced_and_the_difference_is_said(other: str) -> None:
    pool, said = pool_of({1: OTHERS[other]}, min=3)
    assert settled(pool) == [0, 2, 3]
    assert pool.teachers[1].dies_at < float("inf")
    (text,) = said
    assert "node-of-the-first" in text
    assert Replica.here(pool.teachers[1]).node in text
    assert "torch" in text
    assert "0.1" in text


def test_honest_replicas_are_members_and_nothing_is_said() -> None:
    pool, said = pool_of({}, min=3)
    assert settled(pool) == [0, 1, 2]
    assert not said
    assert all(teacher.dies_at == float("inf") for teacher in pool.teachers)


def test_rounding_is_no_difference() -> None:
    pool, said = pool_of({1: scaled(1 + 1e-5)}, min=2)
    assert settled(pool) == [0, 1]
    assert not said


def test_no_teacher_but_the_checked_one_is_a_member_before_it_has_answered() -> None:
    pool, _ = pool_of({1: OTHERS["other weights"]}, min=2)
    assert list(pool.pool._members) == [0]
    assert pool.pool.roster(-1).is_expecting


def test_a_replacement_and_a_growth_are_asked_too() -> None:
    pool, said = pool_of({1: OTHERS["other weights"], 3: OTHERS["other weights"]}, min=1, max=2)
    pool.lost(0, "it died")  # 1 differs, 2 is taken in
    assert settled(pool) == [2]
    pool.heartbeat("student", 0.9, 1, -1)  # it waits for teachers: 3 differs, 4 is taken in
    assert settled(pool) == [2, 4]
    assert len(said) == 2


def test_a_leased_teacher_is_a_proven_one() -> None:
    """A student examines a deadly sample with it, and takes its answers to the other samples as signals."""
    pool, said = pool_of({1: OTHERS["other weights"]}, min=1)
    pool.lost(0, "it died")
    leased = next(filter(None, (pool.lease("student/0") for _ in range(9))))
    assert leased.number == 2
    assert len(said) == 1


def test_replicas_that_differ_again_and_again_end_the_job_with_both_nodes_named() -> None:
    pool, said = pool_of(dict.fromkeys(range(1, 99), OTHERS["other weights"]), min=2)
    with pytest.raises(TeacherError, match=r"3 teachers in a row are not the checked one.*node-of-the-first"):
        settled(pool)
    assert len(said) == module.MOST_DIFFERING
    with pytest.raises(TeacherError):  # from then on every caller hears it
        pool.roster(-1)


def test_a_replica_that_cannot_answer_the_canary_counts_as_dead() -> None:
    pool, said = pool_of({1: refused}, min=2)
    assert settled(pool) == [0, 2]
    assert not said
    assert pool.pool.restarts == 1


def test_the_canary_of_the_first_job_stays_and_the_newest_job_is_told() -> None:
    pool, said = pool_of({}, min=1)
    later: list[str] = []
    other = KnownAnswer(INPUTS, {"hidden": -CANARY.signal["hidden"]}, "float32", CANARY.replica)
    pool.pool.require_answer(other, 0, later.append)
    pool.lost(0, "it died")
    assert settled(pool) == [1]  # as the first canary is still the one that is asked
    assert not said
    assert not later


def test_the_digest_of_a_canary_is_that_of_its_tokens_and_pixels() -> None:
    assert digest_of(INPUTS) == digest_of(stacked([rendering(5)]))
    assert digest_of(INPUTS) != digest_of(stacked([rendering(6)]))
