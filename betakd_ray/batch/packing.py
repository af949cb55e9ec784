"""Samples → micro-batches: divide the samples of a step into batches, and stack the samples of one batch into arrays.

All indexes are computed here, on the CPU (which positions are answer rows, which sample each row belongs to). So the
host never waits for the device to learn a shape.
"""

import math
from collections.abc import Sequence

import numpy as np

from betakd_ray.batch.images import joined_images
from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.sample import Rendering

BATCH_COST = 96
"""Fixed cost of a batch, in tokens: launching its kernels takes as long as computing this many tokens."""


def cut(lengths: Sequence[int], max_samples: int | None = None, max_tokens: int | None = None) -> list[list[int]]:
    """Divide samples into batches of similar length; return the positions of each batch's samples, longest first.

    A batch of n samples is padded to its longest sample and so has n × longest tokens. It has at most `max_samples`
    samples and `max_tokens` tokens; a sample longer than `max_tokens` is a batch by itself. With `max_tokens` the
    result is the division with the fewest tokens, padding included, where each batch counts as `BATCH_COST` tokens
    more. Without it, every batch but the last is full. The result depends only on the arguments: samples of equal
    length keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda at: -lengths[at])
    if max_tokens is None:
        step = max_samples or max(1, len(order))
        return [order[start : start + step] for start in range(0, len(order), step)]
    # Dynamic programming over the sorted samples, where an optimal batch is a run of neighbours. For the first n
    # samples, costs[n] is the lowest cost, and begins[n] is where the last batch of that division begins.
    costs, begins = [0.0] + [math.inf] * len(order), [0] * (len(order) + 1)
    for start, at in enumerate(order):
        # The samples are in descending order, so the first of a batch is its longest.
        longest = max(1, lengths[at])
        most = min(max_samples or len(order), max(1, max_tokens // longest))
        for end in range(start + 1, min(len(order), start + most) + 1):
            cost = costs[start] + BATCH_COST + longest * (end - start)
            if cost < costs[end]:
                costs[end], begins[end] = cost, start
    batches, end = [], len(order)
    while end:
        batches.append(order[begins[end] : end])
        end = begins[end]
    return batches[::-1]


def stack(samples: Sequence[Rendering], pad_token_id: int, image_token_id: int) -> ModelInputs:
    """Pad renderings to one length; index their answer rows and image tokens."""
    lengths = [len(sample.input_ids) for sample in samples]
    shape = (len(samples), max(lengths))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    answer_mask = np.zeros(shape, dtype=bool)
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        input_ids[row, :length] = sample.input_ids
        attention_mask[row, :length] = 1
        answer_mask[row, :length] = sample.answer_mask
    # Logits at position n predict token n + 1, so the row of an answer token is one position before it.
    row_sample, position = np.nonzero(answer_mask[:, 1:])
    visual_sample, visual_position = np.nonzero(input_ids == image_token_id)
    return ModelInputs(
        input_ids=input_ids,
        attention_mask=attention_mask,
        images=joined_images([sample.images for sample in samples if sample.images]),
        answer_rows=row_sample * shape[1] + position,
        row_sample=row_sample,
        targets=input_ids[row_sample, position + 1],
        visual_sample=visual_sample,
        visual_position=visual_position,
    )
