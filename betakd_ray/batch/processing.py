"""Makes the arrays of images with the model's own processor.

A processor turns images into arrays and says which text stands for an image. The arrays and the text differ between
families; the processor's interface is the same for all, and this module uses nothing else.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from betakd_ray.batch.images import MASK, PIXELS, Images, joined_images
from betakd_ray.batch.normalization import Normalization

TOGETHER = ("LlavaOnevisionProcessor",)
"""Processors that treat an image differently if the sample has several: they do not cut it into crops then."""


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
