"""Whether plain transformers makes a model's prompts from its folder, token for token, and the template for it."""

import io
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

import numpy as np
from PIL import Image

from betakd_ray.batch.sample import IMAGE
from betakd_ray.data.render import Renderer
from betakd_ray.data.samples import RawSample, Unrenderable
from betakd_ray.data.saved_template import additions_to, templates_of, with_arguments
from betakd_ray.data.template_process import render_template
from betakd_ray.data.templates import parts_of
from betakd_ray.plugins import load
from betakd_ray.spec import DataSpec
from betakd_ray.spec.base import is_plugin

ANOTHER_DAY = date(2001, 2, 3)
"""Date on which the prompts are compared: not that of training, so that a template that writes today's is found."""
SIZES = ((48, 32), (20, 61))
QUESTIONS = (
    ("What?",),
    ("Why ünïcode?\n\nIn two lines", "And\tnow?"),
    (f"{IMAGE}\nWhich colour?",),
    (f"{IMAGE}\n{IMAGE}\nWhich of the two?", "Sure?"),
    (f"Is {IMAGE} like {IMAGE} here?",),
    ("No image yet.", f"{IMAGE}\nAnd in this one?", "Why?"),
)
"""Conversations on which the prompts are compared: the questions of each."""


def saved_template(renderer: Renderer, data: DataSpec) -> str | None:
    """Return a chat template with which plain transformers makes the renderer's prompts; None if none is known.

    A function of the user's may bring its own as the attribute `chat_template`.
    """
    expected = [(sample, prompt) for sample in _samples() if (prompt := _prompt(renderer, sample)) is not None]
    if not expected:
        return None
    return next((each for each in _candidates(renderer, data) if _makes_all(each, renderer, expected)), None)


def messages_of(turns: Sequence[dict[str, str]], images: Sequence[Any], *, in_parts: bool) -> list[dict[str, Any]]:
    """Return turns of a conversation as the messages of transformers, with images as it takes them.

    `in_parts` is true for a model that takes images: its messages are lists of parts.
    """
    remaining = iter(images)
    messages: list[dict[str, Any]] = []
    for turn in turns:
        role, text = ("user", turn["value"]) if turn["from"] == "human" else ("assistant", turn["value"])
        if in_parts:
            parts = parts_of(text) if role == "user" else [{"type": "text", "text": text}]
            content = [part | {"image": next(remaining)} if part["type"] == "image" else part for part in parts]
            messages.append({"role": role, "content": content})
        else:
            messages.append({"role": role, "content": text.strip() if role == "user" else text})
    return messages


def _candidates(renderer: Renderer, data: DataSpec) -> Iterator[str]:
    bos = renderer.tokenizer.bos_token or ""
    beginnings = ("", bos, f"{bos} ") if bos else ("",)
    if is_plugin(data.template):
        if own := getattr(load(data.template, "data.template"), "chat_template", None):
            yield from additions_to(own, data.system_prompt, data.template_date, renderer.image_token, beginnings)
    elif data.template == "chat":
        own = with_arguments(renderer.chat_template or "", data.template_arguments)
        yield from additions_to(own, data.system_prompt, data.template_date, renderer.image_token, beginnings)
    else:
        yield from templates_of(data.template, data.system_prompt, renderer.image_token, beginnings)


def _samples() -> Iterator[RawSample]:
    for questions in QUESTIONS:
        turns, images = [], []
        for question in questions:
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": "Bécause, 1.\nYes"}]
            images += [_picture(*SIZES[at % 2]) for at in range(question.count(IMAGE))]
        yield RawSample(questions[0], 0, questions[0], turns, images)


def _picture(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _prompt(renderer: Renderer, sample: RawSample) -> list[int] | None:
    """Return the tokens of a prompt; None if the model does not take such a sample, e.g. one with images."""
    try:
        return renderer.prompt(sample).input_ids.tolist()
    except Unrenderable:
        return None


def _makes_all(template: str, renderer: Renderer, expected: Sequence[tuple[RawSample, list[int]]]) -> bool:
    try:
        return all(_plain_prompt(template, renderer, sample) == prompt for sample, prompt in expected)
    # A processor's code may raise anything. Then this form is not known to be right, and the job goes on to its end.
    except Exception:
        return False


def _plain_prompt(template: str, renderer: Renderer, sample: RawSample) -> list[int]:
    """Return the tokens that `apply_chat_template` would make with this template."""
    processor, tokenizer = renderer.processor, renderer.tokenizer
    sees = renderer.image_processor is not None
    # In the process with limits, as in training: a model's own template may be anyone's.
    messages = messages_of(sample.conversation[:-1], [None] * len(sample.images), in_parts=sees)
    variables = tokenizer.special_tokens_map
    text = render_template(template, messages, variables, ANOTHER_DAY, generation=True)
    if not sees:  # a tokenizer's `apply_chat_template` adds no special tokens
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    options = {"add_special_tokens": False} if has_bos else {}
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in sample.images]
    return list(processor(text=[text], images=[images] if images else None, **options)["input_ids"][0])
