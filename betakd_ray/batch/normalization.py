"""Normalisation of pixels, on the device that the model is on."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from betakd_ray.batch.images import MASK, PIXELS


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
