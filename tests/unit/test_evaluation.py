import io

import numpy as np
import pytest
import torch
from PIL import Image

from betakd_ray.batch.images import Normalization
from betakd_ray.data.render import Renderer
from betakd_ray.data.shards import BadSample, RawSample
from betakd_ray.evaluation.exact_match import Record, agreement, score
from betakd_ray.evaluation.generate import answers, pad_left
from betakd_ray.spec import DataSpec
from tests.tiny import tiny_model, tiny_processor

NEW_TOKENS = 8


# ------------------------------------------------------------------------------------------------ exact match


@pytest.mark.parametrize("text", ["circle", "Circle", "CIRCLE.", " circle. "])
def test_case_and_a_final_stop_do_not_matter(text):
    assert score([Record(text, "Circle.")])["accuracy"] == 1


@pytest.mark.parametrize("text", ["", "a circle", "circle..", None])
def test_anything_else_is_wrong(text):
    assert score([Record(text, "circle")])["accuracy"] == 0


def test_accuracy_is_told_overall_and_by_type():
    records = [
        Record("yes", "yes", "yes/no"),
        Record("no", "yes", "yes/no"),
        Record("red", "red", "open"),
        Record("red", "red"),
    ]
    assert score(records) == {
        "accuracy": 0.75,
        "accuracy[open]": 1.0,
        "accuracy[yes/no]": 0.5,
        "unanswerable": 0.0,
    }


def test_the_unanswerable_are_wrong_and_counted():
    assert score([Record(None, None), Record(None, ""), Record("", "")]) == {"accuracy": 1 / 3, "unanswerable": 2.0}


def test_no_answers_have_no_accuracy():
    with pytest.raises(ValueError, match="no answers"):
        score([])


def test_agreement_is_the_share_of_equal_answers():
    assert agreement(["yes", "Red.", "no", None], ["yes", "red", "yes", None]) == 0.5


# ------------------------------------------------------------------------------------------------- generation


@pytest.fixture
def renderer():
    return Renderer(tiny_processor(), DataSpec(train="unused.tar", system_prompt=""))


@pytest.fixture
def model():
    """Large weights: with the usual ones every question would have the same answer."""
    model = tiny_model()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= 25
    return model


def sample(index, question, colour=None):
    buffer = io.BytesIO()
    if colour:
        Image.new("RGB", (40, 24), colour).save(buffer, "PNG")
    head = "<image>\n" if colour else ""
    conversation = [{"from": "human", "value": head + question}, {"from": "gpt", "value": "Blue."}]
    return RawSample(str(index), index, str(index), conversation, [buffer.getvalue()] if colour else [])


SAMPLES = [
    sample(0, "What colour is the shape?", "red"),
    sample(1, "Why?"),
    sample(2, "Is it a circle?", "blue"),
    sample(3, "Is there anything else that you would like to say?"),
    sample(4, "Hm?", "green"),
]


def alone(model, renderer, asked):
    """One prompt without padding, straight through transformers."""
    prompt = renderer.prompt(asked)
    normalize = Normalization.of(renderer.image_processor)
    pixels = {} if prompt.pixels is None else {"pixel_values": normalize(torch.from_numpy(prompt.pixels), model.dtype)}
    ids = torch.from_numpy(prompt.input_ids.astype(np.int64))[None]
    tokens = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, **pixels
    )
    return renderer.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_a_batch_answers_as_its_samples_alone(model, renderer, batch_size):
    single = [alone(model, renderer, each) for each in SAMPLES]
    assert len(set(single)) == len(SAMPLES), "the questions should have different answers, or order is not tested"
    batched = answers(model, renderer, SAMPLES, batch_size=batch_size, max_new_tokens=NEW_TOKENS)
    assert list(batched) == single


def test_the_processors_own_pixels_give_the_same_answer(model, renderer):
    renderer.pad_to_square = False
    asked = SAMPLES[0]
    inputs = renderer.processor(
        text=f"USER: {asked.conversation[0]['value']} ASSISTANT:",
        images=Image.open(io.BytesIO(asked.images[0])),
        return_tensors="pt",
    )
    inputs.pop("token_type_ids", None)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    expected = renderer.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert list(answers(model, renderer, [asked], batch_size=1, max_new_tokens=NEW_TOKENS)) == [expected]


def test_what_cannot_be_asked_is_none_in_its_place(model, renderer):
    broken = RawSample("b", 1, "b", SAMPLES[0].conversation, [b"no image"])
    bad = BadSample("c", 2, "no answer")
    mixed = [SAMPLES[0], broken, bad, SAMPLES[1], bad]
    texts = list(answers(model, renderer, mixed, batch_size=4, max_new_tokens=NEW_TOKENS))
    expected = [alone(model, renderer, SAMPLES[0]), None, None, alone(model, renderer, SAMPLES[1]), None]
    assert texts == expected


def test_an_image_after_the_last_question_cannot_be_asked_about(model, renderer):
    late = [{"from": "human", "value": "Draw it."}, {"from": "gpt", "value": "<image>"}]
    asked = RawSample("d", 0, "d", late, SAMPLES[0].images)
    assert list(answers(model, renderer, [asked], batch_size=1, max_new_tokens=NEW_TOKENS)) == [None]


def test_padding_is_on_the_left_and_masked(renderer):
    prompts = [renderer.prompt(each) for each in SAMPLES[:2]]
    input_ids, attention_mask = pad_left(prompts, renderer.pad_token_id)
    for row, prompt in enumerate(prompts):
        padding = input_ids.shape[1] - len(prompt.input_ids)
        assert (input_ids[row, :padding] == renderer.pad_token_id).all()
        assert attention_mask[row].tolist() == [0] * padding + [1] * len(prompt.input_ids)
        assert (input_ids[row, padding:] == prompt.input_ids).all()
