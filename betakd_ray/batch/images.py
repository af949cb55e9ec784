"""The images of a sample as the arrays that its model takes. The model's own processor makes them.

A processor turns images into arrays (pixels; for some model families also grids, sizes or masks) and says which text
stands for an image. The arrays and the text differ between families; the processor's interface is the same for all, and
this module uses nothing else.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Images = dict[str, NDArray[Any]]
"""Arrays by the model's argument names: `pixel_values` and the arrays that belong to it. Empty if there is no image.

The arrays of several images, or of several samples, are concatenated along the first axis. That axis counts images,
crops of images or patches, depending on the model family.
"""
PIXELS, MASK = "pixel_values", "pixel_attention_mask"
TOGETHER = ("LlavaOnevisionProcessor",)
"""Processors that treat an image differently if the sample has several: they do not cut it into crops then."""


@dataclass(frozen=True)
class Normalization:
    """Normalisation of uint8 pixels for the vision tower, on the device. Other dtypes are normalised already."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, image_processor: Any) -> "Normalization":
        """Return the normalisation that `image_processor` would apply; the identity if it is None (text-only model)."""
        scale = image_processor.rescale_factor if getattr(image_processor, "do_rescale", False) else 1.0
        if not getattr(image_processor, "do_normalize", False):
            return cls(scale, (0.0,) * 3, (1.0,) * 3)
        return cls(scale, tuple(image_processor.image_mean), tuple(image_processor.image_std))

    def __call__(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalise images [..., 3, height, width] or flat patches [patches, 3 · values per channel]."""
        if pixels.dtype != torch.uint8:
            return pixels.to(dtype)
        # A flat patch has all values of one channel, then those of the next.
        channels = pixels.view(len(pixels), 3, -1, 1) if pixels.ndim == 2 else pixels
        mean, std = _constants(self.mean, pixels.device), _constants(self.std, pixels.device)
        return ((channels * self.scale - mean) / std).to(dtype).view(pixels.shape)

    def of_images(self, images: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Return all inputs of the vision tower. Pixels that a mask marks as padding are zero, as from a processor."""
        pixels = self(images[PIXELS], dtype)
        if MASK in images:
            pixels = pixels * images[MASK][..., None, :, :]
        return {**images, PIXELS: pixels}


def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return one number per channel on the device: [channels, 1, 1]."""
    if device.type == "cuda":
        return _kept_constants(values, device)
    return torch.tensor(values, device=device)[:, None, None]


@cache
def _kept_constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return what `_constants` does, but create it once: a copy from unpinned memory waits for all queued GPU work."""
    with torch.inference_mode(False):  # an inference tensor cannot be used where autograd records
        return torch.tensor(values, device=device)[:, None, None]


class ImageProcessing:
    """Turns the images of one sample into arrays, and says which text, with its image tokens, stands for each image."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._images = processor.image_processor
        self._options = dict(getattr(processor, "images_kwargs", {}))
        self._is_late = _normalises_late(self._images, self._options)

    def __call__(self, images: Iterable[Image.Image]) -> tuple[Images, list[str]]:
        """Return the arrays of all images, and the text that stands for each image.

        Raises ValueError for an image that the processor refuses, e.g. a strip of 1×1000 pixels.
        """
        if type(self._processor).__name__ in TOGETHER:
            sample = list(images)
            made = self._made([sample])
            return self._kept(made), [self._processor.replace_image_token(made, at) for at in range(len(sample))]
        # One image at a time: a hundred large decoded images would not fit in memory together.
        arrays, texts = [], []
        for image in images:
            made = self._made([image])
            arrays.append(self._kept(made))
            texts.append(self._processor.replace_image_token(made, 0))
        return joined_images(arrays), texts

    def blank(self) -> Images:
        """Return the arrays of a small black image."""
        return self([Image.new("RGB", (32, 32))])[0]

    def _made(self, images: Sequence[Any]) -> Any:
        return _made(self._images, images, self._options, is_late=self._is_late)

    def _kept(self, made: Any) -> Images:
        """Return those of the processor's arrays that the model takes."""
        arrays = {name: np.asarray(made[name]) for name in self._images.model_input_names if name in made}
        if self._is_late:
            # uint8 is a quarter of the bytes of float32 to move; the device normalises later.
            arrays[PIXELS] = arrays[PIXELS].astype(np.uint8, copy=False)
        if MASK in arrays:
            arrays[MASK] = arrays[MASK].astype(bool)
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


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


def _made(image_processor: Any, images: Sequence[Any], options: dict[str, Any], *, is_late: bool) -> Any:
    late = {"do_rescale": False, "do_normalize": False} if is_late else {}
    return image_processor(images, **options, **late, return_tensors="np")


def _normalises_late(image_processor: Any, options: dict[str, Any]) -> bool:
    """Return whether normalising uint8 pixels later gives the processor's own result; it is tested on a noise image."""
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8)
    now, later = (
        _made(image_processor, [Image.fromarray(noise)], options, is_late=is_late) for is_late in (False, True)
    )
    whole = np.asarray(later[PIXELS])
    # Some processors scale or normalise whatever the options say: then the pixels are not whole numbers of 0 … 255.
    if not np.array_equal(whole, whole.astype(np.uint8)):
        return False
    images = {PIXELS: torch.from_numpy(whole.astype(np.uint8))}
    if MASK in later:
        images[MASK] = torch.from_numpy(np.asarray(later[MASK]))
    normalised = Normalization.of(image_processor).of_images(images, torch.float32)[PIXELS]
    return np.allclose(normalised.numpy(), np.asarray(now[PIXELS]), atol=1e-5)
