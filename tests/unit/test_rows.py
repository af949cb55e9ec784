"""Renderings as a batch: padding, answer rows and image tokens against a plain loop, and the way through Arrow."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from betakd_ray.batch.inputs import Pairs, most_salient
from betakd_ray.batch.packing import stack
from betakd_ray.batch.sample import Rendering
from betakd_ray.data.rows import collate, to_arrow

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


def table(samples, views=("student",)):
    count = len(samples)
    ids = {
        "epoch": pa.array([1] * count, pa.int32()),
        "shard": pa.array(range(count), pa.int32()),
        "index": pa.array(range(10, 10 + count), pa.int32()),
    }
    ids["key"] = pa.array([f"{index:09}" for index in range(10, 10 + count)])
    ids["signal"] = pa.nulls(count, pa.large_binary())
    return pa.table({**ids, **to_arrow({view: samples for view in views})})


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


def test_a_table_gives_the_batch_of_its_renderings(samples):
    batch = collate(table(samples), PAD, {"student": IMAGE})
    assert_same_inputs(batch.student, stack(samples, PAD, IMAGE))
    assert batch.teacher is batch.student
    assert batch.ids.epoch.tolist() == [1] * 4
    assert batch.ids.shard.tolist() == [0, 1, 2, 3]
    assert batch.ids.index.tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (1, 3), (2, 4), (3, 4)])
def test_a_slice_of_a_table_gives_the_batch_of_its_own_renderings(samples, start, stop):
    batch = collate(table(samples).slice(start, stop - start), PAD, {"student": IMAGE})
    assert_same_inputs(batch.student, stack(samples[start:stop], PAD, IMAGE))
    assert batch.ids.index.tolist() == list(range(10 + start, 10 + stop))


def test_a_table_of_several_chunks_is_read_across_them(samples):
    parts = pa.concat_tables([table(samples).slice(0, 1), table(samples).slice(1, 3)])
    assert parts.column("student_input_ids").num_chunks == 2
    assert_same_inputs(collate(parts, PAD, {"student": IMAGE}).student, stack(samples, PAD, IMAGE))


def test_a_batch_of_text_alone_has_no_pixels():
    texts = [rendering(5, 0), rendering(6, 0)]
    batch = collate(table(texts), PAD, {"student": IMAGE})
    assert batch.student.images == {}
    assert batch.student.visual_sample.tolist() == []
    assert batch.student.has_image.tolist() == [False, False]


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


def test_two_views_are_two_inputs(samples):
    views = {"student": samples, "teacher": [rendering(length + 3, 1) for length in LENGTHS]}
    columns = {**dict(zip(table(samples).column_names, table(samples).columns, strict=True)), **to_arrow(views)}
    batch = collate(pa.table(columns), PAD, {"student": IMAGE, "teacher": IMAGE})
    assert_same_inputs(batch.student, stack(views["student"], PAD, IMAGE))
    assert_same_inputs(batch.teacher, stack(views["teacher"], PAD, IMAGE))


@pytest.mark.parametrize("count", [1, 4])
def test_nothing_in_a_batch_is_memory_of_the_table(samples, count):
    """Arrow's buffers may lie in Ray's object store, which could not free the block while a batch points into it."""
    rows = table(samples[:count], views=("student", "teacher"))
    batch = collate(rows, PAD, {"student": IMAGE, "teacher": IMAGE})
    buffers = [np.frombuffer(buffer, np.uint8) for buffer in buffers_of(rows) if buffer.size]
    for part in (batch.student, batch.teacher, batch.ids):
        for name in type(part).__dataclass_fields__:
            for array in arrays(getattr(part, name)).values():
                assert not any(np.may_share_memory(array, buffer) for buffer in buffers), name
                assert array.flags.writeable, name


def buffers_of(rows):
    return [buffer for column in rows.columns for chunk in column.chunks for buffer in chunk.buffers() if buffer]
