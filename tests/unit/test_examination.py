"""A batch that kills its teachers: the samples at fault are found, and the others have the answers they would have."""

from collections.abc import Callable

import numpy as np
import pytest

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.errors import TeacherError
from betakd_ray.teacher.examination import Unanswered, examine
from betakd_ray.teacher.signal import Signal, Wire

IMAGE, POISON = 4, 99
TOKENS = 2
"""Of an image."""


def _inputs(answers: list[int], images: list[bool]) -> ModelInputs:
    """Samples of [image, image,] question, question, answer …, with as many answer tokens as `answers` says."""
    length = TOKENS + 2 + max(answers)
    ids = np.full((len(answers), length), 3, dtype=np.int64)
    rows, visual = [], []
    for at, (count, has_image) in enumerate(zip(answers, images, strict=True)):
        ids[at, : TOKENS * has_image] = IMAGE
        ids[at, TOKENS : TOKENS + 2] = 10 + at
        rows += [(at, TOKENS + 1 + n) for n in range(count)]
        visual += [(at, n) for n in range(TOKENS * has_image)]
    row, token = (np.array(pairs, dtype=np.int64).reshape(-1, 2).T for pairs in (rows, visual))
    pixels = np.arange(sum(images), dtype=np.uint8)[:, None, None, None].repeat(3, 1)
    return ModelInputs(
        input_ids=ids,
        attention_mask=np.ones_like(ids),
        images={"pixel_values": pixels} if len(pixels) else {},
        image_rows={"pixel_values": np.array(images, dtype=np.int64)} if len(pixels) else {},
        answer_rows=row[0] * length + row[1],
        row_sample=row[0],
        targets=np.arange(len(rows)),
        visual_sample=token[0],
        visual_position=token[1],
    )


def _score(inputs: ModelInputs) -> Signal:
    """An answer that shows which sample, row and image it belongs to."""
    questions = inputs.input_ids[:, TOKENS]
    images = inputs.images["pixel_values"][:, 0, 0].repeat(TOKENS, 0) if inputs.images else np.zeros((0, 1))
    return Signal(
        valid=np.ones(inputs.size, dtype=bool),
        hidden=Wire(np.stack([questions[inputs.row_sample], inputs.targets], 1).astype(np.float32), "float32"),
        visual=Wire(images.astype(np.float32), "float32") if len(images) else None,
        features={"teacher_answer": questions[:, None].astype(np.float32)},
        busy_s=1.0,
    )


def _refusing(refused: Callable[[ModelInputs], bool]) -> tuple[Callable[[ModelInputs], Signal], list[int]]:
    sizes: list[int] = []

    def score(inputs: ModelInputs) -> Signal:
        sizes.append(inputs.size)
        if refused(inputs):
            raise Unanswered("it died")
        return _score(inputs)

    return score, sizes


def _poisoned(*samples: int) -> tuple[ModelInputs, Callable[[ModelInputs], bool]]:
    inputs = _inputs([1, 2, 3, 1, 2, 1, 1, 2], [True, False, True, True, False, True, True, False])
    for at in samples:
        inputs.input_ids[at, TOKENS + 1] = POISON
    return inputs, lambda part: bool((part.input_ids == POISON).any())


def test_a_batch_in_order_is_answered_as_it_is() -> None:
    inputs, refused = _poisoned()
    score, sizes = _refusing(refused)
    assert examine(inputs, score).valid.all()
    assert sizes == [8]


@pytest.mark.parametrize("poisoned", [(0,), (5,), (7,), (2, 3), (0, 7), (1, 4, 6)])
def test_the_samples_at_fault_are_found_and_the_others_keep_their_answers(poisoned: tuple[int, ...]) -> None:
    inputs, refused = _poisoned(*poisoned)
    score, sizes = _refusing(refused)
    signal, whole = examine(inputs, score), _score(inputs)
    assert list(np.flatnonzero(~signal.valid)) == list(poisoned)
    assert set(signal.reasons) == set(poisoned)
    assert "it died" in signal.reasons[poisoned[0]]
    assert signal.hidden
    assert whole.hidden
    assert signal.visual
    assert whole.visual
    good = signal.valid[inputs.row_sample]
    np.testing.assert_array_equal(signal.hidden.array[good], whole.hidden.array[good])
    assert signal.hidden.array.shape == whole.hidden.array.shape
    seen = signal.valid[inputs.visual_sample]
    np.testing.assert_array_equal(signal.visual.array[seen], whole.visual.array[seen])
    np.testing.assert_array_equal(
        signal.features["teacher_answer"][signal.valid], whole.features["teacher_answer"][signal.valid]
    )
    assert len(sizes) <= 2 * 3 * len(poisoned) + 1 + len(poisoned)  # 2·log2(8) parts each, and a blank


def test_a_sample_alone_in_its_batch_can_be_at_fault() -> None:
    inputs, refused = _poisoned(1)
    signal = examine(inputs.part(1, 2), _refusing(refused)[0])
    assert not signal.valid.any()
    assert signal.hidden
    assert len(signal.hidden.array) == 2


def test_a_teacher_that_answers_nothing_is_an_error_and_condemns_no_batch() -> None:
    inputs, _ = _poisoned()
    score, sizes = _refusing(lambda part: bool(part.input_ids[:, TOKENS].any()))  # all but blanks
    with pytest.raises(TeacherError, match="whichever sample of it is tried: it died"):
        examine(inputs, score)
    assert len(sizes) < 8
    with pytest.raises(TeacherError, match="even a blank sample"):
        examine(inputs, _refusing(lambda part: True)[0])


def test_a_part_of_a_batch_is_the_batch_of_its_samples() -> None:
    inputs, _ = _poisoned()
    parts = [inputs.part(0, 3), inputs.part(3, 8)]
    signal, whole = Signal.joined([_score(part) for part in parts]), _score(inputs)
    assert signal.hidden
    assert whole.hidden
    assert signal.visual
    assert whole.visual
    np.testing.assert_array_equal(signal.hidden.array, whole.hidden.array)
    np.testing.assert_array_equal(signal.visual.array, whole.visual.array)
    length = inputs.input_ids.shape[1]
    flat = parts[1].input_ids.reshape(-1)[parts[1].answer_rows]
    np.testing.assert_array_equal(flat, inputs.input_ids.reshape(-1)[inputs.answer_rows[inputs.row_sample >= 3]])
    assert parts[1].answer_rows.max() < 5 * length
    assert inputs.part(1, 2).images == {}
