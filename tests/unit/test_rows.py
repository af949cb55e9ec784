"""Samples as a batch: padding, answer rows and image tokens against a plain loop, and the way through Arrow."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from betakd_ray.batch.inputs import Pairs, most_salient
from betakd_ray.batch.packing import stack
from betakd_ray.batch.sample import Rendering, Sample, Stored
from betakd_ray.data.rows import block_of, samples_of
from betakd_ray.errors import DataError

PAD, IMAGE = 0, 4
LENGTHS = [5, 9, 2, 7]
IMAGES = [1, 2, 0, 0]


def rendering(length, images, first=5):
    generator = np.random.default_rng(length)
    ids = generator.integers(first, 50, length).astype(np.int32)
    ids[1 : 1 + images] = IMAGE
    mask = generator.random(length) > 0.5
    mask[0], mask[1 : 1 + images], mask[-1] = False, False, True
    pixels = generator.integers(0, 256, (images, 3, 4, 6)).astype(np.uint8) if images else None
    return Rendering(ids, mask, {} if pixels is None else {"pixel_values": pixels})


@pytest.fixture
def samples():
    return [rendering(length, images) for length, images in zip(LENGTHS, IMAGES, strict=True)]


def table(student, teacher=None, stored=()):
    """Return a block of these renderings; `stored` is for the first of them."""
    teacher = teacher or student
    places = [*stored, *[None] * (len(student) - len(stored))]
    return block_of(
        [
            Sample(1, at, 10 + at, 20 + at, f"{10 + at:09}", one, other, place)
            for at, (one, other, place) in enumerate(zip(student, teacher, places, strict=True))
        ]
    )


def student_inputs(block):
    return stack([sample.student for sample in samples_of(block)], PAD, IMAGE)


def assert_same_inputs(actual, expected):
    for name in type(expected).__dataclass_fields__:
        actual_arrays, expected_arrays = (arrays(getattr(inputs, name)) for inputs in (actual, expected))
        assert actual_arrays.keys() == expected_arrays.keys(), name
        for key, e in expected_arrays.items():
            assert actual_arrays[key].dtype == e.dtype, name
            np.testing.assert_array_equal(actual_arrays[key], e, err_msg=name)


def arrays(value):
    return value if isinstance(value, dict) else {"": value}


def test_a_batch_is_the_plain_loop(samples):
    inputs = stack(samples, PAD, IMAGE)
    longest = max(LENGTHS)
    ids = [[*sample.input_ids.tolist(), *[PAD] * (longest - len(sample.input_ids))] for sample in samples]
    mask = [[1] * len(sample.input_ids) + [0] * (longest - len(sample.input_ids)) for sample in samples]
    assert inputs.input_ids.tolist() == ids
    assert inputs.attention_mask.tolist() == mask
    answer_rows, row_sample, targets, visual_sample = [], [], [], []
    for b, sample in enumerate(samples):
        for n, (token, learned) in enumerate(zip(sample.input_ids, sample.answer_mask, strict=True)):
            if learned and n > 0:
                answer_rows.append(b * longest + n - 1)
                row_sample.append(b)
                targets.append(token)
            if token == IMAGE:
                visual_sample.append(b)
    assert inputs.answer_rows.tolist() == answer_rows
    assert inputs.row_sample.tolist() == row_sample
    assert inputs.targets.tolist() == targets
    assert inputs.visual_sample.tolist() == visual_sample
    assert inputs.images["pixel_values"].tolist() == np.concatenate([samples[0].pixels, samples[1].pixels]).tolist()
    assert inputs.rows_per_sample.tolist() == [int(sample.answer_mask[1:].sum()) for sample in samples]
    assert inputs.has_image.tolist() == [True, True, False, False]


def test_an_answer_token_at_the_very_start_is_predicted_by_nothing():
    inputs = stack([Rendering(np.array([5, 6], np.int32), np.array([True, True]))], PAD, IMAGE)
    assert inputs.answer_rows.tolist() == [0]
    assert inputs.targets.tolist() == [6]


def test_padding_with_the_end_of_sequence_adds_no_answer_row():
    eos = 2
    rows = [Rendering(np.array([5, 6, eos], np.int32), np.array([False, True, True])), rendering(9, 0)]
    assert (stack(rows, eos, IMAGE).row_sample == 0).sum() == 2


def test_the_last_prompt_token_counts_and_the_final_eos_does_not():
    """Changing the logits at the last prompt position changes the loss; changing those at the final eos does not."""
    prompt, answer = 4, 3
    mask = np.array([False] * prompt + [True] * answer)
    inputs = stack([Rendering(np.arange(5, 5 + prompt + answer, dtype=np.int32), mask)], PAD, IMAGE)
    logits = torch.randn(prompt + answer, 20)

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits[inputs.answer_rows], torch.from_numpy(inputs.targets)).item()

    changes = []
    for position in range(prompt + answer):
        changed = logits.clone()
        changed[position, 0] += 1.0
        changes.append(loss(changed) != loss(logits))
    assert changes == [False] * (prompt - 1) + [True] * answer + [False]


# ---- Arrow -------------------------------------------------------------------------------------------------------


def test_a_block_gives_back_its_samples(samples):
    found = samples_of(table(samples))
    assert_same_inputs(stack([one.student for one in found], PAD, IMAGE), stack(samples, PAD, IMAGE))
    assert all(sample.teacher is sample.student for sample in found)
    assert [(s.epoch, s.shard, s.index, s.member, s.key) for s in found] == [
        (1, at, 10 + at, 20 + at, f"0000000{10 + at}") for at in range(4)
    ]


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (1, 3), (2, 4), (3, 4), (2, 2)])
def test_a_slice_of_a_block_gives_its_own_samples(samples, start, stop):
    found = samples_of(table(samples).slice(start, stop - start))
    assert [sample.index for sample in found] == list(range(10 + start, 10 + stop))
    for sample, expected in zip(found, samples[start:stop], strict=True):
        assert_same_inputs(stack([sample.student], PAD, IMAGE), stack([expected], PAD, IMAGE))


def test_a_block_of_several_chunks_is_read_across_them(samples):
    parts = pa.concat_tables([table(samples).slice(0, 1), table(samples).slice(1, 3)])
    assert parts.column("student_input_ids").num_chunks == 2
    assert_same_inputs(student_inputs(parts), stack(samples, PAD, IMAGE))


def test_a_block_of_text_alone_has_no_pixels():
    inputs = student_inputs(table([rendering(5, 0), rendering(6, 0)]))
    assert inputs.images == {}
    assert inputs.visual_sample.tolist() == []
    assert inputs.has_image.tolist() == [False, False]


def test_where_an_answer_is_kept_travels_and_changes_no_block_s_size(samples):
    places = [Stored("a/b.parts", 5, 7), None, Stored("c", 0, 0)]
    block = table(samples, stored=places)
    assert [sample.stored for sample in samples_of(block)] == [*places, None]
    assert block.nbytes == table(samples).nbytes
    with pytest.raises(DataError, match=r"teacher\.cache: x+ has a name of 193 bytes, but at most 192 are allowed"):
        table(samples, stored=[Stored("x" * 193, 0, 1)])


def test_pairs_are_every_answer_row_and_image_token_of_one_sample(samples):
    inputs = stack(samples, PAD, IMAGE)
    pairs = Pairs.of(inputs, torch.device("cpu"))
    expected = [
        (row, token)
        for row, owner in enumerate(inputs.row_sample)
        for token, other in enumerate(inputs.visual_sample)
        if owner == other
    ]
    assert list(zip(pairs.row.tolist(), pairs.token.tolist(), strict=True)) == expected
    assert pairs.sample.tolist() == [inputs.row_sample[row] for row, _ in expected]
    assert pairs.per_sample.tolist() == np.bincount(pairs.sample, minlength=len(samples)).tolist()


def test_the_most_salient_image_tokens_are_found_sample_by_sample(samples):
    inputs = stack(samples, PAD, IMAGE)
    assert inputs.visual_sample.tolist() == [0, 1, 1]
    assert most_salient(np.array([0.1, 0.2, 0.7]), inputs, 1).tolist() == [0, 2]
    assert most_salient(np.array([0.1, 0.7, 0.2]), inputs, 5).tolist() == [0, 1, 2]


def test_two_views_are_two_renderings(samples):
    teacher = [rendering(length + 3, 1) for length in LENGTHS]
    found = samples_of(table(samples, teacher))
    assert_same_inputs(stack([one.student for one in found], PAD, IMAGE), stack(samples, PAD, IMAGE))
    assert_same_inputs(stack([one.teacher for one in found], PAD, IMAGE), stack(teacher, PAD, IMAGE))


@pytest.mark.parametrize("count", [1, 4])
def test_nothing_in_a_sample_is_memory_of_the_block(samples, count):
    """Arrow's buffers may lie in Ray's object store, which could not free the block while a sample points into it."""
    block = table(samples[:count], [rendering(length + 3, 1) for length in LENGTHS[:count]])
    buffers = [np.frombuffer(buffer, np.uint8) for buffer in buffers_of(block) if buffer.size]
    for sample in samples_of(block):
        for view in (sample.student, sample.teacher):
            for array in (view.input_ids, view.answer_mask, *view.images.values()):
                assert not any(np.may_share_memory(array, buffer) for buffer in buffers)
                assert array.flags.writeable


def buffers_of(rows):
    return [buffer for column in rows.columns for chunk in column.chunks for buffer in chunk.buffers() if buffer]
