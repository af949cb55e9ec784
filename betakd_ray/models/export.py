"""Export of a MobileVLM to its authors' layout, for the tools that their checkpoints come with."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel

from betakd_ray.errors import ModelError
from betakd_ray.models.convert import FLAT, PROJECTOR, PROJECTORS, fetch, new_folder, own_fields, renaming
from betakd_ray.models.load import load_model, load_processor
from betakd_ray.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from betakd_ray.spec import ModelSpec

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def export_mobilevlm(source: str, target: str | Path, tokenizer: str) -> None:
    """Write the MobileVLM `source` into the folder `target`, with the original names and configuration.

    `tokenizer` is the folder, hub id or URL of an original checkpoint. Its tokenizer files are copied, because the
    original code reads `tokenizer.model`, which transformers does not save. Raises ModelError and OutputError.
    """
    with new_folder(target) as written:
        _export(source, written, tokenizer)


def _export(source: str, target: Path, tokenizer: str) -> None:
    spec = ModelSpec(path=source)
    model = load_model(spec)
    config = _exportable(source, model)
    names = {PROJECTOR + new: f"model.mm_projector.{old}" for old, new in PROJECTORS["ldpnetv2"].items()}
    names |= {new: old for old, new in FLAT.items()}
    weights = {renaming(name, names): weight for name, weight in model.state_dict().items()}
    rows = _original_rows(config, load_processor(spec).tokenizer)
    # Cloned: if the two are tied they share memory, and save_torch_state_dict would leave one of the names out.
    for name in (EMBEDDING, HEAD):
        weights[name] = weights[name][:rows].clone()
    _copy_tokenizer(fetch(tokenizer), target)
    save_torch_state_dict(weights, target)
    flat = _flat_config(config, rows, weights[HEAD].dtype)
    (target / "config.json").write_text(json.dumps(flat, indent=2), encoding="utf-8")


def _exportable(source: str, model: PreTrainedModel) -> MobileVLMConfig:
    """Return the model's configuration. Raises ModelError if it differs from what is fixed in the original code."""
    if not isinstance(model, MobileVLMForConditionalGeneration):
        raise ModelError(
            f"{source}: is a {type(model).__name__}; only a MobileVLM can be exported to the original layout"
        )
    config = model.config
    text = config.text_config
    for field, seen, built_in in (
        ("text_config.model_type", text.model_type, "llama"),
        ("text_config.rope_parameters.rope_type", text.rope_parameters["rope_type"], "default"),
        ("vision_config.model_type", config.vision_config.model_type, "clip_vision_model"),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy, "default"),
        ("image_seq_length", config.image_seq_length, 144),
    ):
        if seen != built_in:
            raise ModelError(f"{source}: {field} is {seen}; the original code knows only {built_in}")
    return config


def _original_rows(config: MobileVLMConfig, tokenizer: Any) -> int:
    """Return the number of vocabulary rows to export.

    These are the rows before `<image>` if it is the tokenizer's last token (only padding follows), otherwise all rows.
    """
    is_last = config.image_token_id == len(tokenizer) - 1
    return config.image_token_id if is_last else config.text_config.vocab_size


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, target)
        elif name == TOKENIZER_FILES[0]:
            raise ModelError(f"{source}: has no {name}. Give --tokenizer the folder of an original MobileVLM.")


def _flat_config(config: MobileVLMConfig, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    text = config.text_config
    return {
        "architectures": ["MobileLlamaForCausalLM"],
        "model_type": "mobilevlm",
        **{name: getattr(text, name) for name in sorted(own_fields(text) - {"rope_parameters"})},
        "vocab_size": rows,
        "rope_theta": text.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_mm_proj": True,
        "mm_projector_type": "ldpnetv2",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_tower": config.mm_vision_tower,
        "vision_tower_type": "clip",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
    }
