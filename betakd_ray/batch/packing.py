"""Samples → micro-batches: how a step's samples are cut, and how the samples of one micro-batch become arrays.

Everything that can be known on the CPU is made here (which positions are answer rows, which sample each belongs to), so
that the device never has to be asked for a shape.
"""

import numpy as np

from betakd_ray.batch.images import joined_images
from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.sample import Rendering


def stack(samples: list[Rendering], pad_token_id: int, image_token_id: int) -> ModelInputs:
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
    images = joined_images([sample.images for sample in samples if sample.images])
    return ModelInputs(
        input_ids=input_ids,
        attention_mask=attention_mask,
        images=images,
        image_rows={name: np.array([len(sample.images.get(name, ())) for sample in samples]) for name in images},
        answer_rows=row_sample * shape[1] + position,
        row_sample=row_sample,
        targets=input_ids[row_sample, position + 1],
        visual_sample=visual_sample,
        visual_position=visual_position,
    )
