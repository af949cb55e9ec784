"""Pools that jobs share, tested with fake pools."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from ray.actor import ActorHandle

import betakd_ray.teacher.sharing as module
from betakd_ray.errors import Interrupted, ModelError
from betakd_ray.sigterm import StopRequest
from betakd_ray.spec import TeacherPoolSpec, TeacherSpec
from betakd_ray.teacher.parts import Needs
from betakd_ray.teacher.sharing import Teachers

TEACHER, OTHER = TeacherSpec(path="org/teacher"), TeacherSpec(path="org/other")
LOGITS = Needs(frozenset({"hidden"}))
VISION = Needs(frozenset({"hidden", "teacher_vision"}))
VISUAL = Needs(frozenset({"visual"}))
TOP_K = Needs(frozenset({"top_ids", "top_log_probs"}), top_k=4, vocab=9)


class Pool(ActorHandle):
    """Fake handle of a pool."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        pass


@pytest.fixture
def pools(monkeypatch):
    """Return the list of the started pools and the list of the numbers of the ended pools."""
    started, ended = [], []
    monkeypatch.setattr(module, "start_pool", lambda *asked: started.append(asked) or Pool(len(started)))
    monkeypatch.setattr(module.ray, "kill", lambda pool: ended.append(pool.number))
    return started, ended


def share(teachers, teacher=TEACHER, needs=LOGITS):
    return teachers.share(teacher, needs, TeacherPoolSpec(), 0.0, "job")


def test_jobs_side_by_side_and_one_after_the_other_share_a_pool(pools):
    started, ended = pools
    with Teachers() as teachers:
        with share(teachers) as (first, _), share(teachers) as (second, _):
            assert first is second
        with share(teachers) as (third, _):
            assert third is first
        assert not ended
    assert (len(started), ended) == (1, [1])


def test_another_teacher_takes_the_place_of_one_that_nobody_uses(pools):
    _, ended = pools
    with Teachers() as teachers:
        with share(teachers) as (first, _), share(teachers, OTHER) as (second, _):
            assert first is not second
            assert not ended
        with share(teachers, OTHER):
            assert not ended
            with share(teachers, needs=VISION):
                assert ended == [first.number]
    assert ended == [1, 2, 3]


def test_a_pool_that_saw_a_job_fail_is_not_lent_again_and_ends_with_its_last_user(pools):
    _, ended = pools
    with Teachers() as teachers, share(teachers) as (first, _):
        with pytest.raises(RuntimeError), share(teachers):
            raise RuntimeError
        assert not ended
        with share(teachers) as (second, _):
            assert second is not first
        assert not ended
    assert ended == [1, 2]


def test_what_is_expected_is_asked_for_at_once(pools):
    started, _ = pools
    with Teachers() as teachers:
        for needs in (LOGITS, VISION, VISUAL, TOP_K):
            teachers.expect(TEACHER, needs)
        with share(teachers) as (_, needs):
            assert needs == Needs(frozenset({"hidden", "visual", "teacher_vision"}))
        with share(teachers, needs=VISUAL) as (_, again):
            assert again == needs
        with share(teachers, needs=TOP_K) as (_, needs):
            assert needs == TOP_K
        with share(teachers, OTHER) as (_, needs):
            assert needs == LOGITS
    assert len(started) == 3


def test_what_one_job_found_out_the_others_know_also_those_beside_it():
    teachers, calls = Teachers(), []

    def find():
        calls.append(time.sleep(0.05))
        return "found"

    with ThreadPoolExecutor(8) as jobs:
        answers = list(jobs.map(lambda _: teachers.once("key", find, StopRequest("")), range(8)))
    assert len(calls) == 1
    assert sorted(answers) == [("found", False)] * 7 + [("found", True)]
    assert teachers.once("another", lambda: "new", StopRequest("")) == ("new", True)


def test_what_failed_is_asked_again_by_the_next_job():
    teachers = Teachers()
    with pytest.raises(ModelError, match="once"):
        teachers.once("key", lambda: _raise(ModelError("once")), StopRequest(""))
    assert teachers.once("key", lambda: "found", StopRequest("")) == ("found", True)


def test_a_job_that_waits_for_another_ones_finding_can_be_stopped():
    teachers, stop, may_end = Teachers(), StopRequest("was asked to stop"), threading.Event()
    with ThreadPoolExecutor(1) as other:
        slow = other.submit(teachers.once, "key", may_end.wait, StopRequest(""))
        try:
            threading.Timer(0.1, stop.make).start()
            with pytest.raises(Interrupted, match="asked to stop"):
                teachers.once("key", lambda: pytest.fail("not my turn"), stop)
        finally:
            may_end.set()
        assert slow.result() == (True, True)


def _raise(error):
    raise error
