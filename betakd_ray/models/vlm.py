"""Access to a model of any family for training: its parts, its head, and its last hidden states.

In transformers every image–text-to-text model has the same structure. A base model has `get_image_features`, which runs
vision tower and projector, and a forward pass, which takes their tokens and runs the language model. An output
embedding turns the last hidden states into logits. Families differ in the names of their parts and in the inputs that
they need besides the pixels. A causal language model has the same structure without images.
"""

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from betakd_ray.batch.images import PIXELS
from betakd_ray.batch.inputs import Pairs, TensorInputs
from betakd_ray.batch.normalization import Normalization
from betakd_ray.errors import ModelError
from betakd_ray.models.hidden import Hidden
from betakd_ray.spec import Part

_NAMES: dict[Part, tuple[str, ...]] = {
    "language_model": ("language_model", "text_model"),
    "projector": ("multi_modal_projector", "connector", "projector"),
    "vision_tower": ("vision_tower", "vision_model", "visual"),
}
_MERGERS = ("merger", "deepstack_merger_list")
"""Names of Qwen's projectors, which are inside its vision tower."""


def parts(model: PreTrainedModel) -> dict[Part, list[nn.Module]]:
    """Return the modules of each part of the model, by the names that a spec uses.

    The lm_head belongs to the language model. A model without images has only the part `language_model`. Raises
    ModelError for a vision–language model in which a part is not found.
    """
    head = lm_head(model)
    base = base_model(model)
    if not takes_images(model):
        return {"language_model": [base, head], "projector": [], "vision_tower": []}
    found: dict[Part, list[nn.Module]] = {part: [*_children(base, names)][:1] for part, names in _NAMES.items()}
    if not found["projector"] and found["vision_tower"]:
        found["projector"] = [*_children(found["vision_tower"][0], _MERGERS)]
    for part, modules in found.items():
        if not modules:
            looked_for = ", ".join(_NAMES[part])
            raise ModelError(f"{type(model).__name__} has no {part} (looked for {looked_for} in its base model)")
    found["language_model"].append(head)
    return found


def part_parameters(model: PreTrainedModel) -> dict[Part, list[nn.Parameter]]:
    """Return the parameters of each part; every parameter of the model is in exactly one part.

    A parameter outside all parts (LLaVA-NeXT's `image_newline`) belongs to the projector. Raises ModelError as `parts`
    does.
    """
    owners: dict[nn.Parameter, Part] = {}
    of_parts = parts(model)
    for part in ("projector", "vision_tower", "language_model"):  # Qwen's projector is inside its tower
        for module in of_parts[part]:
            for parameter in module.parameters():
                owners.setdefault(parameter, part)
    found: dict[Part, list[nn.Parameter]] = {part: [] for part in of_parts}
    for parameter in model.parameters():
        found[owners.get(parameter, "projector")].append(parameter)
    return found


def _children(module: nn.Module, names: tuple[str, ...]) -> Iterator[nn.Module]:
    """Yield the child modules whose attribute name is in `names`."""
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            yield child


def base_model(model: PreTrainedModel) -> Any:
    """Return the model without its head."""
    return model.base_model


def language_model(model: PreTrainedModel) -> Any:
    """Return the language model without its head."""
    return parts(model)["language_model"][0]


def lm_head(model: PreTrainedModel) -> nn.Linear:
    """Return the layer that turns the last hidden states into logits.

    Raises ModelError unless the logits are exactly one matrix of plain numbers times the hidden states.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no lm_head that is one matrix. Choose a causal language model, and a "
            "quantisation that leaves the head as it is."
        )
    weight: Tensor | None = getattr(head, "weight", None)  # some quantisations keep it under other names
    # A tensor subclass of a quantisation reports the dtype of the unpacked numbers but holds packed data.
    if weight is None or weight.dtype not in _NUMBERS or is_traceable_wrapper_subclass(weight):
        seen = "packed" if weight is None else f"in {weight.dtype} ({type(weight).__name__})"
        raise ModelError(
            f"{type(model).__name__} has an lm_head {seen}; energies are computed from its numbers. "
            "Choose a quantisation that leaves the head as it is."
        )
    text = model.config.get_text_config()
    scaled = [name for name in _LOGIT_SETTINGS if getattr(text, name, None) not in (None, 1, 1.0)]
    if head.bias is not None or scaled:
        raise ModelError(
            f"{type(model).__name__} changes its logits after the lm_head's matrix ({', '.join(scaled) or 'bias'}), "
            "but energies are computed from hidden states and that matrix alone. Choose a family such as Llama or Qwen."
        )
    return head


_NUMBERS = (torch.float32, torch.bfloat16, torch.float16)
_LOGIT_SETTINGS = ("logit_scale", "logits_scaling", "final_logit_softcapping", "lm_head_multiplier")


def takes_images(model: PreTrainedModel) -> bool:
    """Return whether the model is a vision–language model."""
    return hasattr(base_model(model), "get_image_features")


def hidden_rows(
    model: PreTrainedModel,
    inputs: TensorInputs,
    normalize: Normalization,
    blank: dict[str, Tensor] | None = None,
    pairs: Pairs | None = None,
    layer: int | None = None,
) -> Hidden:
    """Run a model and return its hidden states at the answer rows; no logits are computed.

    Logits are thus never computed for rows of prompt, image and padding. In training, a micro-batch without images runs
    on the images `blank`, with weight zero: all ranks must have a gradient for the same parameters, and with ZeRO-3
    they must run the same modules in the same order. With `pairs`, the result has the first layer's attention for these
    pairs; the model must then come from `with_attention_weights`. With `layer`, counted from 1, the result has the
    output of that layer at the image tokens.
    """
    images = inputs.images or blank
    features = None
    if images:
        features = base_model(model).get_image_features(**normalize.of_images(images, model.dtype), return_dict=True)
    # The features are given to the forward pass, which would otherwise run the vision tower a second time.
    beside = _beside_features(model, inputs) | {"mm_encoder_outputs": {"image": features}} if inputs.images else {}
    layers = language_model(model).layers if pairs or layer else []
    with (
        _outputs_of(layers[0].self_attn if pairs else None) as attended,
        _outputs_of(layers[layer - 1] if layer else None) as states,
    ):
        # No attention mask: padding is on the right, so causal attention never reads it from a real token, and the
        # rows of the padding are not used. With a mask, attention would not use its fast kernels, and transformers
        # would wait for the device to find out whether anything is masked.
        output = base_model(model)(input_ids=inputs.input_ids, attention_mask=None, use_cache=False, **beside)
    rows = output.last_hidden_state.flatten(0, 1)[inputs.answer_rows]
    attention = _of_pairs(attended[0][1], pairs, inputs) if pairs else None
    if features is None:
        return Hidden(rows, None, attention=attention)
    if not inputs.images:
        # Zero times the blank image's features: it changes no value but keeps the vision parameters in the graph.
        return Hidden(rows + 0.0 * _sum(features), None, attention=attention)
    visual_layer = _at_image_tokens(states[0], inputs) if layer else None
    return Hidden(rows, torch.cat(list(features.pooler_output)), visual_layer, attention)


def with_image_tokens(model: PreTrainedModel, input_ids: Tensor, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a forward pass's image arguments, with `mm_token_type_ids` (1 at image tokens) if the family has it."""
    if "mm_token_type_ids" not in _arguments(type(base_model(model))):
        return images
    return {**images, "mm_token_type_ids": (input_ids == model.config.image_token_id).int()}


def _beside_features(model: PreTrainedModel, inputs: TensorInputs) -> dict[str, Tensor]:
    """Return the image inputs besides the pixels that the forward pass takes; Qwen computes positions from the grid."""
    asked = with_image_tokens(model, inputs.input_ids, inputs.images)
    known = _arguments(type(base_model(model)))
    return {name: value for name, value in asked.items() if name != PIXELS and name in known}


@cache
def _arguments(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def _sum(features: Any) -> Tensor:
    """Return the sum of all image features that the language model would receive."""
    layers = [features.pooler_output, *getattr(features, "deepstack_features", [])]
    return torch.stack([each.sum() for layer in layers for each in layer]).sum()


def with_attention_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Make the language model compute attention weights explicitly, and return the model.

    This is slower than a fused kernel, and holds L² weights per head and layer in memory for L tokens.
    """
    language_model(model).set_attn_implementation("eager")
    return model


def attention_heads(model: PreTrainedModel) -> int:
    """Return the number of attention heads in a layer of the language model."""
    return model.config.get_text_config().num_attention_heads


@contextmanager
def _outputs_of(module: nn.Module | None) -> Iterator[list[Any]]:
    """Collect the outputs of a module in the forward passes of this thread; without a module, the list stays empty."""
    caught: list[Any] = []
    if module is None:
        yield caught
        return
    thread = threading.get_ident()

    def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        # Several threads run a teacher on several GPUs at once, and each registers its own hook on the same module. A
        # hook therefore ignores the forward passes of the other threads.
        if threading.get_ident() == thread:
            caught.append(output)

    handle = module.register_forward_hook(catch)
    try:
        yield caught
    finally:
        handle.remove()


def _of_pairs(
    weights: Float[Tensor, "batch heads length length"], pairs: Pairs, inputs: TensorInputs
) -> Float[Tensor, "pairs heads"]:
    # An answer row is a flat position b·L + n; the remainder is n.
    query = (inputs.answer_rows % weights.shape[-1])[pairs.row]
    key = inputs.visual_position[pairs.token]
    return weights[pairs.sample, :, query, key]


def _at_image_tokens(
    states: Float[Tensor, "batch length width"] | tuple[Tensor, ...], inputs: TensorInputs
) -> Float[Tensor, "image_tokens width"]:
    """Return a layer's output at the image tokens, on the device of the inputs.

    In a model that is split over several GPUs, the layer may be on a different GPU.
    """
    states = states[0] if isinstance(states, tuple) else states
    at = (inputs.visual_sample.to(states.device), inputs.visual_position.to(states.device))
    return states[at].to(inputs.input_ids.device)


def freeze(model: nn.Module) -> nn.Module:
    """Put the module into evaluation mode, turn off its gradients, and return it."""
    return model.eval().requires_grad_(False)
