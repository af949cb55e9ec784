"""The energies on image tokens, per sample, against plain loops over the student's own states."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from betakd_ray.batch.inputs import Pairs, TensorInputs, most_salient
from betakd_ray.batch.packing import stack
from betakd_ray.batch.sample import Rendering
from betakd_ray.models.vlm import hidden_rows, with_attention_weights
from betakd_ray.spec import ObjectiveSpec
from betakd_ray.teacher.parts import TeacherFacts
from betakd_ray.train.distiller import Distiller, Selection, TeacherView
from tests.tiny import IDS, IMAGE, IMAGE_SIZE, IMAGE_TOKENS, PAD, tiny_model, tiny_processor

CPU = torch.device("cpu")
WIDTH, TEACHER_WIDTH, HEADS, TEACHER_HEADS = 16, 6, 2, 3
VISUAL = ["fd", "align_attention", {"kind": "align_topk", "tokens": 2}, "relation"]
LAYER = {"kind": "fd", "layer": {"teacher": 9, "student": 1}}
LENGTHS, IMAGES = [12, 7, 15], [1, 0, 2]


@pytest.fixture(scope="module")
def inputs():
    return stacked(IMAGES)


def stacked(image_counts):
    generator = np.random.default_rng(0)
    renderings = []
    for length, images in zip(LENGTHS, image_counts, strict=True):
        ids = generator.integers(len(IDS), 300, length).astype(np.int32)
        ids[1 : 1 + images * IMAGE_TOKENS] = IDS[IMAGE]
        answer = np.zeros(length, dtype=bool)
        answer[-3:] = True
        pixels = generator.integers(0, 256, (images, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.uint8) if images else None
        renderings.append(Rendering(ids, answer, {} if pixels is None else {"pixel_values": pixels}))
    return stack(renderings, IDS[PAD], IDS[IMAGE])


@pytest.fixture(scope="module")
def distiller():
    facts = TeacherFacts(width=TEACHER_WIDTH, heads=TEACHER_HEADS, dtype="float32")
    student = with_attention_weights(tiny_model(seed=3))
    torch.manual_seed(0)
    return Distiller(student, tiny_processor(), ObjectiveSpec(energies=VISUAL), facts).eval()


@pytest.fixture(scope="module")
def teacher(inputs):
    generator = torch.Generator().manual_seed(1)
    tokens, pairs = len(inputs.visual_sample), len(Pairs.of(inputs, CPU).row)
    token = most_salient(torch.rand(tokens, generator=generator).numpy(), inputs, 2)
    sample = inputs.visual_sample[token]
    return TeacherView(
        {
            "visual": torch.randn(tokens, TEACHER_WIDTH, generator=generator),
            "attention": torch.rand(pairs, TEACHER_HEADS, generator=generator),
        },
        salient=Selection(*(torch.from_numpy(each) for each in (token, sample, np.bincount(sample, minlength=3)))),
    )


@pytest.fixture(scope="module")
def energies(distiller, inputs, teacher):
    tensors, pairs = TensorInputs.of(inputs, CPU), Pairs.of(inputs, CPU)
    output = distiller(tensors, teacher, pairs, torch.ones(3, 5), {})
    return dict(zip(distiller.channels, output.energies.t(), strict=True))


@pytest.fixture(scope="module")
def hidden(distiller, inputs):
    with torch.no_grad():
        return hidden_rows(
            distiller.student, TensorInputs.of(inputs, CPU), distiller.normalize, pairs=Pairs.of(inputs, CPU)
        )


def distance(mapped, student):
    count = mapped.numel()
    pairs = zip(mapped.flatten().tolist(), student.flatten().tolist(), strict=True)
    return math.fsum((a - b) ** 2 for a, b in pairs) / count


def samples_with_images():
    return [sample for sample, images in enumerate(IMAGES) if images]


def test_fd_is_the_mean_over_a_sample_s_image_tokens(distiller, inputs, teacher, hidden, energies):
    mapped = distiller.maps["fd"](teacher.parts["visual"]).detach()
    for sample in samples_with_images():
        at = inputs.visual_sample == sample
        assert energies["fd"][sample].item() == pytest.approx(distance(mapped[at], hidden.visual[at]), rel=1e-5)


def test_align_topk_is_fd_on_the_selected_tokens(distiller, inputs, teacher, hidden, energies):
    mapped = distiller.maps["align_topk"](teacher.parts["visual"]).detach()
    for sample in samples_with_images():
        at = [token for token in teacher.salient.token.tolist() if inputs.visual_sample[token] == sample]
        assert len(at) == 2
        assert energies["align_topk"][sample].item() == pytest.approx(distance(mapped[at], hidden.visual[at]), rel=1e-5)


def test_align_attention_is_the_mean_over_a_sample_s_rows_and_image_tokens(
    distiller, inputs, teacher, hidden, energies
):
    mapped = distiller.maps["align_attention"](teacher.parts["attention"]).detach()
    owner = Pairs.of(inputs, CPU).sample
    for sample in samples_with_images():
        at = owner == sample
        assert at.sum() == 3 * IMAGES[sample] * IMAGE_TOKENS
        expected = distance(mapped[at], hidden.attention[at])
        assert energies["align_attention"][sample].item() == pytest.approx(expected, rel=1e-5)


def test_relation_is_the_cosine_distance_of_each_sample_s_gram_matrices(inputs, teacher, hidden, energies):
    for sample in samples_with_images():
        at = inputs.visual_sample == sample
        grams = []
        for features in (teacher.parts["visual"][at], hidden.visual[at]):
            unit = features.double()
            grams.append((unit @ unit.t()).flatten())
        cosine = (grams[0] @ grams[1] / grams[0].norm() / grams[1].norm()).item()
        assert energies["relation"][sample].item() == pytest.approx(1 - cosine, rel=1e-4)


def test_a_text_only_sample_has_none_of_them(energies):
    for name in ("fd", "align_attention", "align_topk", "relation"):
        assert energies[name][1] == 0


def test_every_map_and_the_first_layer_learn_from_images(distiller, inputs, teacher):
    pairs = Pairs.of(inputs, CPU)
    distiller(TensorInputs.of(inputs, CPU), teacher, pairs, torch.ones(3, 5), {}).loss.backward()
    queries = distiller.student.model.language_model.layers[0].self_attn.q_proj.weight
    for parameter in (*distiller.maps.parameters(), queries):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("ce", [True, False])
@pytest.mark.parametrize(
    "energies", [["fd"], ["relation"], [LAYER], ["align_attention", "align_topk"]], ids=lambda each: str(each[0])
)
def test_the_same_parameters_have_a_gradient_with_and_without_images(inputs, teacher, energies, ce):
    """Otherwise, ranks whose batches differ would wait for each other's gradients."""
    facts = TeacherFacts(width=TEACHER_WIDTH, heads=TEACHER_HEADS, dtype="float32")
    objective = ObjectiveSpec(energies=energies, ce=ce, weighting="equal")
    view = dataclasses.replace(teacher, parts=dict(teacher.parts) | {"visual_layer": teacher.parts["visual"]})
    found = []
    for batch, told in ((inputs, view), (stacked([0, 0, 0]), TeacherView({}))):
        torch.manual_seed(0)
        student = with_attention_weights(tiny_model(seed=3))
        distiller = Distiller(student, tiny_processor(), objective, facts).train()
        weights = torch.ones(batch.size, len(distiller.channels))
        pairs = Pairs.of(batch, CPU) if "align_attention" in energies else None
        distiller(TensorInputs.of(batch, CPU), told, pairs, weights, {}).loss.backward()
        found.append({name for name, each in distiller.named_parameters() if each.grad is not None})
    assert found[0] == found[1]
    assert found[0]


# ---- fd at a layer -------------------------------------------------------------------------------------------------


@pytest.fixture
def deep():
    """Return a function that makes a distiller with `fd` at the first layer of a student with two layers."""

    def make(*, checkpointing=False):
        facts = TeacherFacts(width=TEACHER_WIDTH, heads=1, dtype="float32")
        objective = ObjectiveSpec(energies=[LAYER], ce=False)
        student = tiny_model(seed=3)
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        return Distiller(student, tiny_processor(), objective, facts).train()

    return make


@pytest.fixture
def deep_teacher(inputs):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(len(inputs.visual_sample), TEACHER_WIDTH, generator=generator)
    return TeacherView({"visual_layer": tokens})


def test_fd_at_a_layer_compares_what_comes_out_of_it(deep, inputs, deep_teacher):
    distiller, tensors = deep(), TensorInputs.of(inputs, CPU)
    output = distiller(tensors, deep_teacher, None, torch.ones(3, 1), {})
    with torch.no_grad():
        states = distiller.student(
            input_ids=tensors.input_ids,
            attention_mask=tensors.attention_mask,
            output_hidden_states=True,
            **distiller.normalize.of_images(tensors.images, torch.float32),
        ).hidden_states
    mapped = distiller.maps["fd"](deep_teacher.parts["visual_layer"]).detach()
    for sample in samples_with_images():
        at = inputs.visual_sample == sample
        ours = states[1][sample, inputs.visual_position[at]]
        assert output.energies[sample, 0].item() == pytest.approx(distance(mapped[at], ours), rel=1e-5)
    assert output.energies[1, 0] == 0


def test_its_gradient_stops_at_the_layer_and_is_the_same_with_checkpointing(deep, inputs, deep_teacher):
    found = []
    for checkpointing in (False, True):
        distiller = deep(checkpointing=checkpointing)
        distiller(TensorInputs.of(inputs, CPU), deep_teacher, None, torch.ones(3, 1), {}).loss.backward()
        found.append([layer.mlp.up_proj.weight.grad for layer in distiller.student.model.language_model.layers])
    (first, second), (first_again, second_again) = found
    assert first.abs().sum() > 0
    torch.testing.assert_close(first_again, first)
    assert all(gradient is None or (gradient == 0).all() for gradient in (second, second_again))
