"""The chat template of a result makes the prompts of training, token for token, in transformers' own hands."""

import datetime
import io
import random
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from betakd_ray.data import saved_prompt
from betakd_ray.data.render import Renderer
from betakd_ray.data.samples import RawSample
from betakd_ray.data.saved_prompt import messages_of, saved_template
from betakd_ray.data.saved_template import literal
from betakd_ray.data.template_process import render_template
from betakd_ray.spec import DataSpec
from betakd_ray.spec.data import TEMPLATES
from tests.families import FAMILIES
from tests.tiny import CHAT_TEMPLATE, IMAGE, tiny_processor, tiny_tokenizer

TEXTS = ("What?", " Why so?  ", "Ünïcode 😀\n\nand\ttabs", "'quoted' \\ {{ braces }} {% raw %}", "a", "Is it 1 or 2?")
SYSTEMS = (None, "", "Be brief.", "Say 'it' — with \\ and\n\"quotes\" 😀.")
TODAY = "{{ 'Today is ' + strftime_now('%d %b %Y') + '. ' }}"
PARTS = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def data_of(template: str, **settings: Any) -> DataSpec:
    return DataSpec.model_validate({"train": "/x.tar", "template": template, **settings})


def conversations(count: int, *, images: bool) -> list[RawSample]:
    """Return different conversations of one to four questions, with images in any of them."""
    generator = random.Random(count)
    made = []
    for number in range(count):
        turns, pictures = [], []
        for _ in range(generator.randint(1, 4)):
            shown = generator.choice((0, 0, 1, 2)) if images else 0
            words = " ".join(generator.choices(TEXTS, k=generator.randint(1, 3)))
            turns.append({"from": "human", "value": f"{IMAGE}\n" * shown + words})
            turns.append({"from": "gpt", "value": generator.choice(TEXTS)})
            for _ in range(shown):
                buffer = io.BytesIO()
                Image.new("RGB", (generator.randint(8, 60), generator.randint(8, 60)), "red").save(buffer, "PNG")
                pictures.append(buffer.getvalue())
        made.append(RawSample(str(number), number, str(number), turns, pictures))
    return made


def assert_same_prompts(processor: Any, data: DataSpec, *, images: bool, count: int = 40) -> None:
    renderer = Renderer(processor, data)
    template = saved_template(renderer, data)
    assert template is not None
    for sample in conversations(count, images=images):
        pictures = [Image.open(io.BytesIO(each)) for each in sample.images]
        messages = messages_of(sample.conversation[:-1], pictures, in_parts=renderer.image_processor is not None)
        options = {"chat_template": template, "add_generation_prompt": True, "tokenize": True, "return_dict": True}
        found = processor.apply_chat_template(messages, **options)["input_ids"]
        found = found[0] if isinstance(found[0], list) else found
        assert list(found) == renderer.prompt(sample).input_ids.tolist(), sample.conversation


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("template", ["vicuna_v1", "plain"])
def test_our_templates_are_the_same_in_transformers(template: str, system: str | None) -> None:
    data = data_of(template, system_prompt=system)
    assert_same_prompts(tiny_processor(chat_template=None), data, images=True)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("template", ["vicuna_v1", "chat"])
def test_so_they_are_for_text_alone_where_transformers_adds_no_special_tokens(
    template: str, system: str | None
) -> None:
    assert_same_prompts(tiny_tokenizer(), data_of(template, system_prompt=system), images=False)


@pytest.mark.parametrize("system", [None, "Be 'brief'."])
@pytest.mark.parametrize("family", [name for name, each in FAMILIES.items() if each.template == "chat"])
def test_a_model_s_own_template_keeps_the_system_prompt_of_training(family: str, system: str | None) -> None:
    processor = FAMILIES[family].processor()
    if getattr(processor, "video_processor", 0) is None:  # SmolVLM's template asks it for two numbers
        processor.video_processor = SimpleNamespace(num_frames=1, fps=1)
    assert_same_prompts(processor, data_of("chat", system_prompt=system), images=True, count=8)


def test_a_template_is_unchanged_if_nothing_is_missing() -> None:
    processor = FAMILIES["qwen2_5_vl"].processor()
    data = data_of("chat")
    assert saved_template(Renderer(processor, data), data) == processor.chat_template


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("own", [CHAT_TEMPLATE, TODAY + CHAT_TEMPLATE, PARTS, "{{ bos_token }}" + PARTS])
def test_what_a_model_s_own_template_lacks_is_added(own: str, system: str | None) -> None:
    """Parts for a template that takes strings; the day of training; no space at the end of a prompt."""
    data = data_of("chat", system_prompt=system, template_date=datetime.date(2023, 12, 24))
    processor = tiny_processor(chat_template=own)
    template = saved_template(Renderer(processor, data), data)
    assert template
    messages = [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    shown = {
        render_template(template, messages, processor.tokenizer.special_tokens_map, day, generation=True)
        for day in (datetime.date(2024, 1, 1), datetime.date(2031, 5, 6))
    }
    assert len(shown) == 1
    assert ("24 Dec 2023" in shown.pop()) == (own.startswith("{{ 'Today"))
    if "strftime_now" not in own:  # transformers alone would write today's date in the comparison
        assert_same_prompts(processor, data, images=True, count=15)


UNCLOSED = CHAT_TEMPLATE.replace("</s>", "")
THINKING = "{{ 'think. ' if enable_thinking else 'answer. ' }}" + CHAT_TEMPLATE
STRICT = (
    "{% if enable_thinking is defined and enable_thinking == false %}{{ 'no thoughts. ' }}{% endif %}" + CHAT_TEMPLATE
)


@pytest.mark.parametrize("own", [THINKING, STRICT])
@pytest.mark.parametrize(
    "arguments", [{"enable_thinking": False}, {"enable_thinking": "o'no"}, {"enable_thinking": [1, {"a": None}]}]
)
def test_the_arguments_of_training_are_kept(own: str, arguments: Any) -> None:
    processor = tiny_processor(chat_template=own)
    assert_same_prompts(processor, data_of("chat", template_arguments=arguments), images=True, count=8)


def test_the_template_is_that_which_the_spec_names() -> None:
    processor = tiny_processor(chat_template=None)
    processor.chat_template = {"default": PARTS, "terse": CHAT_TEMPLATE, "rag": TODAY + PARTS}
    assert_same_prompts(processor, data_of("chat", chat_template="terse"), images=True, count=8)
    assert_same_prompts(processor, data_of("chat"), images=True, count=8)


@pytest.mark.parametrize("own", [UNCLOSED, PARTS.replace("{{ '</s>' }}", "")])
def test_a_template_that_closes_no_answer_closes_them_as_in_training(own: str) -> None:
    assert "eos_token" not in own
    assert "</s>" not in own
    assert_same_prompts(tiny_processor(chat_template=own), data_of("chat"), images=True)


def metaspace_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that marks the beginning of a word, in one of the ways in which Llama's do."""
    letters = {chr(code): at + 3 for at, code in enumerate([*range(32, 127), 9601])}
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **letters}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_the_first_word_has_the_token_that_it_had_in_training(scheme: str) -> None:
    assert_same_prompts(metaspace_tokenizer(scheme), data_of("vicuna_v1"), images=False)


# ------------------------------------------------------------------------------------------ templates of the user's


def described(turns: Any, system: Any, eos: str) -> Any:
    for turn in turns:
        yield (f"Q {turn['value'].strip()} A ", False) if turn["from"] == "human" else (turn["value"] + eos, True)


def undescribed(turns: Any, system: Any, eos: str) -> Any:
    yield from described(turns, system, eos)


OWN = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'Q ' + message['content'] + ' A' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
described.chat_template = OWN  # type: ignore[attr-defined]


def test_a_function_of_the_user_s_can_bring_its_chat_template() -> None:
    assert_same_prompts(tiny_tokenizer(), data_of(f"{__name__}:described"), images=False)


@pytest.mark.parametrize("own", [None, OWN.replace("Q ", "R "), "{{ 1 / 0 }}", "{% broken"])
def test_a_chat_template_that_makes_other_prompts_is_not_saved(own: str | None, monkeypatch: Any) -> None:
    monkeypatch.setattr(undescribed, "chat_template", own, raising=False)
    data = data_of(f"{__name__}:undescribed")
    assert saved_template(Renderer(tiny_tokenizer(), data), data) is None


# ------------------------------------------------------------------------------------------ parts


def test_every_template_has_a_saved_form() -> None:
    for name in TEMPLATES:
        data = data_of(name)
        assert saved_template(Renderer(tiny_processor(), data), data)


@pytest.mark.parametrize("text", [*TEXTS, "", "\\n", "'", "''\\'", "\u2028", "\x00"])
def test_a_literal_is_its_text(text: str) -> None:
    day = datetime.date(2024, 1, 1)
    assert render_template(f"{{{{ {literal(text)} }}}}", [], {}, day, generation=False) == text


def test_the_comparison_is_made_on_several_turns_and_images() -> None:
    assert any(len(questions) > 1 for questions in saved_prompt.QUESTIONS)
    assert any(questions[0].count(IMAGE) > 1 for questions in saved_prompt.QUESTIONS)
    assert any(IMAGE in question for questions in saved_prompt.QUESTIONS for question in questions[1:])
