"""Control tokens in the text of data: none of them is learned unless a spec keeps it."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from betakd_ray.data.render import Renderer, Unrenderable
from betakd_ray.data.samples import RawSample
from betakd_ray.errors import SpecError
from betakd_ray.spec import DataSpec, parse_spec
from tests.tiny import BOS, CHAT_TEMPLATE, EOS, IDS, IMAGE, raw_sample, tiny_processor, tiny_tokenizer

TEMPLATES = ("vicuna_v1", "chat", "plain")


def view(processor, **options):
    return Renderer(processor, DataSpec.model_validate({"train": "/x.tar", **options}))


def turns(*texts):
    who = ("human", "gpt")
    conversation = [{"from": who[at % 2], "value": text} for at, text in enumerate(texts)]
    return RawSample("k", 0, "k", conversation, raw_sample(0, "", has_image=True).images * "".join(texts).count(IMAGE))


def with_tokens(*tokens, normalizer=None, **options):
    """Return the tiny tokenizer with added tokens that are not special."""
    tokenizer = tiny_tokenizer(**options)
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.add_tokens(list(tokens))
    return tokenizer


# ---- what is refused ---------------------------------------------------------------------------------------------

REFUSED = {
    "an answer's end": (EOS, ("What?", "yes</s>")),
    "an answer's start": (BOS, ("What?", "<s>yes")),
    "the middle of an answer": (EOS, ("What?", "one</s>two")),
    "an answer before the last": (EOS, ("What?", "yes</s>", "And now?", "no")),
    "an answer to an image": (EOS, (f"{IMAGE}\nWhat?", "yes </s>")),
    "padding": ("<pad>", ("What?", "<pad><pad>yes")),
}


@pytest.mark.parametrize("method", ["render", "prompt"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("case", REFUSED)
def test_an_answer_with_a_control_token_is_refused(case, template, method):
    token, texts = REFUSED[case]
    with pytest.raises(Unrenderable, match=f"contains the control token '{token}'.* data.special_tokens"):
        getattr(view(tiny_processor(), template=template), method)(turns(*texts))


@pytest.mark.parametrize("template", ["vicuna_v1", "chat"])
@pytest.mark.parametrize(
    "question", ["</s>Which?", f"{IMAGE} Which?</s>", f"</{IMAGE}s> Which?", f"Which? </{IMAGE}{IMAGE}s>"]
)
def test_a_question_with_a_control_token_is_refused_also_if_an_image_is_inside(template, question):
    with pytest.raises(Unrenderable, match="contains the control token '</s>'"):
        view(tiny_processor(), template=template).render(turns(question, "yes"))


def test_a_control_token_in_two_turns_that_a_template_joins_is_refused():
    joining = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = tiny_tokenizer(chat_template=joining)
    with pytest.raises(Unrenderable, match="contains the control token '</s>'"):
        view(tokenizer, template="chat").render(turns("Which? </", "s> yes"))
    view(tokenizer, template="chat").render(turns("Which? </", "p> yes"))


def test_a_model_s_own_image_token_in_a_text_stands_for_no_image():
    processor = tiny_processor()
    assert view(processor).render(turns(f"{IMAGE} Which?", "yes")).pixels is not None
    with pytest.raises(Unrenderable, match="1 <image> placeholders, but 0 images"):
        view(processor).render(RawSample("k", 0, "k", turns("a <image>", "yes").conversation, []))


@pytest.mark.parametrize("template", TEMPLATES)
def test_text_that_only_looks_like_a_control_token_is_rendered(template):
    view(tiny_processor(), template=template).render(turns("</ s> <s/> s>", "</", "<|im_end|>", "a < b > c </S>"))


@pytest.mark.parametrize("template", TEMPLATES)
def test_blank_turns_are_no_fault(template):
    view(tiny_processor(), template=template).render(turns("", " ", IMAGE, "yes", "Now?", "no"))


# ---- which tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["<|tool_call|>", "<\uff5cend\u2581of\u2581turn\uff5c>", "<|im_end|>"])
def test_an_added_token_between_bars_is_a_control_token_though_it_is_not_special(token):
    with pytest.raises(Unrenderable, match="contains the control token"):
        view(with_tokens(token)).render(turns("Which?", f"yes {token}"))


@pytest.mark.parametrize("token", ["<b>", "   ", "photosynthesis", "\n\n", "user"])
def test_an_added_token_may_be_ordinary_text(token):
    tokenizer = with_tokens(token)
    rendering = view(tokenizer, template="chat").render(turns(f"Which {token}?", f"yes{token}no"))
    assert tokenizer.convert_tokens_to_ids(token) in rendering.input_ids[rendering.answer_mask]


def test_an_added_token_that_the_chat_template_writes_is_a_control_token_where_it_is_used():
    tokenizer = with_tokens("<think>", chat_template=CHAT_TEMPLATE + "{# <think> #}")
    with pytest.raises(Unrenderable, match="contains the control token '<think>'"):
        view(tokenizer, template="chat").render(turns("Which?", "<think>yes"))
    view(tokenizer).render(turns("Which?", "<think>yes"))
    tokenizer.chat_control_tokens = ["<think>"]
    with pytest.raises(Unrenderable, match="contains the control token '<think>'"):
        view(tokenizer).render(turns("Which?", "<think>yes"))


def test_a_token_that_a_tokenizer_normalises_is_found_in_any_case_and_width():
    any_case = with_tokens(AddedToken("<|end|>", normalized=True), normalizer=normalizers.Lowercase())
    with pytest.raises(Unrenderable, match=r"contains the control token '<\|end\|>'"):
        view(any_case).render(turns("Which?", "yes <|END|>"))
    any_width = with_tokens(AddedToken("<|end|>", normalized=True), normalizer=normalizers.NFKC())
    with pytest.raises(Unrenderable, match=r"contains the control token '<\|end\|>'"):
        view(any_width).render(turns("Which?", "yes \uff1c|end|\uff1e"))


@pytest.mark.parametrize("side", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_a_token_that_takes_the_spaces_around_it_is_found(side):
    with pytest.raises(Unrenderable, match=r"contains the control token '<\|end\|>'"):
        view(with_tokens(AddedToken("<|end|>", **side))).render(turns("Which?", "yes  <|end|>  no"))


def of_pieces():
    """Return a tokenizer in the manner of SentencePiece: `▁` for a space, `<unk>` for what the vocabulary lacks."""
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyzUSERASSISTANT:?.</>'"]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in dict.fromkeys(letters))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_character_that_the_vocabulary_lacks_is_no_control_token(template):
    tokenizer = of_pieces()
    rendering = view(tokenizer, template=template).render(turns("which?", "yes \u4e2d\u6587"))
    assert tokenizer.unk_token_id in rendering.input_ids[rendering.answer_mask]
    for token in ("<unk>", "</s>", "<s>"):
        with pytest.raises(Unrenderable, match=f"contains the control token '{token}'"):
            view(tokenizer, template=template).render(turns("which?", f"{token}yes \u4e2d"))


# ---- what a spec keeps -------------------------------------------------------------------------------------------


def test_what_is_allowed_is_a_token_as_before():
    rendering = view(tiny_processor(), special_tokens="allow").render(turns("Which?", "yes</s>"))
    assert (rendering.input_ids == IDS[EOS]).sum() == 2
    some = view(tiny_processor(), special_tokens=["</s>"])
    assert some.render(turns("Which?", "yes</s>")).input_ids.tolist() == rendering.input_ids.tolist()
    with pytest.raises(Unrenderable, match="contains the control token '<pad>'"):
        some.render(turns("Which?", "yes</s><pad>"))


def test_a_system_prompt_with_a_control_token_is_refused_with_the_spec():
    with pytest.raises(SpecError, match=r"data\.system_prompt: the text contains the control token '</s>'"):
        view(tiny_processor(), system_prompt="Be short.</s>")
    view(tiny_processor(), system_prompt="Be short.</s>", special_tokens=["</s>"])


@pytest.mark.parametrize("wrong", ["refues", 3, [3]])
def test_another_word_for_what_is_kept_is_refused(wrong):
    with pytest.raises(SpecError, match=r"special_tokens.*expected (refuse or allow|a text)"):
        parse_spec({"train": "/x.tar", "special_tokens": wrong}, DataSpec)


def test_a_setting_survives_the_spec_that_a_run_stores():
    for kept in ("refuse", "allow", ("</s>", "<think>")):
        spec = DataSpec(train=("/x.tar",), special_tokens=kept)  # type: ignore[arg-type]
        assert DataSpec.model_validate(json.loads(spec.model_dump_json())) == spec


def test_refusing_keeps_the_fingerprint_of_earlier_caches_and_allowing_changes_it():
    # As computed before the setting was there.
    assert view(tiny_processor()).fingerprint == "2d30f78634cd85e0"
    assert view(tiny_tokenizer(), template="chat").fingerprint == "d60995b967c3a075"
    kept = ["refuse", "allow", ["</s>"], ["<s>"]]
    assert len({view(tiny_processor(), special_tokens=value).fingerprint for value in kept}) == len(kept)


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_not_refused_is_rendered_alike_whatever_is_kept(template):
    sample = turns(f"{IMAGE} Which?", "yes", "And < now?", "no")
    one, other = (
        view(tiny_processor(), template=template, special_tokens=kept).render(sample) for kept in ("refuse", "allow")
    )
    assert np.array_equal(one.input_ids, other.input_ids)
    assert np.array_equal(one.answer_mask, other.answer_mask)
