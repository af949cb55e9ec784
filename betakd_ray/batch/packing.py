"""Samples → micro-batches: how a step's samples are cut, and how the samples of one micro-batch become arrays.

Everything that can be known on the CPU is made here (which positions are answer rows, which sample each belongs to), so
that the device never has to be asked for a shape.
"""

import math
from collections.abc import Sequence

import numpy as np

from betakd_ray.batch.images import joined_images
from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.sample import Rendering

BATCH_COST = 96
"""What a batch costs beside its tokens, in tokens: launching its kernels takes as long as so many more would."""


def cut(lengths: Sequence[int], max_samples: int | None = None, max_tokens: int | None = None) -> list[list[int]]:
    """Divide samples into batches of like lengths; return the positions of each batch's samples, longest batch first.

    A batch of n samples, padded to its longest, has n × longest tokens. It has at most `max_samples` samples and
    `max_tokens` tokens; a sample longer than that is a batch of its own. With `max_tokens` the cut is the one with the
    fewest padded tokens, where each batch counts as `BATCH_COST` more; without, the batches are full but for the last.
    The result depends on nothing but the arguments: equal lengths keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda at: -lengths[at])
    if max_tokens is None:
        step = max_samples or max(1, len(order))
        return [order[start : start + step] for start in range(0, len(order), step)]
    # Best cost of the first n samples, and where the last batch of that cut begins: in sorted order an optimal batch is
    # a run of neighbours.
    costs, begins = [0.0] + [math.inf] * len(order), [0] * (len(order) + 1)
    for start, at in enumerate(order):
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
    """Pad renderings to one length and index their answer rows and image tokens."""
    lengths = [len(sample.input_ids) for sample in samples]
    shape = (len(samples), max(lengths))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    answer_mask = np.zeros(shape, dtype=bool)
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        input_ids[row, :length] = sample.input_ids
        attention_mask[row, :length] = 1
        answer_mask[row, :length] = sample.answer_mask
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
