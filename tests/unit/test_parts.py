"""A student out of a language model and a vision tower, and its warm-up: only the new projector learns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from betakd_ray.batch.inputs import TensorInputs
from betakd_ray.batch.normalization import Normalization
from betakd_ray.batch.packing import stack
from betakd_ray.data.pack import pack
from betakd_ray.data.render import Renderer
from betakd_ray.errors import ModelError
from betakd_ray.forecast.forecast import forecast
from betakd_ray.job import BetaKDJob
from betakd_ray.models.mobilevlm import MobileVLMForConditionalGeneration
from betakd_ray.models.student import build_student, student_config, student_processor
from betakd_ray.models.vlm import hidden_rows, lm_head, part_parameters
from betakd_ray.run.lease import Permit
from betakd_ray.spec import DataSpec, JobSpec, StorageSpec, StudentSpec, parse_spec
from betakd_ray.train.export import export_student
from tests.families import save_language_model, vision_config
from tests.learning import Study, spawned
from tests.originals import plain_tokenizer
from tests.tiny import IDS, IMAGE, VOCAB, numbered_samples, raw_sample, save_tiny

SIDE = 32
VISION = {"image_size": SIDE, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 4}
TOWERS = ("clip", "siglip", "dinov2", "llava")


def save_tower(folder: Path, kind: str) -> str:
    """Save a tower as on the hub: CLIP and SigLIP with text towers, DINOv2 alone and trained on larger images."""
    size = {"height": SIDE, "width": SIDE}
    words = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "llava":
        return save_tiny(folder, image_size=SIDE, seed=5)
    if kind == "clip":
        vision = vision_config("clip_vision_model", **VISION)
        model = CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=16))
        images = CLIPImageProcessorPil(size=size, crop_size=size)
    elif kind == "siglip":
        model = SiglipModel(
            SiglipConfig(text_config=words, vision_config=vision_config("siglip_vision_model", **VISION))
        )
        images = SiglipImageProcessorPil(size=size)
    else:
        own = vision_config("dinov2", **VISION) | {"image_size": 2 * SIDE}
        own.pop("model_type")
        model = Dinov2Model(Dinov2Config(**own))
        images = BitImageProcessorPil(size={"shortest_edge": SIDE + 4}, crop_size=size)
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two language models: `plain` has no `<image>` and no row for it; `aware` has both."""
    home = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    for kind in TOWERS:
        save_tower(home / kind, kind)
    save_language_model(home / "aware", seed=1, vocab_size=VOCAB)
    tokenizer = plain_tokenizer()
    save_language_model(home / "plain", seed=2, vocab_size=len(tokenizer), tie_word_embeddings=True)
    tokenizer.save_pretrained(home / "plain")
    return home


def student(home: Path, tower: str, language_model: str = "plain", **init: Any) -> StudentSpec:
    parts = {"language_model": str(home / language_model), "vision_tower": str(home / tower)}
    return StudentSpec.model_validate({"init": {"kind": "parts", **parts, **init}, "train": ["projector"]})


def tower_of(home: Path, kind: str) -> Any:
    if kind == "llava":
        return AutoModelForImageTextToText.from_pretrained(home / kind).model.vision_tower
    model = AutoModel.from_pretrained(home / kind)
    return getattr(model, "vision_model", model)


@pytest.mark.parametrize(
    ("kind", "words", "layer"),
    [("clip", "plain", -2), ("siglip", "plain", -2), ("dinov2", "plain", -3), ("llava", "aware", -1)],
)
def test_the_parts_are_as_they_were_and_the_whole_is_a_model_of_transformers(home, tmp_path, kind, words, layer):
    spec = student(home, kind, words, vision_feature_layer=layer)
    built, processor = build_student(spec, torch.float32).eval(), student_processor(spec)
    assert built.config.vision_feature_layer == layer
    source = AutoModelForCausalLM.from_pretrained(home / words)
    for name, weight in source.model.state_dict().items():
        copied = built.model.language_model.state_dict()[name]
        torch.testing.assert_close(copied[: len(weight)], weight, rtol=0, atol=0)
    torch.testing.assert_close(lm_head(built).weight[: source.config.vocab_size], source.lm_head.weight, rtol=0, atol=0)
    torch.testing.assert_close(built.model.vision_tower.state_dict(), dict(tower_of(home, kind).state_dict()))
    learning = {id(each) for each in built.parameters() if each.requires_grad}
    assert learning == {id(each) for each in part_parameters(built)["projector"]}

    renderer = Renderer(processor, DataSpec.model_validate({"train": "/x.tar", "template": "plain"}))
    rendering = renderer.render(raw_sample(1, "A blue square.", has_image=True))
    assert (rendering.input_ids == renderer.image_token_id).sum() == built.config.image_seq_length == (SIDE // 8) ** 2
    inputs = TensorInputs.of(stack([rendering], 0, renderer.image_token_id), torch.device("cpu"))
    with torch.no_grad():
        rows = hidden_rows(built, inputs, Normalization.of(renderer.image_processor)).rows
    built.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    shown = AutoProcessor.from_pretrained(tmp_path)
    assert shown.tokenizer.get_vocab()[IMAGE] == reloaded.config.image_token_id
    pixels = Normalization.of(renderer.image_processor).of_images(inputs.images, torch.float32)
    with torch.no_grad():
        logits = reloaded(input_ids=inputs.input_ids, **pixels).logits[0, inputs.answer_rows]
        torch.testing.assert_close(lm_head(built)(rows), logits, rtol=1e-5, atol=1e-5)


def test_a_mobilevlm_is_put_together_too(home, tmp_path):
    save_language_model(tmp_path / "words", vocab_size=VOCAB)
    size = {"height": 96, "width": 96}
    vision = vision_config("clip_vision_model", **VISION | {"image_size": 96})
    CLIPModel(CLIPConfig(vision_config=vision, projection_dim=16)).save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(tmp_path / "clip")
    spec = student(tmp_path, "clip", "words", projector="ldpnetv2")
    built = build_student(spec, torch.float32)
    assert isinstance(built, MobileVLMForConditionalGeneration)
    assert built.config.image_token_id == IDS[IMAGE]
    renderer = Renderer(student_processor(spec), DataSpec.model_validate({"train": "/x.tar", "template": "plain"}))
    assert set(renderer.image_tokens) == {144}


def test_what_is_no_such_part_is_refused_by_its_field(home, tmp_path):
    with pytest.raises(ModelError, match=r"language_model: .*llava is a vision–language model.*kind: checkpoint"):
        student_config(student(home, "clip", "llava"))
    with pytest.raises(
        ModelError, match=r"vision_tower: .*plain: is a 'llama'; a vision tower must be one of clip_vision_model"
    ):
        student_config(student(home, "plain"))
    with pytest.raises(ModelError, match="32 pixels cannot be divided into 12 tokens a side"):
        student_config(student(home, "clip", projector="ldpnetv2"))
    save_tower(tmp_path / "clip", "clip")
    weights = load_file(tmp_path / "clip/model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("vision_model")}
    save_file(kept, tmp_path / "clip/model.safetensors", metadata={"format": "pt"})
    save_language_model(tmp_path / "plain")
    with pytest.raises(ModelError, match=r"clip \(vision tower\): the checkpoint lacks \d+ weights \(embeddings"):
        build_student(student(tmp_path, "clip"), torch.float32)


# ------------------------------------------------------------------------------------------ the warm-up


def warm_up(home: Path, folder: Path) -> JobSpec:
    return parse_spec(
        {
            "name": "warm-up",
            "data": {"train": str(folder / "shards/*.tar"), "template": "plain"},
            "student": student(home, "clip").model_dump(),
            "objective": {"weighting": "equal"},
            "optimizer": {"lr": 1e-9, "projector_lr": 1e-2, "warmup_fraction": 0},
            "training": {"global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
            "output": str(folder / "runs"),
        }
    )


def learn(home: Path, folder: Path) -> list[float]:
    spec = warm_up(home, folder)
    study = Study.of(spec, [raw_sample(number, f"It is {number}.", has_image=number != 2) for number in range(4)])
    losses = study.steps(8)
    export_student(study.learner.engine, spec, Permit(str(folder), StorageSpec()), {})
    return losses


@pytest.mark.timeout(600)
def test_the_warm_up_teaches_the_projector_and_nothing_else(home, tmp_path):
    pack(numbered_samples(8), str(tmp_path / "shards"))
    spec = warm_up(home, tmp_path)
    planned = forecast(BetaKDJob(spec)).student
    losses = spawned(learn, tmp_path, home, tmp_path)
    assert losses[-1] < 0.99 * losses[0]
    learned = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    torch.manual_seed(spec.training.seed)
    before = build_student(spec.student, torch.float32)
    changed = {
        name for name, weight in learned.named_parameters() if not torch.equal(weight, before.get_parameter(name))
    }
    assert changed == {name for name, weight in before.named_parameters() if weight.requires_grad}
    assert planned.trained == sum(weight.numel() for weight in before.parameters() if weight.requires_grad)
    assert planned.parameters == sum(weight.numel() for weight in before.parameters())
    assert json.loads((tmp_path / "model/processor_config.json").read_text())["processor_class"] == "LlavaProcessor"
