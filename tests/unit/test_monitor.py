"""The monitor: what it counts once, and when it gives up."""

from betakd_ray.data.plan import Quarantined
from betakd_ray.train.monitor import Monitor


def _bad(index: int) -> Quarantined:
    return Quarantined(0, 0, index, str(index), "broken")


def test_a_sample_that_is_read_twice_is_quarantined_once() -> None:
    monitor = Monitor(10, [_bad(1)], max_failures=3)
    assert monitor.quarantine([_bad(1), _bad(0)]) == 0.2
    assert [bad.index for bad in monitor.quarantined()] == [0, 1]
    assert monitor.count_quarantined() == 2


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


def test_it_hands_on_the_checkpoint_that_the_newest_stream_begins_at() -> None:
    monitor = Monitor(10, [], max_failures=0)
    assert monitor.resumes_from() is None
    monitor.resuming_from("step-00000002-ab")
    assert monitor.resumes_from() == "step-00000002-ab"
    monitor.resuming_from(None)
    assert monitor.resumes_from() is None


def test_the_first_reason_to_give_up_stands() -> None:
    monitor = Monitor(10, [], max_failures=0)
    monitor.fail("DataError", "first")
    monitor.workers_died("second")
    assert monitor.failure() == ("DataError", "first")
