"""Chat templates as models have them: several names, no end, no turn of the assistant, thoughts, images in place."""

import logging

import pytest

from betakd_ray.batch.sample import IMAGE
from betakd_ray.data.learned import learned_texts
from betakd_ray.data.render import Renderer
from betakd_ray.data.samples import RawSample
from betakd_ray.data.templates import parts_of
from betakd_ray.errors import ModelError, SpecError
from betakd_ray.spec import DataSpec
from tests.tiny import CHAT_TEMPLATE, EOS, raw_sample, tiny_processor, tiny_tokenizer


def view(template, make=tiny_tokenizer, **options):
    processor = make(chat_template=template)
    return Renderer(processor, DataSpec.model_validate({"train": "/x.tar", "template": "chat", **options}))


def asked(*texts, system=None):
    turns = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]
    return RawSample("k", 0, "k", turns, [], system=system)


def learned(renderer, sample):
    # A space before an answer may be a part of its first token.
    return [text.strip() for text in learned_texts(renderer.tokenizer, renderer.render(sample))]


def whole(renderer, sample):
    return renderer.tokenizer.decode(renderer.render(sample).input_ids)


BODY = "{% for m in messages %}{{ m.role|upper + ': ' + m.content + END }}{% endfor %}"
BEGIN = "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
OPEN = BODY.replace("END", "' '") + BEGIN
NAMELESS = BODY.replace("END", "'</s>'")  # it ignores add_generation_prompt
LATE = BODY.replace("END", "('</s>' if m.role == 'assistant' and not loop.last else ' ')") + BEGIN
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' and "
    "loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


@pytest.mark.parametrize("template", [OPEN, LATE, OPEN.replace("' '", "'\n'"), BODY.replace("END", "' '")])
def test_an_answer_that_the_template_does_not_close_is_closed_once_and_learns_it(template):
    renderer = view(template)
    sample = asked("Which?", "A dot", "And?", "Blue")
    assert learned(renderer, sample) == ["A dot" + EOS, "Blue" + EOS]
    assert whole(renderer, sample).count(EOS) == 2


@pytest.mark.parametrize("answer", ["s", "</", "/s>", "USER"])
def test_an_answer_like_a_part_of_the_end_is_closed_once(answer):
    assert learned(view(OPEN), asked("Which?", answer)) == [answer + EOS]
    assert learned(view(CHAT_TEMPLATE), asked("Which?", answer)) == [answer + EOS]


def test_the_speaker_s_name_is_not_learned_where_a_template_ignores_the_generation_prompt():
    renderer = view(NAMELESS)
    sample = asked("Which?", "A dot")
    assert learned(renderer, sample) == ["A dot" + EOS]
    prompt = renderer.tokenizer.decode(renderer.prompt(sample).input_ids)
    assert prompt.endswith("ASSISTANT:")
    assert whole(renderer, sample).startswith(prompt)


def test_of_a_thinking_model_s_conversation_the_last_answer_is_learned():
    renderer = view(THINKING)
    assert learned(renderer, asked("Which?", "A dot")) == ["<think>\n\n</think>\n\nA dot" + EOS]
    sample = asked("Which?", "A dot", "And?", "Blue")
    assert learned(renderer, sample) == ["<think>\n\n</think>\n\nBlue" + EOS]
    assert "<assistant>A dot</s><user>And?" in whole(renderer, sample)


def test_an_argument_changes_what_is_learned_and_the_fingerprint():
    renderer = view(THINKING, template_arguments={"enable_thinking": False})
    assert learned(renderer, asked("Which?", "A dot")) == ["A dot" + EOS]
    assert whole(renderer, asked("Which?", "A dot")) == whole(view(THINKING), asked("Which?", "A dot"))
    prints = {view(THINKING, template_arguments=each).fingerprint for each in ({}, {"enable_thinking": True})}
    assert renderer.fingerprint not in prints
    assert len(prints) == 2


def test_an_argument_that_changes_nothing_is_an_error():
    with pytest.raises(SpecError, match=r"template_arguments.enable_thought: the model's chat template does not read"):
        view(THINKING, template_arguments={"enable_thought": False})
    for arguments, said in (({"messages": []}, "is set by this package"), ({"a": float("nan")}, "finite")):
        with pytest.raises(ValueError, match=said):
            DataSpec.model_validate({"train": "/x.tar", "template": "chat", "template_arguments": arguments})
    with pytest.raises(ValueError, match="template_arguments: is used only with `template: chat`"):
        DataSpec.model_validate({"train": "/x.tar", "template_arguments": {"a": 1}})


def test_of_several_templates_the_default_or_the_named_one_is_used():
    several = {"default": CHAT_TEMPLATE, "rag": OPEN}
    assert whole(view(several), asked("Q", "A")) == whole(view(CHAT_TEMPLATE), asked("Q", "A"))
    assert whole(view(several, chat_template="rag"), asked("Q", "A")) == whole(view(OPEN), asked("Q", "A"))
    for templates, name in ((several, "tools"), ({"rag": OPEN}, None)):
        with pytest.raises(ModelError, match=r"has the chat templates .*rag, and none is called.*data\.chat_template"):
            view(templates, chat_template=name)
    with pytest.raises(ModelError, match="the model has one chat template; leave it out"):
        view(CHAT_TEMPLATE, chat_template="rag")


def test_two_different_templates_of_one_model_are_said(caplog):
    processor = tiny_processor(chat_template=CHAT_TEMPLATE)
    processor.tokenizer.chat_template = OPEN
    with caplog.at_level(logging.WARNING):
        Renderer(processor, DataSpec.model_validate({"train": "/x.tar", "template": "chat"}))
    assert "have different chat templates; the processor's" in caplog.text


def test_a_sample_s_own_system_prompt_is_used_unless_the_spec_has_one():
    sample = asked("Q", "A", system="Be odd.")
    assert "Be odd." in whole(view(CHAT_TEMPLATE), sample)
    assert "Be odd." not in whole(view(CHAT_TEMPLATE, system_prompt="Be even."), sample)
    vicuna = Renderer(tiny_tokenizer(), DataSpec.model_validate({"train": "/x.tar"}))
    assert whole(vicuna, sample).startswith("<s>Be odd. USER: Q")


def test_images_with_text_between_them_stay_in_place():
    image, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    assert parts_of(f"{IMAGE}\nWhat?") == parts_of(f"What? {IMAGE}") == [image, text("What?")]
    assert parts_of(f"{IMAGE}\n{IMAGE}\nSame?") == [image, image, text("Same?")]
    assert parts_of(f"Is {IMAGE} like {IMAGE}?") == [text("Is "), image, text(" like "), image, text("?")]
    template = (
        "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
        "{{ '</s>' if m.role == 'assistant' }}{% endfor %}"
    )
    renderer = view(template, tiny_processor)
    image_bytes = raw_sample(0, "x", has_image=True).images
    turns = asked(f"Is {IMAGE} like {IMAGE}?", "No").conversation
    assert "Is" + IMAGE * 4 + " like" in whole(renderer, RawSample("k", 0, "k", turns, image_bytes * 2)).replace(
        "s <", "s<"
    )


# ---- limits of an image's pixels -----------------------------------------------------------------------------------


def test_pixels_are_limited_for_a_family_that_scales_by_them():
    transformers = pytest.importorskip("transformers")
    from betakd_ray.data.processors import with_pixel_limits

    class Processor:
        image_processor = transformers.Qwen2VLImageProcessorPil()

    processor = Processor()
    data = DataSpec.model_validate({"train": "/x.tar", "max_pixels": 64 * 28 * 28})
    limited = with_pixel_limits(processor, data)
    from PIL import Image

    grids = [each.image_processor([Image.new("RGB", (2000, 1000))])["image_grid_thw"] for each in (processor, limited)]
    tokens = [int(grid.prod()) // 4 for grid in grids]
    assert tokens[1] <= 64 < tokens[0]
    with pytest.raises(SpecError, match=r"data\.min_pixels 99999999 is above"):
        with_pixel_limits(processor, DataSpec.model_validate({"train": "/x.tar", "min_pixels": 99_999_999}))


def test_pixel_limits_of_a_family_without_them_are_an_error():
    with pytest.raises(SpecError, match="CLIPImageProcessorPil has none"):
        view(CHAT_TEMPLATE, tiny_processor, max_pixels=1000)
    with pytest.raises(ValueError, match="min_pixels 9 is above max_pixels 8"):
        DataSpec.model_validate({"train": "/x.tar", "min_pixels": 9, "max_pixels": 8})
