"""A group that kills its teachers: the samples at fault are found, and every other sample gets its answer."""

from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.fakes import answered, rendering, stacked
from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.sample import Rendering
from betakd_ray.errors import TeacherError
from betakd_ray.teacher.answers import Answer, GroupAnswer
from betakd_ray.teacher.examination import examine
from betakd_ray.teacher.ports import Unanswered

POISON = 99


def group(*poisoned: int) -> list[Rendering]:
    """Return eight samples of different lengths and tokens."""
    return [rendering(POISON if at in poisoned else 10 + at, length=6 + 2 * (at % 3)) for at in range(8)]


def refusing(is_refused: Callable[[ModelInputs], bool]) -> tuple[Callable[[ModelInputs], GroupAnswer], list[int]]:
    sizes: list[int] = []

    def score(inputs: ModelInputs) -> GroupAnswer:
        sizes.append(inputs.size)
        if is_refused(inputs):
            raise Unanswered("it died")
        return answered(inputs, busy_s=1.0)

    return score, sizes


def is_poisoned(inputs: ModelInputs) -> bool:
    return bool((inputs.input_ids == POISON).any())


def test_a_group_in_order_is_answered_as_it_is() -> None:
    score, sizes = refusing(is_poisoned)
    assert None not in examine(group(), stacked, score).signals
    assert sizes == [8]


@pytest.mark.parametrize("poisoned", [(0,), (5,), (7,), (2, 3), (0, 7), (1, 4, 6)])
def test_the_samples_at_fault_are_found_and_the_others_keep_their_answers(poisoned: tuple[int, ...]) -> None:
    score, sizes = refusing(is_poisoned)
    found, whole = examine(group(*poisoned), stacked, score), Answer.of(answered(stacked(group(*poisoned))))
    assert [at for at, signal in enumerate(found.signals) if signal is None] == list(poisoned)
    assert set(found.reasons) == set(poisoned)
    assert "it died" in found.reasons[poisoned[0]]
    for signal, expected in zip(found.signals, whole.signals, strict=True):
        if signal is not None:
            assert expected is not None
            np.testing.assert_array_equal(signal["hidden"], expected["hidden"])
    assert len(sizes) <= 2 * 3 * len(poisoned) + 1 + len(poisoned)  # 2·log2(8) pieces each, and a blank


def test_a_sample_alone_in_its_group_can_be_at_fault() -> None:
    found = examine(group(1)[1:2], stacked, refusing(is_poisoned)[0])
    assert found.signals == [None]


def test_a_teacher_that_answers_nothing_is_an_error_and_condemns_no_group() -> None:
    score, sizes = refusing(lambda inputs: bool(inputs.input_ids.any()))  # all but blanks
    with pytest.raises(TeacherError, match="any sample of a batch that was tried: it died"):
        examine(group(), stacked, score)
    assert len(sizes) < 8
    with pytest.raises(TeacherError, match="even a blank sample"):
        examine(group(), stacked, refusing(lambda _: True)[0])
