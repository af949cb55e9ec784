"""A batch answers as its questions alone do: for each family, for any batch, in half precision, and without images."""

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from betakd_ray.data.render import Renderer
from betakd_ray.data.samples import RawSample
from betakd_ray.evaluation import generate
from betakd_ray.evaluation.decode import Decoded, Decoder
from betakd_ray.evaluation.generate import Answerer, Prompt, answers, prompt_of
from betakd_ray.spec import DataSpec
from tests.families import FAMILIES, build

QUESTIONS = (
    ("What colour is the shape on the left of the picture?", (40, 24)),
    ("Why?", None),
    ("Is it a circle?", (24, 40)),
    ("Is there anything else that you would like to say about all of it, or about parts?", None),
    ("Hm?", (16, 16)),
    ("Which is larger?", (90, 30)),
)
TOKENS = 24


def sample(number: int, question: str, size: tuple[int, int] | None) -> RawSample:
    images = []
    if size:
        buffer = io.BytesIO()
        noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(buffer, "PNG")
        images = [buffer.getvalue()]
    head = "<image>\n" if size else ""
    turns = [{"from": "human", "value": head + question}, {"from": "gpt", "value": "Blue."}]
    return RawSample(str(number), number, str(number), turns, images)


SAMPLES = [sample(at, *question) for at, question in enumerate(QUESTIONS)]


def family(name: str) -> tuple[Any, Renderer]:
    chosen = FAMILIES[name]
    renderer = Renderer(
        chosen.processor(), DataSpec.model_validate({"train": "unused.tar", "template": chosen.template})
    )
    return build(chosen.config()), renderer


def texts(model: Any, renderer: Renderer, batch_size: int, samples: Sequence[RawSample] = SAMPLES) -> list[str | None]:
    return [*answers(model, renderer, samples, batch_size=batch_size, max_new_tokens=TOKENS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_of_each_family_answers_as_its_questions_alone(name: str, dtype: torch.dtype) -> None:
    model, renderer = family(name)
    model.to(dtype)
    single = texts(model, renderer, 1)
    assert len(set(single)) > 1, "the questions should have different answers, or order is not tested"
    assert texts(model, renderer, len(SAMPLES)) == single
    assert texts(model, renderer, 4, SAMPLES[::-1]) == single[::-1]


def test_a_batch_without_images_answers_as_its_questions_alone() -> None:
    model, renderer = family("qwen2_5_vl")
    without = [each for each in SAMPLES if not each.images]
    assert texts(model, renderer, 4, without) == texts(model, renderer, 1, without)


def prompts(renderer: Renderer, *limits: int) -> list[Prompt]:
    made = [prompt_of(renderer, each) for each in SAMPLES]
    return [Prompt(at, each, limits[at % len(limits)]) for at, each in enumerate(made) if each]


def test_each_question_has_its_own_limit_of_new_tokens() -> None:
    model, renderer = family("llava")
    together = dict(Answerer(model, renderer).answers(prompts(renderer, 2, 40)))
    for prompt in prompts(renderer, 2, 40):
        ((_, alone),) = Answerer(model, renderer).answers([prompt])
        assert together[prompt.key] == alone


def test_a_close_choice_is_made_without_the_other_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, renderer = family("llava")
    asked: list[int] = []
    decode = Decoder.__call__

    def watched(self: Decoder, rendered: Any, limits: Any) -> list[Decoded]:
        asked.append(len(rendered))
        return decode(self, rendered, limits)

    monkeypatch.setattr(Decoder, "__call__", watched)
    for rounding, alone in ((0.0, 0), (1e9, len(SAMPLES))):
        asked.clear()
        answerer = Answerer(model, renderer)
        monkeypatch.setattr(answerer._decode, "_rounding", rounding)
        list(answerer.answers(prompts(renderer, 8)))
        assert asked.count(1) == alone


def test_a_batch_that_the_device_has_no_memory_for_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    model, renderer = family("llava")
    expected = dict(Answerer(model, renderer).answers(prompts(renderer, 8)))
    decode, seen = Decoder.__call__, []

    def small(self: Decoder, rendered: Any, limits: Any) -> list[Decoded]:
        seen.append(len(rendered))
        if len(rendered) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, rendered, limits)

    monkeypatch.setattr(Decoder, "__call__", small)
    assert dict(Answerer(model, renderer).answers(prompts(renderer, 8))) == expected
    assert max(seen) > 2
    monkeypatch.setattr(Decoder, "__call__", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.raises(torch.OutOfMemoryError, match="none at all"):
        list(Answerer(model, renderer).answers(prompts(renderer, 8)))


def test_answers_that_have_not_ended_go_on_in_batches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, renderer = family("llava")
    expected = dict(Answerer(model, renderer, batch_size=1).answers(prompts(renderer, 20)))
    for first in (1, 3, 20, 50):
        monkeypatch.setattr(generate, "FIRST_TOKENS", first)
        assert dict(Answerer(model, renderer).answers(prompts(renderer, 20))) == expected


def test_a_batch_has_no_more_tokens_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, renderer = family("llava")
    shapes: list[int] = []
    decode = Decoder.__call__

    def watched(self: Decoder, rendered: Any, limits: Any) -> list[Decoded]:
        shapes.append(len(rendered) * (max(len(each.input_ids) for each in rendered) + max(limits)))
        return decode(self, rendered, limits)

    monkeypatch.setattr(Decoder, "__call__", watched)
    list(Answerer(model, renderer, batch_tokens=200).answers(prompts(renderer, 8)))
    assert len(shapes) > 1
    longest = max(len(each.rendering.input_ids) for each in prompts(renderer, 8))
    assert max(shapes) <= max(200, longest + 8)
