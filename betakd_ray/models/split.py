"""A model that is larger than one GPU, over the GPUs of one process.

Whole layers of the language model are put on the GPUs, one run of them after the other, by transformers' `device_map`;
accelerate's hooks move what goes from layer to layer. All else is on the first GPU: inputs go in there, the last hidden
states come out there, and vision tower, projector, embedding and lm_head need not know.

Not `tp_plan`, which cuts each matrix: it wants a process for each GPU, where a teacher is one actor, and no family's
plan has its vision tower (Qwen3-VL's has the lm_head alone). Nor `device_map="auto"`: it cuts inside of Idefics3's
vision layers, whose two halves then meet on different GPUs, and turns to the CPU, in silence, where memory is short.

The price: a group of samples is on one GPU at a time. A teacher on n GPUs therefore computes n groups at once, each on
another GPU; for a single group it is no faster than one GPU would be.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import expand_device_map

from betakd_ray.models.vlm import language_model


def device_map(model: PreTrainedModel, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """Name of a module or parameter → its device, such that each device has about as many bytes of weights.

    The first layer of the language model stays on the first device, too: its attention is read there.
    """
    _, *layers = language_model(model).layers
    placed = dict.fromkeys(_outside(model, set(layers)), devices[0])
    total = _bytes(model)
    before = total - sum(map(_bytes, layers))
    names = {module: name for name, module in model.named_modules()}
    for layer in layers:
        middle = before + _bytes(layer) / 2
        placed[names[layer]] = devices[int(middle * len(devices) / total)]
        before += _bytes(layer)
    return placed


def device_bytes(model: PreTrainedModel, devices: Sequence[torch.device]) -> dict[torch.device, int]:
    """Bytes of weights and buffers on each device."""
    held, tensors = dict.fromkeys(devices, 0), dict(model.named_parameters()) | dict(model.named_buffers())
    for name, device in expand_device_map(device_map(model, devices), list(tensors)).items():
        held[torch.device(device)] += tensors[name].nbytes
    return held


def _outside(module: nn.Module, layers: set[nn.Module], prefix: str = "") -> Iterator[str]:
    """The largest modules, and the parameters between them, that none of the layers is in."""
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
