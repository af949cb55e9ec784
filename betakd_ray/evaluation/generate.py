"""Answers of a model to many questions: batches of similar length, and the same texts as one question at a time."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from betakd_ray.batch.packing import cut
from betakd_ray.batch.sample import IMAGE, Rendering
from betakd_ray.data.render import Renderer, Unrenderable
from betakd_ray.data.samples import BadSample, RawSample
from betakd_ray.evaluation.decode import Decoded, Decoder

BATCH_TOKENS = 16384
"""Default limit of a batch in tokens, those to be generated included."""
FIRST_TOKENS = 16
"""Number of new tokens after which answers that have not ended are put into batches of their own.

Without this, one long answer would keep all rows of its batch busy. Few answers to benchmarks are longer.
"""
WINDOW_BATCHES = 4
"""Number of batches whose prompts are made at a time and sorted by length."""
RENDERING_THREADS = 4


@dataclass(frozen=True)
class Prompt:
    """A question as the model sees it."""

    key: int
    """Number by which the caller knows the question."""
    rendering: Rendering
    max_new_tokens: int


class Answerer:
    """A model that answers batches of prompts, greedily.

    Two tokens may be so close that rounding, which differs between batches, decides. Such a prompt is answered again by
    itself. So the texts do not depend on the batches.
    """

    def __init__(
        self, model: Any, renderer: Renderer, *, batch_size: int | None = None, batch_tokens: int = BATCH_TOKENS
    ) -> None:
        self._decode = Decoder(model, renderer)
        self._tokenizer = renderer.tokenizer
        self._batch_size, self._batch_tokens = batch_size, batch_tokens

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str]]:
        """Yield (key, answer) of every prompt, batch by batch; the order is not that of `prompts`.

        A batch has at most `batch_size` prompts and `batch_tokens` tokens; if the device has too little memory for it,
        it is divided.
        """
        limits = [min(FIRST_TOKENS, prompt.max_new_tokens) for prompt in prompts]
        longer = yield from self._round(prompts, limits)
        yield from self._round(longer, [prompt.max_new_tokens for prompt in longer])

    def _round(self, prompts: Sequence[Prompt], limits: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Yield the answers that end within their limits, or may not be longer; return the other prompts."""
        unfinished: list[Prompt] = []
        lengths = [len(prompt.rendering.input_ids) + limit for prompt, limit in zip(prompts, limits, strict=True)]
        for batch in cut(lengths, self._batch_size, self._batch_tokens):
            asked, allowed = [prompts[at] for at in batch], [limits[at] for at in batch]
            for prompt, limit, decoded in zip(asked, allowed, self._decoded(asked, allowed), strict=True):
                if decoded.is_close and len(batch) > 1:
                    yield prompt.key, self._text(self._alone(prompt))
                elif decoded.has_ended or limit == prompt.max_new_tokens:
                    yield prompt.key, self._text(decoded)
                else:
                    unfinished.append(prompt)
        return unfinished

    def _text(self, decoded: Decoded) -> str:
        return self._tokenizer.decode(decoded.tokens, skip_special_tokens=True).strip()

    def _alone(self, prompt: Prompt) -> Decoded:
        return self._decode([prompt.rendering], [prompt.max_new_tokens])[0]

    def _decoded(self, prompts: Sequence[Prompt], limits: Sequence[int]) -> list[Decoded]:
        """Decode a batch, in halves if the device has too little memory for it."""
        try:
            return self._decode([prompt.rendering for prompt in prompts], limits)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise
        # After the handler, whose traceback would keep the tensors of the failed batch.
        torch.cuda.empty_cache()
        half = len(prompts) // 2
        return self._decoded(prompts[:half], limits[:half]) + self._decoded(prompts[half:], limits[half:])


def answers(
    model: Any,
    renderer: Renderer,
    samples: Iterable[RawSample | BadSample],
    *,
    batch_size: int,
    max_new_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[str | None]:
    """Yield the model's answer to each sample's last question, in order; None if the question cannot be asked.

    Decoding is greedy. It ends at the tokenizer's or the model's end-of-sequence token. `samples` is read
    `WINDOW_BATCHES` batches at a time.
    """
    answerer = Answerer(model, renderer, batch_size=batch_size, batch_tokens=batch_tokens)
    remaining = iter(samples)
    with ThreadPoolExecutor(RENDERING_THREADS, thread_name_prefix="render") as threads:
        while window := list(islice(remaining, WINDOW_BATCHES * batch_size)):
            rendered = threads.map(partial(prompt_of, renderer), window)
            prompts = [Prompt(at, each, max_new_tokens) for at, each in enumerate(rendered) if each is not None]
            texts = dict(answerer.answers(prompts))
            yield from map(texts.get, range(len(window)))


def prompt_of(renderer: Renderer, sample: RawSample | BadSample) -> Rendering | None:
    """Return the sample up to its last answer, for a model to continue; None if the question cannot be asked."""
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
