"""Rendering for the checks, which show the same images again and again: with other texts and for other samples."""

from typing import Any

from betakd_ray.batch.images import Images
from betakd_ray.data.render import Renderer
from betakd_ray.data.samples import RawSample
from betakd_ray.spec import DataSpec

_Shown = tuple[Images, list[str]]


class KeepingRenderer(Renderer):
    """A renderer that opens and processes the images of a sample once. Nobody writes to the arrays that it gives."""

    def __init__(self, processor: Any, data: DataSpec) -> None:
        self._kept: dict[tuple[bytes, ...], _Shown] = {}
        super().__init__(processor, data)

    def with_text_of(self, data: DataSpec) -> "KeepingRenderer":
        """Return a renderer with another template or system prompt, which shows images as this one does."""
        other = KeepingRenderer(self.processor, data)
        other._kept = self._kept
        return other

    def _images_of(self, sample: RawSample) -> _Shown:
        key = tuple(sample.images)
        if key not in self._kept:
            self._kept[key] = super()._images_of(sample)
        return self._kept[key]
