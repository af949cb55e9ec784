"""The feed, with ranks as threads: what forms a step, when it is there, and how it ends."""

import threading
import time
from collections.abc import Iterable
from statistics import median
from typing import Any

import numpy as np
import pytest

from betakd_ray.batch.sample import Sample
from betakd_ray.errors import TeacherError, TooManyBadSamples
from betakd_ray.teacher.signals import SignalSource
from betakd_ray.train.feed import Feed
from betakd_ray.train.micro_batches import Refused, Step
from tests.feeds import Answers, Meeting, Quiet, all_steps, collator, sample, together

BATCH = 8


def make(
    rows: Iterable[Sample],
    client: Any = None,
    *,
    rank: int = 0,
    meeting: Meeting | None = None,
    ranks: int = 1,
    control: Any = None,
    steps: range = range(1, 1000),
    batch: int = BATCH,
    limits: dict[str, int] | None = None,
    **options: Any,
) -> Feed:
    meeting = meeting or Meeting(1)
    return Feed(
        iter(rows),
        SignalSource(client or Answers(), batch_tokens=64),
        collator(**(limits or {"max_samples": 4})),
        meeting.gather(rank),
        rank=rank,
        ranks=ranks,
        global_batch=batch,
        steps=steps,
        control=control or Quiet(),
        **options,
    )


def indexes(step: Step) -> list[int]:
    return [one.index for one in step.samples]


def run(rows: list[list[Sample]], batch: int = BATCH, **options: Any) -> list[list[Step]]:
    """Return each rank's steps."""
    meeting = Meeting(len(rows))

    def work(rank: int) -> list[Step]:
        feed = make(rows[rank], rank=rank, ranks=len(rows), meeting=meeting, batch=batch, **options)
        steps = list(all_steps(feed.next_step))
        feed.close()
        return steps

    return together(len(rows), work)


def test_a_step_is_the_next_samples_of_the_stream_in_micro_batches_of_like_lengths() -> None:
    lengths = [5, 30, 7, 28, 6, 31, 8, 29]
    (steps,) = run([[sample(number, lengths[number % 8]) for number in range(20)]])
    assert [indexes(step) for step in steps] == [list(range(8)), list(range(8, 16))]  # four are left over
    long, short = steps[0].micro_batches
    assert long.inputs.input_ids.shape == (4, 31)
    assert short.inputs.input_ids.shape == (4, 8)
    assert steps[0].counts.tokens.padding == 31 * 4 - 118 + 8 * 4 - 26
    assert (steps[0].counts.samples, steps[0].counts.tokens.answer) == (8, 8)


@pytest.mark.parametrize("ranks", [1, 3, 7])
@pytest.mark.parametrize("batch", [8, 9, 20])
def test_all_samples_but_a_rest_are_trained_once_however_the_rows_fall_on_ranks(ranks: int, batch: int) -> None:
    rng = np.random.default_rng(ranks * batch)
    total = 203
    # A stream that is split by blocks: ranks have up to a block more than others, and one has none at all at the end.
    owners = np.repeat(rng.integers(0, ranks, total), rng.integers(1, 9, total))[:total]
    rows = [[sample(int(number)) for number in np.flatnonzero(owners == rank)] for rank in range(ranks)]
    everyone = run(rows, batch)
    assert {len(steps) for steps in everyone} == {total // batch}
    trained = [one.index for steps in everyone for step in steps for one in step.samples]
    assert len(trained) == len(set(trained)) == total // batch * batch
    for parts in zip(*everyone, strict=True):
        assert len({part.counts for part in parts}) == 1
        assert sum(len(part.samples) for part in parts) == batch
        assert {len(part.micro_batches) for part in parts} == {parts[0].counts.micro_batches}


def test_a_rank_with_fewer_micro_batches_adds_empty_ones() -> None:
    rows = [[sample(number, 60) for number in range(4)], [sample(number, 3) for number in range(4)]]
    first, second = run(rows, limits={"max_tokens": 64})
    assert [batch.is_empty for batch in first[0].micro_batches] == [False] * 4
    assert [batch.is_empty for batch in second[0].micro_batches] == [False, True, True, True]
    assert second[0].micro_batches[1].inputs.size == 1
    assert second[0].counts.samples == 8


def test_no_timing_changes_what_forms_a_step() -> None:
    def slow(group: Any) -> None:
        time.sleep(0.01 * rng.random())

    rng = np.random.default_rng(0)

    def rows(rank: int) -> Any:
        for number in range(rank, 96, 2):
            time.sleep(0.002 * rng.random())
            yield sample(number, 4 + number % 9)

    meeting = Meeting(2)

    def work(rank: int) -> list[Any]:
        feed = make(rows(rank), Answers(slow), rank=rank, ranks=2, meeting=meeting)
        return [
            (indexes(step), [batch.inputs.input_ids.tolist() for batch in step.micro_batches])
            for step in all_steps(feed.next_step)
        ]

    quick = run([[sample(number, 4 + number % 9) for number in range(rank, 96, 2)] for rank in range(2)])
    expected = [
        [(indexes(step), [batch.inputs.input_ids.tolist() for batch in step.micro_batches]) for step in steps]
        for steps in quick
    ]
    assert together(2, work) == expected


def test_the_feed_is_a_whole_step_ahead_and_has_asked_for_more() -> None:
    client = Answers()
    feed = make([sample(number) for number in range(400)], client, window_tokens=20 * 8)
    assert feed.next_step()
    deadline = time.monotonic() + 10
    # One is with the training, one is ready, one is being agreed on or waits, and the window is with the teachers.
    while sum(client.groups) < 3 * BATCH + 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(client.groups) >= 3 * BATCH + 20
    time.sleep(0.2)
    assert sum(client.groups) < 400  # and not the whole stream
    feed.close()


def test_teachers_answer_while_the_student_waits_for_the_first_of_many_micro_batches() -> None:
    """However many micro-batches a step has, all of them are with the teachers together."""
    at_once, most, lock = 0, 0, threading.Lock()

    def work(group: Any) -> None:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.05)
        with lock:
            at_once -= 1

    feed = make([sample(number) for number in range(64)], Answers(work), batch=64, limits={"max_samples": 2})
    step = feed.next_step()
    assert step
    assert step.counts.micro_batches == 32
    assert most >= 6
    feed.close()


def test_no_more_is_in_flight_the_longer_a_teacher_s_queue_is() -> None:
    """A time in a queue that counted as the teacher's would make the queue longer, and the time with it."""
    teacher, lock = threading.Lock(), threading.Lock()
    at_once, seen, took_s = 0, list[int](), 0.005

    def work(group: Any) -> None:
        nonlocal at_once
        with lock:
            at_once += 1
            seen.append(at_once)
        with teacher:
            time.sleep(took_s)
        with lock:
            at_once -= 1

    rows = (sample(number) for number in range(100 * BATCH))
    feed = make(rows, Answers(work, took_s), window_tokens=4 * 8 * BATCH)
    assert sum(1 for _ in all_steps(feed.next_step)) == 100
    # One step and a window of 4, what is used up during two answers, and the two that are made together. The median: on
    # a busy machine, steps that were waited for come in bursts, and for some steps more is asked for.
    assert 5 <= median(seen[50:]) <= 1 + 4 + 2 + 2 + 1
    feed.close()


def test_a_sample_without_an_answer_takes_no_part_and_is_told() -> None:
    client, told = Answers(), []
    client.refused = {5 + 3}
    feed = make([sample(number) for number in range(16)], client, on_refused=told.extend)
    first = feed.next_step()
    assert first
    assert indexes(first) == [0, 1, 2, 4, 5, 6, 7]
    assert (first.counts.samples, first.counts.dropped) == (7, 1)
    assert told == [Refused(told[0].sample, "it cannot")]
    assert told[0].sample.index == 3
    feed.close()


def test_a_global_batch_without_any_answer_is_an_error() -> None:
    client = Answers()
    client.refused = set(range(100))
    feed = make([sample(number) for number in range(16)], client)
    with pytest.raises(TeacherError, match="no finite answer for any sample"):
        feed.next_step()


@pytest.mark.parametrize("where", ["rows", "teacher", "refused"])
def test_what_goes_wrong_in_a_thread_is_raised_where_steps_are_asked_for(where: str) -> None:
    def rows() -> Any:
        yield from (sample(number) for number in range(12))
        if where == "rows":
            raise OSError("no store")

    def work(group: Any) -> None:
        if where == "teacher":
            raise TeacherError("no teacher")

    def refused(_: Any) -> None:
        raise TooManyBadSamples("too many")

    client = Answers(work)
    client.refused = {5 + 9} if where == "refused" else set()
    feed = make(rows(), client, on_refused=refused)
    if where != "teacher":
        assert feed.next_step()
    with pytest.raises((OSError, TeacherError, TooManyBadSamples), match=r"no store|no teacher|too many"):
        list(all_steps(feed.next_step))


def test_a_stop_ends_all_ranks_after_the_same_step_even_while_one_waits_for_its_teacher() -> None:
    control, hangs, meeting = Quiet(), threading.Event(), Meeting(2)

    def hang(group: Any) -> None:
        if any(int(view.input_ids[0]) >= 5 + 40 for view in group):
            hangs.wait(30)

    def work(rank: int) -> tuple[list[int], bool]:
        client = Answers(hang if rank else lambda group: None)
        rows = [sample(number) for number in range(80)]
        feed = make(rows, client, rank=rank, ranks=2, meeting=meeting, control=control)
        done = []
        for step in all_steps(feed.next_step):
            done.append(step.number)
            if step.number == 3:
                threading.Timer(1.0, lambda: setattr(control, "is_stopping", True)).start()
        feed.close()
        return done, feed.was_stopped

    (first, is_stopped), (second, _) = together(2, work)
    hangs.set()
    assert first == second
    assert 3 <= len(first) < 20
    assert is_stopped


def test_one_rank_s_wish_for_a_checkpoint_is_everybody_s_and_is_said_once() -> None:
    meeting, controls = Meeting(2), [Quiet(), Quiet()]
    controls[1].saves = 1

    def work(rank: int) -> list[bool]:
        rows = [sample(number) for number in range(32)]
        feed = make(rows, rank=rank, ranks=2, meeting=meeting, control=controls[rank])
        return [step.counts.save for step in all_steps(feed.next_step)]

    first, second = together(2, work)
    assert first == second == [True] + [False] * 7


def test_the_ranks_meet_once_a_step() -> None:
    meeting = Meeting(2)

    def work(rank: int) -> None:
        feed = make([sample(n) for n in range(40)], rank=rank, ranks=2, meeting=meeting, steps=range(1, 11))
        assert len(list(all_steps(feed.next_step))) == 10

    together(2, work)
    assert meeting.rounds == 10
