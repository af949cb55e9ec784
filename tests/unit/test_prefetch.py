"""Transfer of micro-batches to the device, and the cause to which a wait for them is attributed."""

import time
from typing import Any

import pytest
import torch

from betakd_ray.errors import TeacherError
from betakd_ray.teacher.signals import SignalSource
from betakd_ray.train.clock import StepClock
from betakd_ray.train.feed import Feed
from betakd_ray.train.prefetch import Loader, Prefetch
from tests.feeds import Answers, Meeting, Quiet, collator, sample

LOADER = Loader(torch.device("cpu"))


def feed(rows: Any, client: Any = None) -> Feed:
    return Feed(
        iter(rows),
        SignalSource(client or Answers(), batch_tokens=16),
        collator(max_samples=2),
        Meeting(1).gather(0),
        rank=0,
        ranks=1,
        global_batch=4,
        steps=range(1, 100),
        control=Quiet(),
    )


def test_each_step_comes_with_its_own_micro_batches_in_order() -> None:
    prefetch = Prefetch(feed([sample(number) for number in range(40)]), LOADER)
    for number, (step, batches) in enumerate(prefetch.steps()):
        made = list(batches)
        assert [one.index for one in step.samples] == list(range(4 * number, 4 * number + 4))
        assert [each.inputs.input_ids[:, 0].tolist() for each in made] == [
            [5 + 4 * number, 6 + 4 * number],
            [7 + 4 * number, 8 + 4 * number],
        ]
        assert all(each.valid.all() for each in made)
    assert number == 9
    prefetch.close()


def test_what_goes_wrong_in_the_feed_is_raised_where_its_steps_are_used() -> None:
    def fail(group: Any) -> None:
        raise TeacherError("no teacher")

    prefetch = Prefetch(feed([sample(number) for number in range(40)], Answers(fail)), LOADER)
    with pytest.raises(TeacherError, match="no teacher"):
        next(prefetch.steps())
    prefetch.close()


@pytest.mark.parametrize("cause", ["teacher_wait", "data_wait"])
def test_a_wait_is_put_down_to_what_the_feed_waited_for(cause: str) -> None:
    def rows() -> Any:
        for number in range(16):
            time.sleep(0.1 if cause == "data_wait" else 0)
            yield sample(number)

    client = Answers(lambda group: time.sleep(0.4 if cause == "teacher_wait" else 0))
    prefetch = Prefetch(feed(rows(), client), LOADER)
    clock = StepClock(torch.device("cpu"))
    for _, batches in prefetch.steps():
        clock.stalled(prefetch.take_stalls())
        list(batches)
        clock.stalled(prefetch.take_stalls(), within="forward_backward")
    seconds = clock.read()
    waits = {name: seconds[name] for name in ("data_wait", "teacher_wait", "collate", "agree", "copy")}
    assert max(waits, key=waits.__getitem__) == cause
    assert waits[cause] > 0.3
    assert sum(waits.values()) <= seconds["elapsed"] + 0.01
    prefetch.close()
