"""Split of a model that is larger than one GPU over the GPUs of one process.

Each GPU gets a run of consecutive whole layers of the language model, by transformers' `device_map`. accelerate's hooks
move the activations from layer to layer. Everything else is on the first GPU: inputs enter there, the last hidden
states are returned there, and vision tower, projector, embedding and lm_head work as on one GPU.

`tp_plan`, which splits each matrix, is not used: it needs one process per GPU, but a teacher is one actor. And no
family's plan includes the vision tower (Qwen3-VL's has only the lm_head). `device_map="auto"` is not used either: it
splits inside Idefics3's vision layers, so that their two halves are on different GPUs, and if memory is short it uses
the CPU without a message.

The cost: a group of samples is on one GPU at a time. Therefore a teacher on n GPUs computes n groups at once, each on a
different GPU. A single group is no faster than on one GPU.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import expand_device_map

from betakd_ray.models.vlm import language_model


def device_map(model: PreTrainedModel, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """Return a map from names of modules and parameters to devices; each device gets about the same bytes of weights.

    The first layer of the language model stays on the first device, because its attention is read there.
    """
    _, *layers = language_model(model).layers
    placed = dict.fromkeys(_outside(model, set(layers)), devices[0])
    total = _bytes(model)
    before = total - sum(map(_bytes, layers))
    names = {module: name for name, module in model.named_modules()}
    for layer in layers:
        # A layer goes to the device whose share of the bytes holds the middle of the layer.
        middle = before + _bytes(layer) / 2
        placed[names[layer]] = devices[int(middle * len(devices) / total)]
        before += _bytes(layer)
    return placed


def device_bytes(model: PreTrainedModel, devices: Sequence[torch.device]) -> dict[torch.device, int]:
    """Return the bytes of weights and buffers on each device."""
    held, tensors = dict.fromkeys(devices, 0), dict(model.named_parameters()) | dict(model.named_buffers())
    for name, device in expand_device_map(device_map(model, devices), list(tensors)).items():
        held[torch.device(device)] += tensors[name].nbytes
    return held


def _outside(module: nn.Module, layers: set[nn.Module], prefix: str = "") -> Iterator[str]:
    """Yield the names of the largest modules that contain none of `layers`, and of the parameters outside of them."""
    yield from (f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False))
    for name, child in module.named_children():
        if child in layers:
            continue
        if layers.isdisjoint(child.modules()):
            yield f"{prefix}{name}"
        else:
            yield from _outside(child, layers, f"{prefix}{name}.")


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
