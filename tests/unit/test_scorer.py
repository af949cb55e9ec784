"""The teacher's answer to a micro-batch, against the model's own full forward."""

import math
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from betakd_ray.batch.images import Normalization
from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.packing import stack
from betakd_ray.data.render import Renderer
from betakd_ray.errors import ModelError
from betakd_ray.models.load import load_model, load_processor
from betakd_ray.models.vlm import lm_head
from betakd_ray.spec import DataSpec, ModelSpec, TeacherSpec
from betakd_ray.teacher.scorer import TeacherScorer
from betakd_ray.teacher.signal import Needs
from tests.tiny import VOCAB, raw_sample, save_tiny

CPU = torch.device("cpu")
EVERYTHING = Needs(hidden=True, visual=True, features=("teacher_vision", "teacher_answer", "teacher_entropy"))
IMAGES = [True, False, True]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("teacher"), seed=4)


@pytest.fixture(scope="module")
def renderings(folder):
    renderer = Renderer(load_processor(ModelSpec(path=folder)), DataSpec(train=("unused",)))
    answers = ["It is " + "so " * 3 * number + "." for number in range(len(IMAGES))]
    samples = (
        raw_sample(number, answer, has_image=has_image)
        for number, (answer, has_image) in enumerate(zip(answers, IMAGES, strict=True))
    )
    return renderer, [renderer.render(sample) for sample in samples]


@pytest.fixture(scope="module")
def inputs(renderings) -> ModelInputs:
    renderer, found = renderings
    return stack(found, renderer.pad_token_id, renderer.image_token_id)


@pytest.fixture(scope="module")
def logits(folder, renderings):
    """[answer rows, V], each sample through the whole model alone, without padding."""
    renderer, found = renderings
    model = load_model(ModelSpec(path=folder), torch.float32)
    rows = []
    for one in found:
        pixels = None
        if one.pixels is not None:
            mean, std = (
                torch.tensor(values)[:, None, None]
                for values in (renderer.image_processor.image_mean, renderer.image_processor.image_std)
            )
            pixels = (torch.from_numpy(one.pixels) / 255 - mean) / std
        ids = torch.from_numpy(one.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            whole = model(input_ids=ids, pixel_values=pixels).logits[0]
        rows += [whole[n - 1] for n in np.flatnonzero(one.answer_mask)]
    return torch.stack(rows)


def test_hidden_rows_and_head_give_the_model_s_own_logits(folder, inputs, logits):
    teacher = TeacherScorer(TeacherSpec(path=folder), EVERYTHING)
    facts, signal = teacher.facts(), teacher.score(inputs)
    assert signal.hidden
    assert facts.head
    torch.testing.assert_close(signal.hidden.tensor(CPU) @ facts.head.tensor(CPU).t(), logits, rtol=1e-4, atol=1e-5)
    assert signal.valid.all()
    assert facts.fingerprint == ""


def test_attention_is_the_first_layer_s_from_each_answer_row_to_each_image_token(folder, renderings, inputs):
    renderer, found = renderings
    signal = TeacherScorer(TeacherSpec(path=folder), Needs(attention=True, salience=True)).score(inputs)
    assert signal.attention
    assert signal.salience
    model = load_model(ModelSpec(path=folder, attn_implementation="eager"), torch.float32)
    expected, salience = [], []
    for one in found:
        if one.pixels is None:
            continue
        pixels = Normalization.of(renderer.image_processor)(torch.from_numpy(one.pixels), torch.float32)
        ids = torch.from_numpy(one.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            weights = model(input_ids=ids, pixel_values=pixels, output_attentions=True).attentions[0][0]
        rows = np.flatnonzero(one.answer_mask) - 1
        tokens = np.flatnonzero(one.input_ids == renderer.image_token_id)
        expected += [weights[:, n, m] for n in rows for m in tokens]
        salience += [weights[:, rows, m].mean() for m in tokens]
    torch.testing.assert_close(signal.attention.tensor(CPU), torch.stack(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(signal.salience.tensor(CPU), torch.stack(salience), rtol=1e-4, atol=1e-6)


def test_a_layer_s_output_is_that_of_the_image_tokens(folder, renderings, inputs):
    renderer, found = renderings
    signal = TeacherScorer(TeacherSpec(path=folder), Needs(visual_layer=1)).score(inputs)
    assert signal.visual_layer
    assert signal.visual is None
    model = load_model(ModelSpec(path=folder), torch.float32)
    expected = []
    for one in found:
        if one.pixels is None:
            continue
        pixels = Normalization.of(renderer.image_processor)(torch.from_numpy(one.pixels), torch.float32)
        ids = torch.from_numpy(one.input_ids.astype(np.int64))
        with torch.no_grad():
            states = model(input_ids=ids[None], pixel_values=pixels, output_hidden_states=True).hidden_states
        expected.append(states[1][0][ids == renderer.image_token_id])
    torch.testing.assert_close(signal.visual_layer.tensor(CPU), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_features_are_the_plain_loops(folder, inputs, logits):
    signal = TeacherScorer(TeacherSpec(path=folder), EVERYTHING).score(inputs)
    hidden, visual = (wire.tensor(CPU) for wire in (signal.hidden, signal.visual) if wire)
    for sample in range(len(IMAGES)):
        rows = [n for n, owner in enumerate(inputs.row_sample) if owner == sample]
        tokens = [n for n, owner in enumerate(inputs.visual_sample) if owner == sample]
        vision = visual[tokens].mean(0) if tokens else torch.zeros(visual.shape[1])
        torch.testing.assert_close(torch.from_numpy(signal.features["teacher_vision"][sample]), vision)
        torch.testing.assert_close(torch.from_numpy(signal.features["teacher_answer"][sample]), hidden[rows].mean(0))
        entropies = [-math.fsum(p * math.log(p) for p in logits[n].double().softmax(0).tolist()) for n in rows]
        expected = [math.fsum(entropies) / len(rows), max(entropies)]
        assert signal.features["teacher_entropy"][sample].tolist() == pytest.approx(expected, rel=1e-4)


def test_top_k_are_the_largest_and_the_rest_of_the_common_ids(folder, inputs, logits):
    common = VOCAB - 3
    teacher = TeacherScorer(TeacherSpec(path=folder, signal="top_k"), Needs(top_k=5, vocab=common))  # type: ignore[arg-type]
    signal = teacher.score(inputs)
    assert teacher.facts().head is None
    assert signal.hidden is None
    assert signal.top_ids
    assert signal.top_log_probs
    probs = logits[:, :common].double().softmax(1)
    sent = signal.top_log_probs.tensor(CPU).double().exp()
    torch.testing.assert_close(sent.sum(1), torch.ones(len(logits), dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(sent[:, :-1], probs.sort(1, descending=True).values[:, :5], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(probs.gather(1, signal.top_ids.tensor(CPU).long()), sent[:, :-1], rtol=1e-4, atol=1e-7)


def test_a_sample_whose_layer_is_not_finite_is_not_valid_either(folder, inputs):
    teacher = TeacherScorer(TeacherSpec(path=folder), Needs(hidden=True, visual_layer=1))
    at = (int(inputs.visual_sample[-1]), int(inputs.visual_position[-1]))

    def poison(_module, _arguments, output):
        output[at] = math.inf
        return output

    teacher.model.model.language_model.layers[0].register_forward_hook(poison)
    signal = teacher.score(inputs)
    assert signal.valid.tolist() == [True, True, False]
    assert signal.visual_layer
    assert signal.visual_layer.tensor(CPU).isfinite().all()


def test_a_sample_whose_answer_is_not_finite_is_not_valid_and_the_others_are(folder, inputs, monkeypatch):
    teacher = TeacherScorer(TeacherSpec(path=folder), EVERYTHING)
    first_row = int(inputs.answer_rows[0])

    def poison(_module, _arguments, output):
        output.last_hidden_state.flatten(0, 1)[first_row] = math.nan
        return output

    teacher.model.model.language_model.register_forward_hook(poison)
    signal = teacher.score(inputs)
    assert signal.valid.tolist() == [False, True, True]
    assert signal.hidden
    assert signal.hidden.tensor(CPU).isfinite().all()  # or a weight of zero would not silence it
    assert all(np.isfinite(values).all() for values in signal.features.values())


def test_the_fingerprint_is_of_the_weights_and_made_only_for_a_cache(folder, tmp_path):
    def fingerprint(path):
        return TeacherScorer(TeacherSpec(path=str(path), cache=str(tmp_path)), EVERYTHING).facts().fingerprint  # type: ignore[arg-type]

    other = save_tiny(tmp_path / "other", seed=5)
    same = save_tiny(tmp_path / "same", seed=4)
    assert fingerprint(folder) == fingerprint(same) != fingerprint(other)


def test_code_that_came_with_a_checkpoint_is_in_the_fingerprint(tmp_path, monkeypatch):
    path = save_tiny(tmp_path / "model", seed=4)
    code = {}
    monkeypatch.setattr("betakd_ray.teacher.scorer.inspect.getsource", lambda module: code[module.__name__])

    def fingerprint(projector):
        code.update({module: "" for module in sys.modules})
        code["transformers.models.llava.modeling_llava"] = projector
        return TeacherScorer(TeacherSpec(path=path, cache=str(tmp_path)), EVERYTHING).facts().fingerprint  # type: ignore[arg-type]

    assert fingerprint("gelu") == fingerprint("gelu") != fingerprint("relu")


def test_what_else_transformers_asks_for_is_said_in_options(folder):
    spec = TeacherSpec(path=folder, options={"vision_feature_layer": -1})
    assert TeacherScorer(spec, EVERYTHING).model.config.vision_feature_layer == -1
    with pytest.raises(ModelError, match=r"cannot load it.*no_such_option"):
        TeacherScorer(TeacherSpec(path=folder, options={"no_such_option": 1}), EVERYTHING)
    for name, said in (("dtype", r"is set by teacher\.dtype"), ("use_safetensors", "a pickle"), ("token", "HF_TOKEN")):
        with pytest.raises(ValidationError, match=rf"options\.{name}: .*{said}"):
            TeacherSpec(path=folder, options={name: "x"})


def test_a_head_in_whole_numbers_is_refused(folder):
    model = load_model(ModelSpec(path=folder))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"lm_head in torch\.int8.*leaves the head as it is"):
        lm_head(model)
