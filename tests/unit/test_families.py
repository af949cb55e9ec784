"""Each family of vision–language models: rendered as its own processor does, run as its own forward does."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from betakd_ray.batch.inputs import TensorInputs
from betakd_ray.batch.normalization import Normalization
from betakd_ray.batch.packing import stack
from betakd_ray.batch.processing import ImageProcessing
from betakd_ray.data.render import Renderer
from betakd_ray.data.rows import samples_of
from betakd_ray.data.samples import RawSample
from betakd_ray.evaluation.generate import answers
from betakd_ray.models.vlm import hidden_rows, lm_head, part_parameters, parts
from betakd_ray.spec import DataSpec
from tests.families import FAMILIES, build
from tests.tiny import IMAGE
from tests.unit.test_rows import assert_same_inputs, table

CPU = torch.device("cpu")
CONVERSATIONS = {
    "one": [(f"What is it?\n{IMAGE}", "A red circle.")],
    "text": [("Say yes.", "yes")],
    "several turns": [(f"{IMAGE}\nWhat colour?", "Blue, ünïcode."), ("And now?", "Still blue"), (f"{IMAGE}", "no")],
    "two at once": [(f"{IMAGE}\n{IMAGE}\nSame?", "not the same"), ("Sure?", "yes")],
    "another": [(f"{IMAGE} Which?", "The square is blue, yes.")],
}
SIZES = {
    "one": [(20, 12)],
    "text": [],
    "several turns": [(40, 15), (9, 33)],
    "two at once": [(16, 16), (64, 20)],
    "another": [(31, 62)],
}
"""Sizes of the images of each sample, as (width, height) in pixels."""
OF_TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(family):
    return build(family.config())


@pytest.fixture(scope="module")
def renderer(family):
    return Renderer(
        family.processor(),
        DataSpec.model_validate(
            {"train": "/x.tar", "template": family.template, "system_prompt": "" if family.template != "chat" else None,
             "pad_to_square": False}
        ),
    )  # fmt: skip


def pictures(name):
    generator = np.random.default_rng(len(name))
    return [
        Image.fromarray(generator.integers(0, 256, (height, width, 3)).astype(np.uint8))
        for width, height in SIZES[name]
    ]


def sample(name):
    images = []
    for picture in pictures(name):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        images.append(buffer.getvalue())
    turns = []
    for question, answer in CONVERSATIONS[name]:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return RawSample(key=name, index=0, id=name, conversation=turns, images=images)


def its_own(family, processor, name):
    """Return the processor's own output for a sample, and which tokens are answers, found character by character."""
    pieces = list(family.pieces(CONVERSATIONS[name]))
    text = "".join(piece for piece, _ in pieces)
    options = {"return_text_replacement_offsets": True, "return_tensors": "pt"}
    inputs = processor(text=[text], images=[pictures(name)] if SIZES[name] else None, **options)
    learned = [flag for piece, flag in pieces for _ in piece]
    replaced = inputs.pop("text_replacement_offsets", [[]])
    for each in reversed(replaced[0] if SIZES[name] else []):
        start, end = each["span"]
        text = text[:start] + each["replacement"] + text[end:]
        learned[start:end] = [False] * len(each["replacement"])
    encoded = processor.tokenizer(text, return_offsets_mapping=True)
    assert encoded["input_ids"] == inputs["input_ids"][0].tolist()
    return inputs, [any(learned[start:end]) for start, end in encoded["offset_mapping"]]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_rendering_is_what_the_processor_makes_and_learns_the_answers_alone(family, renderer, name):
    rendering = renderer.render(sample(name))
    inputs, learned = its_own(family, renderer.processor, name)
    assert rendering.input_ids.tolist() == inputs["input_ids"][0].tolist()
    assert rendering.answer_mask.tolist() == learned
    assert any(learned)
    assert bool(rendering.images) == bool(SIZES[name])
    if not rendering.images:
        return
    assert rendering.images["pixel_values"].dtype == np.uint8
    pixels = Normalization.of(renderer.image_processor).of_images(tensors(rendering.images), torch.float32)
    torch.testing.assert_close(crops(pixels["pixel_values"]), crops(inputs["pixel_values"]), rtol=1e-5, atol=1e-5)


def tensors(images):
    return {name: torch.from_numpy(array) for name, array in images.items()}


def crops(pixels):
    """Return the crops without the padding that gives each image, or each sample, the same number of them."""
    flat = pixels.float().flatten(0, 1) if pixels.ndim == 5 else pixels.float()
    return flat[flat.flatten(1).any(1)]


def own_logits(model, inputs, rows):
    with torch.no_grad():
        return model(**inputs).logits[0, rows]


@pytest.fixture(scope="module")
def batch(renderer):
    return stacked(renderer, *CONVERSATIONS)


def stacked(renderer, *names):
    renderings = [renderer.render(sample(name)) for name in names]
    return stack(renderings, renderer.pad_token_id, renderer.image_token_id)


def run(model, renderer, inputs, blank=None):
    return hidden_rows(model, TensorInputs.of(inputs, CPU), Normalization.of(renderer.image_processor), blank)


def test_logits_at_answer_rows_are_those_of_the_model_s_own_forward(family, renderer, model, batch):
    with torch.no_grad():
        hidden = run(model, renderer, batch)
        found = lm_head(model)(hidden.rows)
    expected = []
    for name in CONVERSATIONS:
        inputs, learned = its_own(family, renderer.processor, name)
        rows = [at - 1 for at, is_answer in enumerate(learned) if is_answer and at]
        expected.append(own_logits(model, inputs, rows))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert found.std() > 0.1
    assert hidden.visual is not None
    assert len(hidden.visual) == len(batch.visual_sample)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 2), (1, 4), (2, 5)])
def test_a_part_of_a_batch_has_the_states_that_it_has_in_the_whole(renderer, model, batch, start, stop):
    with torch.no_grad():
        whole, part = (
            run(model, renderer, batch),
            run(model, renderer, stacked(renderer, *[*CONVERSATIONS][start:stop])),
        )
    of_part = (batch.row_sample >= start) & (batch.row_sample < stop)
    torch.testing.assert_close(part.rows, whole.rows[of_part], rtol=1e-5, atol=1e-5)
    visual = whole.visual[(batch.visual_sample >= start) & (batch.visual_sample < stop)]
    if len(visual):
        torch.testing.assert_close(part.visual, visual, rtol=1e-5, atol=1e-5)
    else:
        assert part.visual is None


def test_a_blank_batch_has_states_of_the_same_shapes_which_tell_nothing(renderer, model, batch):
    with torch.no_grad():
        whole, blank = run(model, renderer, batch), run(model, renderer, batch.blank())
    assert blank.rows.shape == whole.rows.shape
    assert blank.visual.shape == whole.visual.shape
    assert blank.rows.isfinite().all()


def test_images_pass_through_arrow_as_they_are(renderer, batch):
    renderings = [renderer.render(sample(name)) for name in CONVERSATIONS]
    through = [sample.student for sample in samples_of(table(renderings))]
    assert_same_inputs(stack(through, renderer.pad_token_id, renderer.image_token_id), batch)


def test_every_parameter_belongs_to_one_part(model):
    owned = part_parameters(model)
    assert sorted(id(each) for part in owned.values() for each in part) == sorted(map(id, model.parameters()))
    assert all(owned.values())
    assert any(each is lm_head(model).weight for each in owned["language_model"])
    projected = {id(each) for each in owned["projector"]}
    assert {id(each) for module in parts(model)["projector"] for each in module.parameters()} <= projected


def test_text_alone_and_a_blank_image_reach_the_parameters_that_images_reach(renderer, model):
    """Otherwise ranks would disagree about which gradients there are."""
    reached = []
    for name in ("two at once", "text"):
        model.zero_grad()
        blank = tensors(ImageProcessing(renderer.processor).blank())
        run(model, renderer, stacked(renderer, name), blank).rows.sum().backward()
        reached.append([key for key, each in model.named_parameters() if each.grad is not None])
    model.zero_grad()
    of_one_image = set(reached[0]) ^ set(reached[1])
    assert not {key for key in of_one_image if "image_newline" not in key}


def test_greedy_answers_are_those_of_the_model_s_own_generate(family, renderer, model):
    names = list(CONVERSATIONS)
    found = list(answers(model, renderer, map(sample, names), batch_size=len(names), max_new_tokens=6))
    for name, text in zip(names, found, strict=True):
        inputs, learned = its_own(family, renderer.processor, name)
        last = max(at for at in range(len(learned)) if learned[at] and not learned[at - 1])
        cut = {
            key: inputs[key][:, :last] for key in inputs if key in ("input_ids", "attention_mask", "mm_token_type_ids")
        }
        config = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": renderer.tokenizer.eos_token_id}
        with torch.no_grad():
            tokens = model.generate(**{**inputs, **cut}, **config, pad_token_id=renderer.pad_token_id)[0, last:]
        assert text == renderer.tokenizer.decode(tokens, skip_special_tokens=True).strip()
