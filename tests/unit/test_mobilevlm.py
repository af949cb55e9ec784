"""MobileVLM V2 against the same model written with loops, and in training."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil, LlamaConfig, LlavaProcessor

from betakd_ray.batch.inputs import TensorInputs
from betakd_ray.batch.normalization import Normalization
from betakd_ray.batch.packing import stack
from betakd_ray.batch.processing import ImageProcessing
from betakd_ray.data.render import Renderer
from betakd_ray.errors import ModelError
from betakd_ray.evaluation.generate import answers
from betakd_ray.models.load import load_model, load_processor
from betakd_ray.models.mobilevlm import (
    MobileVLMConfig,
    MobileVLMForConditionalGeneration,
    MobileVLMProjector,
    mobilevlm_processor,
)
from betakd_ray.models.student import build_student
from betakd_ray.models.vlm import hidden_rows, parts
from betakd_ray.spec import DataSpec, ModelSpec, StudentSpec
from tests.originals import mobilevlm, mobilevlm_config
from tests.tiny import IDS, IMAGE, raw_sample, tiny_tokenizer

CPU = torch.device("cpu")
IMAGE_ID, TOKENS = IDS[IMAGE], 4
WITH_IMAGE = [1, 40, *[IMAGE_ID] * TOKENS, 50, 60, 70]
TEXT_ONLY = [1, 80, 90, 100, 110]


@pytest.fixture(scope="module")
def model():
    return mobilevlm()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def processor(config=None):
    config = config or mobilevlm_config()
    size = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    return mobilevlm_processor(config, CLIPImageProcessorPil(size=size, crop_size=size), tiny_tokenizer())


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mobilevlm")
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return str(folder)


def logits_of(model, ids, pixels=None, mask=None):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), pixel_values=pixels, attention_mask=mask).logits


# ---- the reference: one sequence, one head, one pixel at a time ----------------------------------------------------


class Weights:
    """The weights under a prefix."""

    def __init__(self, state, prefix=""):
        self.state, self.prefix = state, prefix

    def __truediv__(self, name):
        return Weights(self.state, f"{self.prefix}{name}.")

    def __getitem__(self, name):
        return self.state[self.prefix + name]

    def linear(self, x):
        bias = self.state.get(self.prefix + "bias")
        return x @ self["weight"].T + (0 if bias is None else bias)

    def layer_norm(self, x, eps=1e-5):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * self["weight"] + self["bias"]

    def rms_norm(self, x, eps):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self["weight"]


def attend(q, k, v, *, heads, shared=1, causal=False):
    """Return attention over q, k, v, [L, width] each; `shared` query heads use the same key head."""
    size = q.shape[1] // heads
    mixed = []
    for head in range(heads):
        one = slice(head * size, (head + 1) * size)
        other = slice(head // shared * size, (head // shared + 1) * size)
        scores = q[:, one] @ k[:, other].T / math.sqrt(size)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        mixed.append(scores.softmax(1) @ v[:, other])
    return torch.cat(mixed, 1)


def clip_patches(w, vision, image):
    """Return the output of the second-last layer without the class token, [patches, width]."""
    side = vision.image_size // vision.patch_size
    kernel, size = (w / "embeddings")["patch_embedding.weight"], vision.patch_size
    x = [(w / "embeddings")["class_embedding"]]
    for row in range(side):
        for column in range(side):
            window = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            x.append((kernel * window).sum((1, 2, 3)))
    x = torch.stack(x) + (w / "embeddings")["position_embedding.weight"]
    x = (w / "pre_layrnorm").layer_norm(x)
    for number in range(vision.num_hidden_layers - 1):
        layer = w / f"encoder.layers.{number}"
        normed = (layer / "layer_norm1").layer_norm(x)
        q, k, v = ((layer / f"self_attn.{name}_proj").linear(normed) for name in "qkv")
        x = x + (layer / "self_attn.out_proj").linear(attend(q, k, v, heads=vision.num_attention_heads))
        inner = (layer / "mlp.fc1").linear((layer / "layer_norm2").layer_norm(x))
        x = x + (layer / "mlp.fc2").linear(inner * torch.sigmoid(1.702 * inner))
    return x[1:]


def ldpv2(w, patches, side):
    """Return [side², width] after two linear layers, the mean of each window, and an added convolution."""
    inner = (w / "linear_1").linear(patches)
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    grid = (w / "linear_2").linear(inner)
    rows = math.isqrt(len(grid))
    step = rows // side
    grid = grid.view(rows, rows, -1)
    pooled = torch.stack([
        torch.stack([grid[r * step : (r + 1) * step, c * step : (c + 1) * step].mean((0, 1)) for c in range(side)])
        for r in range(side)
    ])  # fmt: skip
    kernel, bias = (w / "peg")["weight"], (w / "peg")["bias"]
    tokens = []
    for row in range(side):
        for column in range(side):
            token = pooled[row, column] + bias
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    if 0 <= row + down < side and 0 <= column + right < side:
                        token = token + kernel[:, 0, down + 1, right + 1] * pooled[row + down, column + right]
            tokens.append(token)
    return torch.stack(tokens)


def rotated(x, heads, theta=10_000.0):
    size = x.shape[1] // heads
    angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    turned = []
    for head in range(heads):
        first, second = x[:, head * size : (head + 1) * size].chunk(2, 1)
        turned += [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    return torch.cat(turned, 1)


def reference_logits(model, ids, image):
    config, w = model.config, Weights(model.state_dict())
    text = config.text_config
    patches = clip_patches(w / "model.vision_tower", config.vision_config, image)
    visual = ldpv2(w / "model.multi_modal_projector", patches, config.side)
    language = w / "model.language_model"
    x = language["embed_tokens.weight"][ids].clone()
    x[torch.tensor(ids) == config.image_token_id] = visual
    for number in range(text.num_hidden_layers):
        layer = language / f"layers.{number}"
        normed = (layer / "input_layernorm").rms_norm(x, text.rms_norm_eps)
        q, k, v = ((layer / f"self_attn.{name}_proj").linear(normed) for name in "qkv")
        q, k = rotated(q, text.num_attention_heads), rotated(k, text.num_key_value_heads)
        shared = text.num_attention_heads // text.num_key_value_heads
        mixed = attend(q, k, v, heads=text.num_attention_heads, shared=shared, causal=True)
        x = x + (layer / "self_attn.o_proj").linear(mixed)
        normed = (layer / "post_attention_layernorm").rms_norm(x, text.rms_norm_eps)
        gate = (layer / "mlp.gate_proj").linear(normed)
        x = x + (layer / "mlp.down_proj").linear(gate * gate.sigmoid() * (layer / "mlp.up_proj").linear(normed))
    return (w / "lm_head").linear((language / "norm").rms_norm(x, text.rms_norm_eps))


# ---- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "rows"), [(2, 4), (3, 6), (4, 12), (3, 3)])
def test_the_projector_is_two_linear_layers_a_pool_and_a_convolution_that_is_added(side, rows):
    projector = MobileVLMProjector(mobilevlm_config(side=side))
    patches = torch.randn(2, rows**2, 16)
    with torch.no_grad():
        tokens = projector(patches)
        expected = [ldpv2(Weights(projector.state_dict()), each, side) for each in patches]
    torch.testing.assert_close(tokens, torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_the_whole_forward_is_the_reference_s(model, pixels):
    found = logits_of(model, [WITH_IMAGE], pixels[:1])[0]
    with torch.no_grad():
        expected = reference_logits(model, WITH_IMAGE, pixels[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 1


SIZES = {
    "1.7B": (
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16},
        {"language_model": 1_364_297_728, "projector": 6_316_032, "vision_tower": 303_507_456},
        1_674_121_216,
    ),
    "7B": (
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        {"language_model": 6_738_415_616, "projector": 21_020_672, "vision_tower": 303_507_456},
        7_062_943_744,
    ),
}


@pytest.mark.parametrize("size", SIZES)
def test_the_published_sizes_have_the_published_numbers_of_parameters(size):
    text, by_part, total = SIZES[size]
    with torch.device("meta"):
        model = MobileVLMForConditionalGeneration(MobileVLMConfig(text_config=LlamaConfig(vocab_size=32_000, **text)))
    found = {
        part: sum(weight.numel() for module in modules for weight in module.parameters())
        for part, modules in parts(model).items()
    }
    assert found == by_part
    assert sum(weight.numel() for weight in model.parameters()) == total


def test_samples_padded_to_one_length_are_as_they_are_alone(model, pixels):
    longer = [*WITH_IMAGE, 80, 90, 100]
    batch = [WITH_IMAGE + [0] * 3, longer, TEXT_ONLY + [0] * (len(longer) - len(TEXT_ONLY))]
    lengths = [len(WITH_IMAGE), len(longer), len(TEXT_ONLY)]
    mask = torch.tensor([[int(at < length) for at in range(len(longer))] for length in lengths])
    together = logits_of(model, batch, pixels, mask)
    alone = [
        logits_of(model, [WITH_IMAGE], pixels[:1]),
        logits_of(model, [longer], pixels[1:]),
        logits_of(model, [TEXT_ONLY]),
    ]
    for row, expected, length in zip(together, alone, lengths, strict=True):
        torch.testing.assert_close(row[:length], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_chosen_as_everywhere_in_transformers(folder, model, pixels, attention):
    other = load_model(ModelSpec(path=folder, attn_implementation=attention), torch.float32)
    assert other.model.language_model.config._attn_implementation == attention
    assert other.model.vision_tower.config._attn_implementation == attention
    found = logits_of(other, [WITH_IMAGE], pixels[:1])
    torch.testing.assert_close(found, logits_of(model, [WITH_IMAGE], pixels[:1]), rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(pixels):
    gradients = []
    for checkpointing in (False, True):
        model = mobilevlm().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        logits = model(input_ids=torch.tensor([WITH_IMAGE]), pixel_values=pixels[:1], use_cache=False).logits
        logits.log_softmax(-1)[..., 7].mean().backward()
        gradients.append({name: w.grad for name, w in model.named_parameters() if w.grad is not None})
    assert "model.multi_modal_projector.peg.weight" in gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_saved_model_is_loaded_by_transformers_auto_class_with_the_same_logits(folder, model, pixels):
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(loaded, MobileVLMForConditionalGeneration)
    torch.testing.assert_close(
        logits_of(loaded, [WITH_IMAGE], pixels[:1]), logits_of(model, [WITH_IMAGE], pixels[:1]), rtol=0, atol=0
    )


def test_tied_embeddings_stay_tied_when_saved_and_loaded(tmp_path):
    config = mobilevlm_config()
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    model = mobilevlm(config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = load_model(ModelSpec(path=str(tmp_path)))
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    torch.testing.assert_close(logits_of(loaded, [TEXT_ONLY]), logits_of(model, [TEXT_ONLY]))


def test_generation_with_a_cache_is_a_loop_of_forwards_without_one(model, pixels):
    ids = list(WITH_IMAGE)
    for _ in range(6):
        ids.append(int(logits_of(model, [ids], pixels[:1])[0, -1].argmax()))
    generated = model.generate(
        input_ids=torch.tensor([WITH_IMAGE]), pixel_values=pixels[:1], max_new_tokens=6, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    assert generated[0].tolist() == ids


@pytest.mark.parametrize("tokens", [2, 3, 143])
def test_tokens_that_make_no_square_are_refused(tokens):
    with pytest.raises(ValueError, match=f"image_seq_length is {tokens}"):
        MobileVLMConfig(image_seq_length=tokens)


def test_a_class_token_among_the_patches_is_refused(pixels):
    config = mobilevlm_config()
    config.vision_feature_select_strategy = "full"
    with pytest.raises(ModelError, match=r"17 tokens an image.*vision_feature_select_strategy"):
        logits_of(mobilevlm(config), [WITH_IMAGE], pixels[:1])


# ---- with the processor and the trainer ----------------------------------------------------------------------------


@pytest.mark.parametrize(("pixels", "patch"), [(336, 14), (384, 14), (224, 16)])
def test_an_image_is_144_tokens_whatever_the_vision_tower(pixels, patch):
    config = mobilevlm_config(side=12, pixels=pixels, patch=patch)
    assert Renderer(processor(config), DataSpec(train=("unused",))).image_tokens[0] == 144


def test_an_image_too_small_for_its_tokens_is_refused():
    with pytest.raises(ModelError, match="20 pixels cannot be divided into 12 tokens a side"):
        processor(mobilevlm_config(side=12, pixels=20, patch=1))


def test_the_family_has_llava_s_processor_also_where_a_folder_does_not_say_so(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name in ("processor_config.json", "tokenizer_config.json"):
        settings = json.loads((tmp_path / name).read_text())
        del settings["processor_class"]
        (tmp_path / name).write_text(json.dumps(settings))
    assert isinstance(load_processor(ModelSpec(path=str(tmp_path))), LlavaProcessor)


@pytest.fixture(scope="module")
def rendered(folder):
    renderer = Renderer(load_processor(ModelSpec(path=folder)), DataSpec(train=("unused",)))
    samples = [raw_sample(n, "It is " + "so " * n + ".", has_image=n != 1) for n in range(3)]
    return renderer, samples, [renderer.render(sample) for sample in samples]


def test_hidden_rows_and_head_give_each_sample_s_own_logits(folder, model, rendered):
    renderer, _, found = rendered
    inputs = TensorInputs.of(stack(found, renderer.pad_token_id, renderer.image_token_id), CPU)
    normalize = Normalization.of(renderer.image_processor)
    with torch.no_grad():
        hidden = hidden_rows(model, inputs, normalize)
        rows = model.get_output_embeddings()(hidden.rows)
    expected = []
    for one in found:
        pixels = None if one.pixels is None else normalize(torch.from_numpy(one.pixels), torch.float32)
        whole = logits_of(model, [one.input_ids.tolist()], pixels)[0]
        expected += [whole[n - 1] for n in np.flatnonzero(one.answer_mask)]
    torch.testing.assert_close(rows, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert hidden.visual is not None
    assert hidden.visual.shape == (2 * TOKENS, model.config.text_config.hidden_size)


def test_a_batch_without_images_has_a_gradient_for_the_projector(rendered):
    renderer, _, found = rendered
    model = mobilevlm()
    inputs = TensorInputs.of(stack(found[1:2], renderer.pad_token_id, renderer.image_token_id), CPU)
    blank = {name: torch.from_numpy(array) for name, array in ImageProcessing(renderer.processor).blank().items()}
    hidden = hidden_rows(model, inputs, Normalization.of(renderer.image_processor), blank)
    hidden.rows.sum().backward()
    peg = model.model.multi_modal_projector.peg.weight.grad
    assert peg is not None
    assert not peg.any()


def test_answers_generated_in_a_padded_batch_are_those_of_one_at_a_time(model, rendered):
    renderer, samples, _ = rendered
    batched, single = (
        list(answers(model, renderer, samples, batch_size=size, max_new_tokens=5)) for size in (len(samples), 1)
    )
    assert batched == single
    assert None not in batched


def test_a_student_is_built_from_a_configuration_with_the_parts_frozen_that_do_not_learn(folder):
    config = {"model_type": "mobilevlm_v2", **mobilevlm_config().to_diff_dict()}
    student = StudentSpec.model_validate(
        {
            "init": {"kind": "config", "config": config, "processor": folder, "vision_tower": folder},
            "train": ["projector"],
        }
    )
    built = build_student(student, torch.float32)
    assert isinstance(built, MobileVLMForConditionalGeneration)
    learning = {name for name, weight in built.named_parameters() if weight.requires_grad}
    assert learning == {
        f"model.multi_modal_projector.{layer}.{kind}"
        for layer in ("linear_1", "linear_2", "peg")
        for kind in ("weight", "bias")
    }
    torch.testing.assert_close(
        built.model.vision_tower.state_dict(), load_model(ModelSpec(path=folder)).model.vision_tower.state_dict()
    )
