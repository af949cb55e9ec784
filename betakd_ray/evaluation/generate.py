"""Batched greedy decoding: from prompts to answers, in the same order."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from betakd_ray.batch.images import joined_images
from betakd_ray.batch.inputs import to_device
from betakd_ray.batch.normalization import Normalization
from betakd_ray.batch.sample import IMAGE, Rendering
from betakd_ray.data.render import Renderer, Unrenderable
from betakd_ray.data.samples import BadSample, RawSample
from betakd_ray.models.vlm import with_image_tokens


def answers(
    model: Any, renderer: Renderer, samples: Iterable[RawSample | BadSample], *, batch_size: int, max_new_tokens: int
) -> Iterator[str | None]:
    """Yield the model's answer to each sample's last question, in order; None if the question cannot be asked.

    Decoding is greedy. It ends at the tokenizer's or the model's end-of-sequence token. `samples` is read one batch at
    a time.
    """
    normalize = Normalization.of(renderer.image_processor)
    config = _greedy(model, renderer, max_new_tokens)
    remaining = iter(samples)
    while batch := list(islice(remaining, batch_size)):
        prompts = [_prompt(renderer, sample) for sample in batch]
        askable = [prompt for prompt in prompts if prompt is not None]
        texts = iter(_generate(model, renderer, askable, normalize, config) if askable else ())
        yield from (None if prompt is None else next(texts) for prompt in prompts)


def pad_left(prompts: list[Rendering], pad_token_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return token ids and attention mask, both [B, L].

    Padding is on the left, so that every prompt ends at the position where generation begins.
    """
    shape = (len(prompts), max(len(prompt.input_ids) for prompt in prompts))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        start = shape[1] - len(prompt.input_ids)
        input_ids[row, start:] = prompt.input_ids
        attention_mask[row, start:] = 1
    return input_ids, attention_mask


def _prompt(renderer: Renderer, sample: RawSample | BadSample) -> Rendering | None:
    if isinstance(sample, BadSample) or _shown(sample) != len(sample.images):
        return None
    try:
        return renderer.prompt(sample)
    except Unrenderable:
        return None


def _shown(sample: RawSample) -> int:
    """Return the number of images before the last answer, which are in the prompt.

    An image in or after that answer would have pixels, but no tokens in the prompt.
    """
    last = max(i for i, turn in enumerate(sample.conversation) if turn["from"] == "gpt")
    return sum(turn["value"].count(IMAGE) for turn in sample.conversation[:last])


@torch.inference_mode()
def _generate(
    model: Any, renderer: Renderer, prompts: list[Rendering], normalize: Normalization, config: GenerationConfig
) -> list[str]:
    device = model.device
    input_ids, attention_mask = (to_device(each, device) for each in pad_left(prompts, renderer.pad_token_id))
    images = joined_images([prompt.images for prompt in prompts if prompt.images])
    shown = {name: to_device(array, device) for name, array in images.items()}
    if shown:
        shown = with_image_tokens(model, input_ids, normalize.of_images(shown, model.dtype))
    tokens = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config, **shown)
    new = tokens[:, input_ids.shape[1] :].tolist()
    return [text.strip() for text in renderer.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _greedy(model: Any, renderer: Renderer, max_new_tokens: int) -> GenerationConfig:
    own = model.generation_config.eos_token_id
    # Both: a student learns to end with the tokenizer's token, but a chat model may end its turns with another one.
    ends = {renderer.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        # Set here, because the checkpoint's own generation settings replace values that are not set.
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=renderer.pad_token_id,
    )
