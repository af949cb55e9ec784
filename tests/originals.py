"""Tiny MobileVLMs, and checkpoints in their authors' layouts, whose names and fields are written here independently."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from betakd_ray.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration, mobilevlm_processor
from tests.tiny import BOS, EOS, IDS, IMAGE, PAD, UNK, tiny_tokenizer

WIDTH, VISION_WIDTH = 24, 16
FLAT_NAMES = (
    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("model.multi_modal_projector.", "model.mm_projector."),
    ("model.language_model.", "model."),
)
FACTORY_NAMES = (
    ("model.vision_tower.", "vision_tower._vision_tower.vision_model."),
    ("model.multi_modal_projector.", "connector._connector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
MLP_NAMES = (("linear_1.", "0."), ("linear_2.", "2."))
LDPV2_NAMES = (("linear_1.", "mlp.mlp.0."), ("linear_2.", "mlp.mlp.2."), ("peg.", "peg.peg.0."))


def mobilevlm_config(*, side: int = 2, pixels: int = 32, patch: int = 8, vocab: int = 384) -> MobileVLMConfig:
    """Return a configuration; by default an image has 4×4 patches, which become 2×2 tokens."""
    return MobileVLMConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=VISION_WIDTH,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=pixels,
            patch_size=patch,
        ),
        text_config=LlamaConfig(
            vocab_size=vocab,
            hidden_size=WIDTH,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            pad_token_id=IDS[PAD],
            bos_token_id=IDS[BOS],
            eos_token_id=IDS[EOS],
        ),
        image_token_index=IDS[IMAGE],
        image_seq_length=side**2,
    )


def mobilevlm(config: MobileVLMConfig | None = None, *, seed: int = 0) -> MobileVLMForConditionalGeneration:
    """Return a MobileVLM with weights so large that every part has a visible effect on the logits."""
    model = MobileVLMForConditionalGeneration(config or mobilevlm_config()).eval()
    return with_large_weights(model, seed)


def save_mobilevlm(folder: Path, *, seed: int = 0) -> str:
    """Write a MobileVLM and its processor into a folder; return its path."""
    config = mobilevlm_config()
    size = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    mobilevlm(config, seed=seed).save_pretrained(folder)
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    mobilevlm_processor(config, images, tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


def with_large_weights(model: Any, seed: int = 0) -> Any:
    """Fill the model's parameters from N(0, 0.3²), and return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer without the token `<image>`."""
    content = tiny_tokenizer().backend_tokenizer.to_str().replace(IMAGE, "<other>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content), pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK
    )


def original_names(state: dict[str, torch.Tensor], parts: Any, projector: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a transformers LLaVA under the names of the original authors."""
    renamed = {}
    for name, weight in state.items():
        for new, old in parts:
            if name.startswith(new):
                name = old + name.removeprefix(new)
                break
        for new, old in projector:
            for place in ("model.mm_projector.", "connector._connector."):
                name = name.replace(place + new, place + old)
        renamed[name] = weight.clone()
    return renamed


def flat_config(model: Any, tower: Path, **fields: Any) -> dict[str, Any]:
    """Return a configuration like those of liuhaotian/llava-v1.5-7b and mtgv/MobileVLM_V2-1.7B."""
    text = model.config.text_config
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tower),
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": text.vocab_size,
        **fields,
    }


def write(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], *, shards: int = 1) -> Path:
    """Write config.json, weights in safetensors, and the plain tokenizer; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    plain_tokenizer().save_pretrained(folder)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    files = {name: f"model-{at % shards + 1:05}-of-{shards:05}.safetensors" for at, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def write_tower(folder: Path, model: Any) -> Path:
    """Write the vision tower into a folder like that of openai/clip-vit-large-patch14-336, and return the folder."""
    vision = model.config.vision_config
    state = model.model.vision_tower.state_dict()
    folder.mkdir(parents=True)
    vision.save_pretrained(folder)
    size = {"height": vision.image_size, "width": vision.image_size}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)
    weights = {f"vision_model.{name}": weight.clone() for name, weight in state.items()}
    save_file({**weights, "text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(1)},
              folder / "model.safetensors")  # fmt: skip
    return folder
