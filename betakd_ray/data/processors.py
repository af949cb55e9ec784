"""What a spec chooses of a model's processor: one of its chat templates, arguments of that, and limits of an image."""

import copy
import logging
import re
from collections.abc import Mapping
from typing import Any

from betakd_ray.errors import ModelError, SpecError
from betakd_ray.spec import DataSpec

DEFAULT = "default"
"""Name of the template that is used of several."""
_LOG = logging.getLogger(__name__)


def chosen_template(processor: Any, name: str | None) -> str | None:
    """Return the source of a processor's chat template; of several, the one with that name, or the default.

    None if it has none. Raises ModelError if there is no template of that name.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    own, other = processor.chat_template, tokenizer.chat_template
    found = own or other
    if own and other and own != other:
        _LOG.warning(
            "the processor and its tokenizer have different chat templates; the processor's (chat_template.jinja or "
            "chat_template.json) is used, and not that of tokenizer_config.json"
        )
    if not isinstance(found, dict):
        if name not in (None, DEFAULT) and found:
            raise ModelError(f"data.chat_template is {name!r}, but the model has one chat template; leave it out.")
        return found
    if (name or DEFAULT) not in found:
        raise ModelError(
            f"the model has the chat templates {', '.join(sorted(found))}, and none is called {name or DEFAULT!r}. "
            "Name one in data.chat_template."
        )
    return found[name or DEFAULT]


def template_variables(source: str, tokens: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a template gets beside the messages: special tokens, and the spec's arguments.

    Raises SpecError for an argument that the template does not read: it would change nothing.
    """
    for name in arguments:
        if not re.search(rf"\b{re.escape(name)}\b", source):
            raise SpecError(
                f"data.template_arguments.{name}: the model's chat template does not read it. Leave it out, or correct "
                "its name."
            )
    return {**tokens, **arguments}


def with_pixel_limits(processor: Any, data: DataSpec) -> Any:
    """Return a processor with the spec's limits of an image's pixels; the same one if the spec has none.

    Raises SpecError if its images have no such limits, e.g. because all have one size.
    """
    if data.min_pixels is None and data.max_pixels is None:
        return processor
    images: Any = getattr(processor, "image_processor", None)
    if "min_pixels" not in getattr(getattr(images, "valid_kwargs", None), "__annotations__", {}):
        kind = type(processor if images is None else images).__name__
        raise SpecError(
            f"data.min_pixels and data.max_pixels are limits of Qwen's image processors, and {kind} has none. Leave "
            "them out."
        )
    size = dict(images.size)
    limits = (data.min_pixels or size["shortest_edge"], data.max_pixels or size["longest_edge"])
    if limits[0] > limits[1]:
        raise SpecError(f"data.min_pixels {limits[0]} is above data.max_pixels {limits[1]}; give both.")
    # Copies: the caller's processor may be used without the limits elsewhere.
    limited = copy.copy(processor)
    limited.image_processor = copy.copy(images)
    limited.image_processor.size = {"shortest_edge": limits[0], "longest_edge": limits[1]}
    return limited
