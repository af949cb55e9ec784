"""The monitor: what it counts once, and when it gives up."""

import pytest

from betakd_ray.data.plan import Quarantined
from betakd_ray.on_ray.monitor import Monitor, Report
from betakd_ray.on_ray.watch import Roll
from tests.actors import Local


def _bad(index: int) -> Quarantined:
    return Quarantined(0, 0, index, str(index), "broken")


def test_a_sample_that_is_read_twice_is_quarantined_once() -> None:
    monitor = Monitor(10, [_bad(1)], max_failures=3)
    assert monitor.quarantine([_bad(1), _bad(0)]) == 0.2
    assert [bad.index for bad in monitor.quarantined()] == [0, 1]
    assert monitor.beat("", 0, "", 60.0).quarantined == 2


def test_a_rank_that_says_nothing_for_too_long_is_told_to_the_others_with_what_it_did() -> None:
    roll = Roll()
    roll.begin("a")
    for second in range(0, 12, 2):
        roll.heard("a", 0, "step 7", limit_s=10.0, now=float(second))
        if second < 2:
            roll.heard("a", 1, "step 7, its feed at teacher_wait", limit_s=10.0, now=float(second))
        assert roll.silent(10.0, float(second)) == ""
    roll.heard("a", 0, "step 7", limit_s=10.0, now=12.0)
    assert (
        roll.silent(10.0, 12.0)
        == "rank 1 has sent nothing for 12 s. Its last activity: step 7, its feed at teacher_wait."
    )
    roll.begin("b")
    roll.heard("a", 1, "late", limit_s=10.0, now=13.0)  # of workers that are gone
    assert roll.silent(0.0, 100.0) == ""


def test_no_rank_is_to_blame_where_the_monitor_itself_stood_still() -> None:
    roll = Roll()
    roll.begin("a")
    for rank in (0, 1):
        roll.heard("a", rank, "", limit_s=10.0, now=0.0)
    roll.heard("a", 0, "", limit_s=10.0, now=100.0)  # both had beaten all the time, and wait in its queue
    assert roll.silent(10.0, 100.0) == ""
    for second in (104, 108, 112):
        roll.heard("a", 0, "", limit_s=10.0, now=float(second))
    assert roll.silent(10.0, 112.0).startswith("rank 1")


def test_a_rank_that_hangs_before_its_first_heartbeat_is_noticed() -> None:
    roll = Roll()
    roll.begin("a")
    roll.expect("of another start", ranks=5, now=0.0)
    roll.heard("a", 0, "step 7", limit_s=10.0, now=0.5)
    roll.expect("a", ranks=2, now=1.0)
    for second in range(2, 12, 2):
        roll.heard("a", 0, "step 7", limit_s=10.0, now=float(second))
        assert roll.silent(10.0, float(second)) == ""
    roll.heard("a", 0, "step 7", limit_s=10.0, now=12.0)
    assert roll.silent(10.0, 12.0) == "rank 1 has sent nothing for 11 s. Its last activity: starting."


def test_the_driver_notices_a_rank_that_is_alone() -> None:
    roll = Roll()
    roll.begin("a")
    roll.heard("a", 0, "step 7", limit_s=10.0, now=0.0)
    found = [roll.missed(10.0, float(second)) for second in range(1, 20)]
    assert found[:15] == [None] * 15  # ranks that are not alone notice after 10 s, and end
    assert found[-1] == 0


def test_the_driver_blames_nobody_where_it_stood_still_itself_and_nobody_who_has_ended() -> None:
    roll = Roll()
    roll.begin("a")
    for rank in (0, 1):
        roll.heard("a", rank, "", limit_s=10.0, now=0.0)
    roll.missed(10.0, 1.0)
    assert roll.missed(10.0, 100.0) is None  # heartbeats may wait in the monitor's queue
    roll.left("a", 0)
    roll.left("of another start", 1)
    assert [roll.missed(10.0, float(second)) for second in range(101, 120)][-1] == 1
    roll.left("a", 1)
    assert roll.missed(10.0, 120.0) is None


def test_a_rank_that_hangs_alone_is_killed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    killed, now = [], 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("ray.kill", killed.append)
    monitor = Monitor(10, [], max_failures=0)
    monitor.resuming_from(None)
    attempt = monitor.starts_from().attempt
    monitor.begins(attempt, 0, 1, actor := Local(object()))
    monitor.beat(attempt, 0, "step 1", 10.0)
    monitor.log({"step": 1})
    for second in range(40):
        now = float(second)
        assert monitor.poll(10.0).latest == {"step": 1}
    assert killed == [actor]
    monitor.resuming_from("step-1")  # Ray Train starts again
    now = 80.0
    monitor.poll(10.0)
    assert killed == [actor]


def test_the_driver_is_told_each_warning_once_and_whether_anybody_would_hear_it() -> None:
    monitor = Monitor(10, [], max_failures=0)
    assert monitor.poll(10.0) == Report({})
    monitor.controlled_by(controller := Local(object()))
    monitor.warn("a checkpoint is damaged")
    monitor.resuming_from(None)
    monitor.begins(monitor.starts_from().attempt, 0, 1, Local(object()))
    assert monitor.poll(10.0) == Report({}, ("a checkpoint is damaged",), controller, has_begun=True)
    monitor.resuming_from(None)  # Ray Train starts again: nobody can save
    assert monitor.poll(10.0) == Report({}, (), controller, has_begun=False)


def test_a_start_of_the_workers_has_a_name_and_the_checkpoint_that_its_rows_were_made_for() -> None:
    monitor = Monitor(10, [], max_failures=0)
    starts = []
    for checkpoint in (None, "step-00000004-ab"):
        monitor.resuming_from(checkpoint)
        starts.append(monitor.starts_from())
    assert [start.checkpoint for start in starts] == [None, "step-00000004-ab"]
    assert starts[0].attempt != starts[1].attempt


def test_deaths_without_progress_end_the_job_and_name_the_last_cause() -> None:
    monitor = Monitor(10, [], max_failures=2)
    for cause in ("a", "b"):
        monitor.workers_died(cause)
    assert monitor.failure() is None
    monitor.committed()
    for cause in ("c", "d"):
        monitor.workers_died(cause)
    assert monitor.failure() is None
    monitor.workers_died("rank 1: killed")
    failure = monitor.failure()
    assert failure
    assert failure[0] == "TrainingError"
    assert "rank 1: killed" in failure[1]


def test_the_first_reason_to_give_up_stands() -> None:
    monitor = Monitor(10, [], max_failures=0)
    monitor.fail("DataError", "first")
    monitor.workers_died("second")
    assert monitor.failure() == ("DataError", "first")
