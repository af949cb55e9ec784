"""What training needs of a model, whatever its family: its parts, its head, and its last hidden states.

transformers gives every image–text-to-text model the same outline: a base model with `get_image_features`, which runs
vision tower and projector, and a forward that takes their tokens and runs the language model; an output embedding turns
its last hidden states into logits. Families differ in what their parts are called and in what goes with the pixels. A
causal language model is the same without images.
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

from betakd_ray.batch.images import PIXELS, Normalization
from betakd_ray.batch.inputs import Pairs, TensorInputs
from betakd_ray.errors import ModelError
from betakd_ray.models.hidden import Hidden
from betakd_ray.spec import Part

_NAMES: dict[Part, tuple[str, ...]] = {
    "language_model": ("language_model", "text_model"),
    "projector": ("multi_modal_projector", "connector", "projector"),
    "vision_tower": ("vision_tower", "vision_model", "visual"),
}
_MERGERS = ("merger", "deepstack_merger_list")
"""Qwen's projectors, which are inside of its vision tower."""


def parts(model: PreTrainedModel) -> dict[Part, list[nn.Module]]:
    """The model's parts by the names a spec uses; the lm_head goes with the language model.

    A model without images is a language model, and has nothing else. Raises ModelError for a vision–language model in
    which the parts cannot be told apart.
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
    """Every parameter of the model, in the one part it belongs to.

    What stands between the parts (LLaVA-NeXT's `image_newline`) goes with the projector. Raises ModelError as `parts`.
    """
    owners: dict[nn.Parameter, Part] = {}
    of_parts = parts(model)
    for part in ("projector", "vision_tower", "language_model"):  # Qwen's projector is inside of its tower
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
    """The model without its head."""
    return model.base_model


def language_model(model: PreTrainedModel) -> Any:
    """The language model without its head."""
    return parts(model)["language_model"][0]


def lm_head(model: PreTrainedModel) -> nn.Linear:
    """What makes logits of the last hidden states. Raises ModelError where that is not one matrix and nothing else."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no lm_head of one matrix; choose a causal language model, and a quantisation "
            "that leaves the head as it is"
        )
    weight: Tensor | None = getattr(head, "weight", None)  # some quantisations keep it under other names
    # A subclass says that it has the numbers' dtype, and holds others.
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
            f"{type(model).__name__} changes its logits after the matrix ({', '.join(scaled) or 'bias'}); energies are "
            "computed from hidden states and one matrix. Choose a family without, e.g. of Llama or Qwen."
        )
    return head


_NUMBERS = (torch.float32, torch.bfloat16, torch.float16)
_LOGIT_SETTINGS = ("logit_scale", "logits_scaling", "final_logit_softcapping", "lm_head_multiplier")


def takes_images(model: PreTrainedModel) -> bool:
    """Whether it is a vision–language model."""
    return hasattr(base_model(model), "get_image_features")


def hidden_rows(
    model: PreTrainedModel,
    inputs: TensorInputs,
    normalize: Normalization,
    blank: dict[str, Tensor] | None = None,
    pairs: Pairs | None = None,
    layer: int | None = None,
) -> Hidden:
    """Run a model to its answer rows; no logits are computed.

    Rows of prompt, image and padding never reach the vocabulary. In training, a micro-batch without images sees
    `blank`, with a weight of zero: ranks must agree about which parameters have a gradient, and ZeRO-3's about which
    modules run, in which order. With `pairs`, their attention in the first layer comes along; the model then has to be
    `with_attention_weights`. With `layer`, counted from 1, its output at the image tokens does.
    """
    images = inputs.images or blank
    features = None
    if images:
        features = base_model(model).get_image_features(**normalize.of_images(images, model.dtype), return_dict=True)
    beside = _beside_features(model, inputs) | {"mm_encoder_outputs": {"image": features}} if inputs.images else {}
    layers = language_model(model).layers if pairs or layer else []
    with (
        _outputs_of(layers[0].self_attn if pairs else None) as attended,
        _outputs_of(layers[layer - 1] if layer else None) as states,
    ):
        # Without the mask of the padding: it is on the right, where causal attention does not look, and nobody reads
        # its own rows. With one, attention leaves its fast kernels, and transformers waits for the device to see
        # whether anything is masked.
        output = base_model(model)(input_ids=inputs.input_ids, attention_mask=None, use_cache=False, **beside)
    rows = output.last_hidden_state.flatten(0, 1)[inputs.answer_rows]
    attention = _of_pairs(attended[0][1], pairs, inputs) if pairs else None
    if features is None:
        return Hidden(rows, None, attention=attention)
    if not inputs.images:
        return Hidden(rows + 0.0 * _sum(features), None, attention=attention)
    visual_layer = _at_image_tokens(states[0], inputs) if layer else None
    return Hidden(rows, torch.cat(list(features.pooler_output)), visual_layer, attention)


def with_image_tokens(model: PreTrainedModel, input_ids: Tensor, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """A forward's arguments for images: themselves, and where the family asks which tokens are theirs, that."""
    if "mm_token_type_ids" not in _arguments(type(base_model(model))):
        return images
    return {**images, "mm_token_type_ids": (input_ids == model.config.image_token_id).int()}


def _beside_features(model: PreTrainedModel, inputs: TensorInputs) -> dict[str, Tensor]:
    """What the language model asks of the images, their features apart: Qwen's positions are made of the grid."""
    asked = with_image_tokens(model, inputs.input_ids, inputs.images)
    known = _arguments(type(base_model(model)))
    return {name: value for name, value in asked.items() if name != PIXELS and name in known}


@cache
def _arguments(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def _sum(features: Any) -> Tensor:
    """Sum all features that the language model would see of an image."""
    layers = [features.pooler_output, *getattr(features, "deepstack_features", [])]
    return torch.stack([each.sum() for layer in layers for each in layer]).sum()


def with_attention_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a language model that computes attention in the open: slower, and with memory for L² weights."""
    language_model(model).set_attn_implementation("eager")
    return model


def attention_heads(model: PreTrainedModel) -> int:
    """Return the number of attention heads of a layer of the language model."""
    return model.config.get_text_config().num_attention_heads


@contextmanager
def _outputs_of(module: nn.Module | None) -> Iterator[list[Any]]:
    """Catch what a module returns in each forward that this thread runs; of no module, nothing."""
    caught: list[Any] = []
    if module is None:
        yield caught
        return
    thread = threading.get_ident()

    def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        # A teacher over several GPUs is run by several threads at once, and each registers a hook of its own.
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
    query = (inputs.answer_rows % weights.shape[-1])[pairs.row]
    key = inputs.visual_position[pairs.token]
    return weights[pairs.sample, :, query, key]


def _at_image_tokens(
    states: Float[Tensor, "batch length width"] | tuple[Tensor, ...], inputs: TensorInputs
) -> Float[Tensor, "image_tokens width"]:
    """Select the image tokens from what a layer returns; the layer may be on another GPU than the inputs."""
    states = states[0] if isinstance(states, tuple) else states
    at = (inputs.visual_sample.to(states.device), inputs.visual_position.to(states.device))
    return states[at].to(inputs.input_ids.device)


def freeze(model: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients."""
    return model.eval().requires_grad_(False)
