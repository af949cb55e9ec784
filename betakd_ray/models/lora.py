"""Low-rank adapters in a student's language model, through peft.

This module is imported only if there are adapters, because the import of peft takes seconds.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from betakd_ray.errors import ModelError
from betakd_ray.models.vlm import language_model
from betakd_ray.spec import LoraSpec

NAME = "default"
"""Name of the adapter in peft."""


def add_adapters(model: PreTrainedModel, lora: LoraSpec, *, is_skeleton: bool = False) -> None:
    """Put adapters into the linear layers of the language model, in place; the head gets none.

    Matrix A is random, from torch's global generator, and matrix B is zero. `is_skeleton` is true if the model's
    tensors have no data. Raises ModelError for layers that do not exist.
    """
    language = language_model(model)
    place = next(name for name, module in model.named_modules() if module is language)
    there = {name.rpartition(".")[2] for name, layer in language.named_modules() if isinstance(layer, nn.Linear)}
    if unknown := set(lora.target_modules or ()) - there:
        raise ModelError(
            f"student.lora.target_modules: the language model has no linear layer {', '.join(sorted(unknown))}; its "
            f"linear layers are {', '.join(sorted(there))}"
        )
    layers = "|".join(sorted(lora.target_modules or there))
    # peft compares this expression with the whole name of each layer. The head is outside of `place`: no match.
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (a scale need not be whole)
        lora_dropout=lora.dropout,
        target_modules=rf"{place}\..*\.({layers})",
    )
    with _made_in_place(model.dtype) if is_skeleton else nullcontext():
        inject_adapter_in_model(config, model, NAME)


@contextmanager
def _made_in_place(dtype: torch.dtype) -> Iterator[None]:
    """Create new modules in `dtype` inside the block.

    peft creates adapters in the default dtype and then calls `Module.to`, which fails for fake tensors. So the block
    sets the default dtype and makes `Module.to` do nothing.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with patch.object(nn.Module, "to", lambda module, *_, **__: module):
            yield
    finally:
        torch.set_default_dtype(before)


def without_adapters(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the state of a model that has W + scale · B A in place of each adapted W.

    With scale = alpha / r it computes the same as the adapted model (Hu et al. 2022, §4.1). With scale = 0 it has the
    weights that the model had before training.
    """
    result = {}
    for name, weight in state.items():
        layer, is_adapted, of_layer = name.partition(".base_layer.")
        if is_adapted and of_layer == "weight":
            # In float32, so that the sum is rounded to the weight's dtype only once.
            down, up = (state[f"{layer}.lora_{each}.{NAME}.weight"].float() for each in "AB")
            weight = (weight.float() + scale * up @ down).to(weight.dtype)
        if ".lora_" not in name:
            result[f"{layer}.{of_layer}" if is_adapted else name] = weight
    return result


def save_adapters(model: PreTrainedModel, state: Mapping[str, Tensor], base: str | None, folder: str) -> None:
    """Write the files that peft loads onto a model; transformers loads them onto the model in the same folder."""
    config = model.peft_config[NAME]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)
    weights = get_peft_model_state_dict(model, dict(state), NAME)
    named = {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()}
    save_file(named, Path(folder) / SAFETENSORS_WEIGHTS_NAME)
