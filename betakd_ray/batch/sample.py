"""One sample of the stream: what each model sees of it, and where the teacher's signal for it is stored."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from betakd_ray.batch.images import PIXELS, Images

IMAGE = "<image>"
"""Placeholder of an image in the text of a conversation."""


@dataclass(frozen=True)
class Rendering:
    """One sample as one model sees it."""

    input_ids: NDArray[np.int32]
    """[tokens] with one token id for each image token that the model makes of an image."""
    answer_mask: NDArray[np.bool_]
    """[tokens] true on answer tokens and on the end-of-sequence token that closes each answer."""
    images: Images = field(default_factory=dict)
    """Inputs of the vision tower; empty for a text-only sample."""

    @property
    def nbytes(self) -> int:
        """Return the size in bytes of all arrays."""
        arrays = (self.input_ids, self.answer_mask, *self.images.values())
        return sum(array.nbytes for array in arrays)

    @property
    def pixels(self) -> NDArray[Any] | None:
        """Return the pixels, e.g. [images, 3, height, width] for LLaVA; None without an image.

        They are uint8 if the device normalises them, otherwise as the processor makes them.
        """
        return self.images.get(PIXELS)


class Stored(NamedTuple):
    """Place of one sample's signal in a cache: a range of bytes in a file."""

    file: str
    """Path relative to the cache's folder."""
    offset: int
    """First byte."""
    length: int
    """Number of bytes."""


@dataclass(frozen=True)
class Sample:
    """A sample, identified by its place in the plan: each (epoch, shard, index) occurs once in a job."""

    epoch: int
    shard: int
    index: int
    member: int
    """Number of the sample in its shard's file. It differs from `index` if an epoch takes only a part of the shard."""
    key: str
    """Name of the sample in its shard."""
    student: Rendering
    teacher: Rendering
    """Rendering for the teacher; the same object as `student` if both models see the sample alike."""
    stored: Stored | None = None
    """Place of the teacher's signal in the cache; None if it is not cached."""
