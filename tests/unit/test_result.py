"""A result of each family, asked by plain transformers in a process of its own: the answers of our evaluation."""

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from betakd_ray.data.render import Renderer
from betakd_ray.models.padding import backend
from betakd_ray.spec import DataSpec
from tests.families import FAMILIES, build, text_config
from tests.results import evaluated, plain_answers, samples, write_result
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

pytestmark = pytest.mark.timeout(1800)
TEXT = ("text", "text_vicuna")
MANY = ("llava", "qwen2_5_vl", "text")
SETTINGS = {"smolvlm": {"system_prompt": "Be brief."}, "qwen2_5_vl": {"max_pixels": 1200}}
"""Further settings of `data`, by family."""


def language_model() -> PreTrainedModel:
    tree = text_config()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(tree.pop("model_type"), **tree))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    return model.eval()


class Made:
    """A result, and how it was trained."""

    def __init__(self, home: Path, name: str) -> None:
        self.sees = name not in TEXT
        family = FAMILIES.get(name)
        template = family.template if family else {"text": "chat", "text_vicuna": "vicuna_v1"}[name]
        self.data = {"template": template, **SETTINGS.get(name, {})}
        make = family.processor if family else tiny_tokenizer
        self.folder = write_result(
            home / name, build(family.config()) if family else language_model(), make(), self.data
        )
        # Its own processor, as in training, and not the one that was saved.
        self.renderer = Renderer(make(), DataSpec.model_validate({"train": "/x.tar", **self.data}))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


def test_a_result_of_a_named_template_has_it_as_its_default_and_under_its_name(tmp_path: Path) -> None:
    own = tiny_tokenizer()
    own.chat_template = {"default": "{{ messages[0]['content'] }}", "terse": CHAT_TEMPLATE}
    data = {"template": "chat", "chat_template": "terse"}
    folder = write_result(tmp_path / "text", language_model(), own, data)
    (sample,) = samples(1, images=False)
    saved = AutoTokenizer.from_pretrained(folder)
    for settings in (data, {"template": "chat"}):
        renderer = Renderer(saved, DataSpec.model_validate({"train": "/x.tar", **settings}))
        assert saved.decode(renderer.prompt(sample).input_ids).endswith("<|assistant|>\n")
    messages = [{"role": "user", "content": "Why?"}]
    assert saved.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).endswith("<|assistant|>\n")


def compare(made: dict[str, Made], count: int) -> None:
    asked = {each.folder: (each.sees, samples(count, images=each.sees)) for each in made.values()}
    kinds = {backend(each.renderer.image_processor) for each in made.values() if each.sees}
    (kind,) = kinds or {"pil"}
    found = plain_answers(asked, kind)
    for name, each in made.items():
        _, conversations = asked[each.folder]
        expected = evaluated(each.folder, each.renderer, conversations)
        prompts = [each.renderer.prompt(sample).input_ids.tolist() for sample in conversations]
        assert [tokens for _, tokens in found[each.folder]] == prompts, name
        assert [text for text, _ in found[each.folder]] == expected, name
        assert len(set(expected)) > min(count, 40) // 4, f"{name}: the questions should have different answers"


def test_plain_transformers_gives_the_answers_of_our_evaluation(home: Path) -> None:
    compare({name: Made(home, name) for name in (*FAMILIES, *TEXT)}, count=9)


@pytest.mark.slow
def test_plain_transformers_gives_the_answers_of_our_evaluation_to_200_questions(home: Path) -> None:
    compare({name: Made(home / "many", name) for name in MANY}, count=200)
