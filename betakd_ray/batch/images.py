"""The images of a sample as the arrays that its model takes.

The names and shapes of the arrays differ between model families; some have grids, sizes or masks beside the pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = dict[str, NDArray[Any]]
"""Arrays by the model's argument names: `pixel_values` and the arrays that belong to it. Empty if there is no image.

The arrays of several images, or of several samples, are concatenated along the first axis. That axis counts images,
crops of images or patches, depending on the model family.
"""
PIXELS, MASK = "pixel_values", "pixel_attention_mask"


def joined_images(parts: Sequence[Images]) -> Images:
    """Concatenate the arrays of several images or samples. An axis in which their sizes differ is padded with zeros."""
    return {name: _joined([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) == 1:
        return np.concatenate(arrays)
    largest = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    whole = np.zeros((sum(map(len, arrays)), *largest), arrays[0].dtype)
    start = 0
    for array in arrays:
        whole[(slice(start, start + len(array)), *map(slice, array.shape[1:]))] = array
        start += len(array)
    return whole
