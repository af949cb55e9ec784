"""What the folder of a result needs beside its weights, so that plain transformers asks it as it was trained."""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from betakd_ray.data.render import PROBE, Renderer
from betakd_ray.data.samples import Unrenderable
from betakd_ray.data.saved_prompt import saved_template
from betakd_ray.models.generation import default_length, greedy
from betakd_ray.models.padding import with_padding
from betakd_ray.run.folder import MODEL_RECORD
from betakd_ray.run.records import ModelRecord
from betakd_ray.spec import DataSpec

_LOG = logging.getLogger(__name__)


def save_prompt(folder: Path, processor: Any, data: DataSpec, record: ModelRecord) -> ModelRecord:
    """Write the processor, with the prompt and the padding of training, and the record into `folder`.

    Return the record, with what the files do not express; a warning says that too.
    """
    renderer = Renderer(processor, data)
    has_prompt, is_padded = _with_template(renderer, data), _with_padding(renderer)
    renderer.processor.save_pretrained(folder)  # a copy of `processor` if the spec has limits of an image's pixels
    record = replace(record, has_prompt=has_prompt, pad_to_square=not is_padded)
    (folder / MODEL_RECORD).write_text(json.dumps(asdict(record)), encoding="utf-8")
    return record


def generation_settings(processor: Any, data: DataSpec, config: Any, own: GenerationConfig | None) -> GenerationConfig:
    """Return the settings with which `generate` decodes as an evaluation does.

    `config` and `own` are the model's configuration and its generation settings until now.
    """
    renderer = Renderer(processor, data)
    return greedy(own, renderer.tokenizer, default_length(config), learned_end=_learned_end(renderer))


def _with_template(renderer: Renderer, data: DataSpec) -> bool:
    """Set the processor's chat template to that of training; return whether transformers can express it."""
    template = saved_template(renderer, data)
    if template is None:
        _LOG.warning(
            "data.template: transformers cannot make the prompts of %s from a chat template. Ask the model by the "
            "folder of its run (`betakd ask`). A function of your own can bring a chat template (docs/extending.md).",
            data.template,
        )
    if template is not None or data.template != "chat":  # another template than that of training would mislead
        # Under the spec's name too, with which this package asks for it; callers of transformers get the default.
        named = {"default": template, data.chat_template: template} if data.chat_template else template
        renderer.processor.chat_template = renderer.tokenizer.chat_template = named
    return template is not None


def _with_padding(renderer: Renderer) -> bool:
    """Let the processor pad as training did; return whether it does."""
    if renderer.image_processor is None or not renderer.pad_to_square:
        return True
    options = dict(getattr(renderer.processor, "images_kwargs", {}))
    padding = with_padding(renderer.image_processor, renderer.framed, options)
    if padding is None:
        _LOG.warning(
            "data.pad_to_square: %s has no setting for it, so the model's folder does not pad. `betakd ask` does. Pad "
            "an image before you give it to transformers.",
            type(renderer.image_processor).__name__,
        )
        return False
    renderer.processor.image_processor = padding
    return True


def _learned_end(renderer: Renderer) -> int | None:
    """Return the control token that ended the answers of training; None if they ended otherwise."""
    try:
        rendering = renderer.render(PROBE)
    except Unrenderable:  # longer than `max_length`
        return None
    last = int(rendering.input_ids[rendering.answer_mask][-1])
    return last if last in renderer.tokenizer.added_tokens_decoder else None
