"""Greedy decoding of one batch, with a note of the choices that rounding could have decided."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from betakd_ray.batch.images import joined_images
from betakd_ray.batch.inputs import to_device
from betakd_ray.batch.normalization import Normalization
from betakd_ray.batch.sample import Rendering
from betakd_ray.data.render import Renderer
from betakd_ray.models.vlm import with_image_tokens

ROUNDING = {torch.float32: 2.0**-13, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""Largest difference between the logits of one prompt in two batches, as a fraction of the largest logit, by dtype.

It is a few units in the last place of a half-precision number, and a thousand of a float32, whose sums are longer.
"""


@dataclass(frozen=True)
class Decoded:
    """Continuation of one prompt."""

    tokens: list[int]
    """Ids of the new tokens, without the end-of-sequence token and what follows it."""
    has_ended: bool
    """Whether an end-of-sequence token came within the limit."""
    is_close: bool
    """Whether two tokens were so close somewhere that another batch could have chosen the other one."""


class Decoder:
    """Greedy decoder of one model, which writes to no state between two batches."""

    def __init__(self, model: Any, renderer: Renderer) -> None:
        self._model = model
        self._pad_token_id = renderer.pad_token_id
        self._normalize = Normalization.of(renderer.image_processor)
        own = model.generation_config.eos_token_id
        # Both: a student learns to end with the tokenizer's token, but a chat model may end its turns with another one.
        self._ends = {renderer.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        self._rounding = ROUNDING.get(model.dtype, ROUNDING[torch.bfloat16])

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Rendering], limits: Sequence[int]) -> list[Decoded]:
        """Continue each prompt by up to its limit of new tokens, in one batch."""
        device = self._model.device
        input_ids, attention_mask = (to_device(each, device) for each in pad_left(prompts, self._pad_token_id))
        images = joined_images([prompt.images for prompt in prompts if prompt.images])
        shown = {name: to_device(array, device) for name, array in images.items()}
        if shown:
            shown = with_image_tokens(self._model, input_ids, self._normalize.of_images(shown, self._model.dtype))
        margins = _Margins()
        tokens = self._model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=self._greedy(max(limits)),
            logits_processor=LogitsProcessorList([margins]),
            **shown,
        )
        new = tokens[:, input_ids.shape[1] :].tolist()
        close = margins.below(self._rounding).tolist()
        return [self._decoded(*row) for row in zip(new, close, limits, strict=True)]

    def _decoded(self, tokens: list[int], close: list[bool], limit: int) -> Decoded:
        tokens = tokens[:limit]
        end = next((at for at, token in enumerate(tokens) if token in self._ends), None)
        # The end-of-sequence token was a choice too.
        chosen = len(tokens) if end is None else end + 1
        return Decoded(tokens[:end], end is not None, any(close[:chosen]))

    def _greedy(self, max_new_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            do_sample=False,
            num_beams=1,
            # Set here, because the checkpoint's own generation settings replace values that are not set.
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self._ends),
            pad_token_id=self._pad_token_id,
        )


class _Margins(LogitsProcessor):
    """Observer of the logits, which it returns unchanged."""

    def __init__(self) -> None:
        self._relative: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best, second = scores.topk(2, dim=-1).values.unbind(-1)
        # A family may forbid a token with a logit of -inf.
        scale = scores.abs().nan_to_num(posinf=0.0).amax(-1)
        self._relative.append((best - second) / scale.clamp_min(torch.finfo(scores.dtype).tiny))
        return scores

    def below(self, rounding: float) -> Tensor:
        """Return [batch, new tokens] whether the two largest logits differ by less than `rounding` times the scale."""
        return torch.stack(self._relative, dim=1) < rounding


def pad_left(prompts: Sequence[Rendering], pad_token_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
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
