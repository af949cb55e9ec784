"""Image files as rendering and packing open them; without transformers, which takes seconds to import."""

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Image formats that are read, whatever the member's name says. Not all of Pillow's: for EPS it starts Ghostscript."""


def require_still(image: Image.Image) -> None:
    """Raise ValueError for an animation or a file of several pages, of which only the first would be seen."""
    # Of a PNG or WebP the first frame is the picture, and of a JPEG the others are its preview.
    if image.format in ("GIF", "TIFF") and (frames := getattr(image, "n_frames", 1)) > 1:
        raise ValueError(f"it has {frames} frames, and only still images are read")


def rgb(image: Image.Image) -> Image.Image:
    """Return the first frame in RGB, without alpha. The EXIF orientation is ignored, as in LLaVA.

    Raises ValueError for pixel values without a known scale.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no known scale; store it with 8 or 16 bits a channel")
    if image.mode.startswith("I;16"):  # Pillow would make every value above 255 white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
