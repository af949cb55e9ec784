"""One sample of the stream: what each model sees of it, and where the teacher's answer to it is kept."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from betakd_ray.batch.images import PIXELS, Images


@dataclass(frozen=True)
class Rendering:
    """One sample as one model sees it."""

    input_ids: NDArray[np.int32]
    """[tokens], image tokens expanded."""
    answer_mask: NDArray[np.bool_]
    """[tokens], true on answer tokens and the end-of-sequence that closes each answer."""
    images: Images = field(default_factory=dict)
    """Empty for a text-only sample."""

    @property
    def nbytes(self) -> int:
        """Return the bytes of all its arrays."""
        arrays = (self.input_ids, self.answer_mask, *self.images.values())
        return sum(array.nbytes for array in arrays)

    @property
    def pixels(self) -> NDArray[Any] | None:
        """uint8 where normalising can wait, e.g. [images, 3, height, width] of LLaVA; else as the processor has it."""
        return self.images.get(PIXELS)


class Stored(NamedTuple):
    """Where a cache keeps one sample's signal: a range of bytes in a file."""

    file: str
    """Relative to the cache's folder."""
    offset: int
    length: int


@dataclass(frozen=True)
class Sample:
    """A sample, identified by its place in the plan: (epoch, shard, index) occurs once in a job."""

    epoch: int
    shard: int
    index: int
    member: int
    """Number of the sample within its shard's file; differs from `index` where an epoch takes a part of a shard."""
    key: str
    """The sample's name in its shard."""
    student: Rendering
    teacher: Rendering
    """The same object as `student` where both models see the sample alike."""
    stored: Stored | None = None
    """Where the teacher's answer is kept; None if it is not."""
