"""What training needs of a vision–language model, whatever its family.

transformers gives every image–text-to-text model the same outline: `model.model` runs vision tower, projector and
language model to the last hidden states, and an output embedding turns those into logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from betakd_ray.errors import ModelError
from betakd_ray.models.inputs import Pairs, TensorInputs
from betakd_ray.spec import Part

_NAMES: dict[Part, tuple[str, ...]] = {
    "language_model": ("language_model",),
    "projector": ("multi_modal_projector", "connector", "projector"),
    "vision_tower": ("vision_tower", "vision_model", "visual"),
}


def parts(model: PreTrainedModel) -> dict[Part, list[nn.Module]]:
    """The model's parts by the names a spec uses; the lm_head goes with the language model.

    Raises ModelError for a model that does not have all three.
    """
    found: dict[Part, list[nn.Module]] = {}
    for part, names in _NAMES.items():
        modules = [
            getattr(model.model, name) for name in names if isinstance(getattr(model.model, name, None), nn.Module)
        ]
        if not modules:
            raise ModelError(f"{type(model).__name__} has no {part} (looked for {', '.join(names)} in its .model)")
        found[part] = modules[:1]
    head = model.get_output_embeddings()
    assert head is not None  # an image–text-to-text model ends in one
    found["language_model"].append(head)
    return found


@dataclass(frozen=True)
class Normalization:
    """How uint8 pixels become a vision tower's input; applied on the device."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, image_processor: Any) -> "Normalization":
        """As the image processor would have done it."""
        scale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        if not image_processor.do_normalize:
            return cls(scale, (0.0,) * 3, (1.0,) * 3)
        return cls(scale, tuple(image_processor.image_mean), tuple(image_processor.image_std))

    def __call__(
        self, pixels: UInt8[Tensor, "images 3 height width"], dtype: torch.dtype
    ) -> Float[Tensor, "images 3 height width"]:
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return ((pixels * self.scale - mean) / std).to(dtype)


def blank_image(image_processor: Any) -> UInt8[Tensor, "1 3 height width"]:
    """An image of the size that the image processor makes, all black."""
    pixels = image_processor([Image.new("RGB", (32, 32))], do_rescale=False, do_normalize=False, return_tensors="pt")
    return pixels["pixel_values"].to(torch.uint8)


@dataclass(frozen=True)
class Hidden:
    """A forward pass up to the language model's last hidden states."""

    rows: Float[Tensor, "rows width"]
    """At the answer rows, in order."""
    visual: Float[Tensor, "image_tokens width"] | None
    """Projector tokens, as the language model receives them."""
    attention: Float[Tensor, "pairs heads"] | None = None
    """Of the first layer, from each answer row to each image token of its sample."""


def hidden_rows(
    model: PreTrainedModel,
    inputs: TensorInputs,
    normalize: Normalization,
    blank: UInt8[Tensor, "1 3 height width"] | None = None,
    pairs: Pairs | None = None,
) -> Hidden:
    """Run a model to its answer rows; no logits are computed.

    Rows of prompt, image and padding never reach the vocabulary. In training, a micro-batch without images sees
    `blank`, with a weight of zero: ranks must agree about which parameters have a gradient, and ZeRO-3's about which
    modules run, in which order. With `pairs`, their attention in the first layer comes along; the model then has to be
    `with_attention_weights`.
    """
    pixels = blank if inputs.pixels is None else inputs.pixels
    images = None
    if pixels is not None:
        images = model.model.get_image_features(pixel_values=normalize(pixels, model.dtype), return_dict=True)
    with _first_attention(model) if pairs else nullcontext([]) as weights:
        output = model.model(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            mm_encoder_outputs=None if inputs.pixels is None else {"image": images},
            use_cache=False,
        )
    rows = output.last_hidden_state.flatten(0, 1)[inputs.answer_rows]
    attention = _of_pairs(weights[0], pairs, inputs) if pairs else None
    if images is None:
        return Hidden(rows, None, attention)
    visual = torch.cat(list(images.pooler_output))
    if inputs.pixels is None:
        return Hidden(rows + 0.0 * visual.sum(), None, attention)
    return Hidden(rows, visual, attention)


def with_attention_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a language model that computes attention in the open: slower, and with memory for L² weights."""
    model.model.language_model.set_attn_implementation("eager")
    return model


def attention_heads(model: PreTrainedModel) -> int:
    """Of a layer of the language model."""
    return model.config.get_text_config().num_attention_heads


@contextmanager
def _first_attention(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Catches the first layer's weights [B, heads, L, L] of a forward."""
    caught: list[Tensor] = []
    layer = model.model.language_model.layers[0].self_attn
    handle = layer.register_forward_hook(lambda _module, _inputs, output: caught.append(output[1]))
    try:
        yield caught
    finally:
        handle.remove()


def _of_pairs(
    weights: Float[Tensor, "batch heads length length"], pairs: Pairs, inputs: TensorInputs
) -> Float[Tensor, "pairs heads"]:
    query = (inputs.answer_rows % weights.shape[-1])[pairs.row]
    key = inputs.visual_position[pairs.token]
    return weights[pairs.sample, :, query, key]


def freeze(model: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients."""
    return model.eval().requires_grad_(False)
