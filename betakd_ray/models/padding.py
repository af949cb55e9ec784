"""Padding to a square as an option of transformers' image processor, so that a result's folder has it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
SIZES = ((48, 32), (32, 48), (31, 31), (300, 40), (1, 9))
"""Sizes (width, height) in pixels of the images on which the pixels are compared."""


def backend(image_processor: Any) -> str:
    """Return the name under which transformers loads an image processor of this kind: `pil` or `torchvision`."""
    return "pil" if type(image_processor).__name__.endswith("Pil") else "torchvision"


def with_padding(
    image_processor: Any, pad: Callable[[Image.Image], Image.Image], options: dict[str, Any]
) -> Any | None:
    """Return an image processor of transformers that pads as `pad` does; None if there is none with the very pixels.

    `options` are keywords of each call.
    """
    if _same(image_processor, image_processor, pad, options):
        return image_processor
    settings = {**dict.fromkeys(STEPS, False), **image_processor.to_dict(), "do_pad": True}
    for name in ("image_processor_type", "processor_class", "auto_map"):
        settings.pop(name, None)
    made = _padding_class(image_processor)(**settings)
    return made if _same(made, image_processor, pad, options) else None


def _padding_class(image_processor: Any) -> Any:
    if backend(image_processor) == "pil":
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        return LlavaImageProcessorPil
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor  # imports torchvision

    return LlavaImageProcessor


def _same(
    padding: Any, image_processor: Any, pad: Callable[[Image.Image], Image.Image], options: dict[str, Any]
) -> bool:
    """Return whether `padding` makes of images what `image_processor` makes of them after `pad`."""
    for width, height in SIZES:
        noise = np.random.default_rng(width).integers(0, 256, (height, width, 3)).astype(np.uint8)
        image = Image.fromarray(noise)
        try:
            found, expected = _arrays(padding, [image], options), _arrays(image_processor, [pad(image)], options)
        except Exception:  # an image processor's code may raise anything for settings that it does not know
            return False
        if found.keys() != expected.keys():
            return False
        if not all(np.array_equal(found[name], expected[name]) for name in expected):
            return False
    return True


def _arrays(image_processor: Any, images: Sequence[Image.Image], options: dict[str, Any]) -> dict[str, Any]:
    made = image_processor(images, **options, return_tensors="np")
    return {name: np.asarray(made[name]) for name in image_processor.model_input_names if name in made}
