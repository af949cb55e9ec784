"""Loading of a model by path, hub id or URL: configuration, processor, weights, or a skeleton without weights."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from betakd_ray.errors import ModelError
from betakd_ray.models.compatibility import check_processor
from betakd_ray.models.completeness import recorded_loading, require_complete
from betakd_ray.models.pretrained import from_pretrained, require_safetensors
from betakd_ray.models.quantization import quantization
from betakd_ray.models.split import device_map
from betakd_ray.spec import ModelSpec, TeacherSpec

CPU = torch.device("cpu")


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """Return the configuration of a model, without its weights.

    Raises ModelError if it cannot be read, if the model is of no supported kind, or if its weights are in a pickle.
    """
    config = from_pretrained(AutoConfig, spec)
    if hasattr(config, "mm_projector_type"):  # transformers would load it as a LLaVA with random weights
        raise ModelError(
            f"{spec.path}: is in its authors' layout. Run: betakd convert {spec.path} FOLDER, and name that folder."
        )
    if auto_class(config, is_trusted=spec.trust_remote_code) is None:
        raise ModelError(
            f"{spec.path}: a {config.model_type!r} is neither a vision–language model nor a causal language model "
            "of transformers (AutoModelForImageTextToText, AutoModelForCausalLM). Name such a model, e.g. a LLaVA."
        )
    require_safetensors(spec, config)
    return config


def load_processor(spec: ModelSpec) -> Any:
    """Return the processor of a vision–language model, or the tokenizer of a language model. Raises ModelError."""
    processor = from_pretrained(AutoTokenizer if spec.gguf_file else AutoProcessor, spec)
    if isinstance(processor, PreTrainedTokenizerBase):
        return processor
    if getattr(processor, "image_processor", None) is None or not hasattr(processor, "image_token_id"):
        raise ModelError(
            f"{spec.path}: {type(processor).__name__} has no image processor, or no tokenizer with an image token"
        )
    return processor


def load_model(
    spec: ModelSpec, dtype: torch.dtype | str = "auto", devices: Sequence[torch.device] = (CPU,)
) -> PreTrainedModel:
    """Return a model with weights in `dtype`, in evaluation mode, on one device or split over several (`models.split`).

    A teacher's `options` may give another `device_map`. Quantised weights of a GGUF are unpacked. Raises ModelError,
    and WeightsIncomplete if the checkpoint has not exactly the weights of the model.
    """
    config = load_config(spec)
    extra: dict[str, Any] = deepcopy(spec.options) if isinstance(spec, TeacherSpec) else {}
    if spec.attn_implementation:
        extra["attn_implementation"] = spec.attn_implementation
    if "device_map" not in extra:
        if len(devices) > 1:
            with torch.device("meta"):
                extra["device_map"] = device_map(model_skeleton(spec, dtype), devices)
        elif quantization(spec, config):  # quantised weights are made for one device and cannot be moved
            extra["device_map"] = {"": devices[0]}
    if spec.gguf_file:  # packed weights can be neither trained nor saved
        extra["quantization_config"] = GgufConfig(dequantize=True)
    extra["ignore_mismatched_sizes"] = True  # not to ignore them: `require_complete` says more than transformers
    with recorded_loading() as loadings:
        model, of_adapters = from_pretrained(
            auto_class(config, is_trusted=spec.trust_remote_code),
            spec,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **extra,
        )
    for each, info in [*loadings, (model, of_adapters)]:
        require_complete(f"{spec.path}/{spec.gguf_file}" if spec.gguf_file else spec.path, each, info)
    model.eval()
    return model if "device_map" in extra else model.to(devices[0])


def model_skeleton(spec: ModelSpec, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Return a model made only from its configuration, for fake tensors. Raises ModelError.

    With "auto", the dtype is the one in the configuration.
    """
    config = load_config(spec)
    return auto_class(config, is_trusted=spec.trust_remote_code).from_config(
        config,
        dtype=(config.dtype or torch.float32) if dtype == "auto" else dtype,
        attn_implementation=spec.attn_implementation,
        trust_remote_code=spec.trust_remote_code,
    )


def auto_class(config: PretrainedConfig, *, is_trusted: bool = False) -> Any:
    """Return the auto class of transformers that loads a model with this configuration, or None if there is none.

    A vision–language model is loaded as one, any other model as a causal language model. With `is_trusted`, classes
    in the model's own code count too, if the configuration names them.
    """
    own_code = (getattr(config, "auto_map", None) or {}) if is_trusted else {}
    for found, mapping in (
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    ):
        if found.__name__ in own_code or type(config) in mapping:
            return found
    return None


def sees_images(config: PretrainedConfig) -> bool:
    """Return whether the configuration is that of a vision–language model."""
    return getattr(config, "vision_config", None) is not None


def require_images(path: str, config: PretrainedConfig, processor: Any) -> None:
    """Raise ModelError for a processor that does not belong to the model, or lacks what the model needs.

    It lacks an image processor or the size of its patches, or its tokenizer has ids without a row of the embedding.
    """
    check_processor(path, config, processor)
    if sees_images(config) and isinstance(processor, PreTrainedTokenizerBase):
        raise ModelError(f"{path}: has only a tokenizer, which accepts no images; add the processor's files")
