"""Construction of the student from a checkpoint, a configuration or parts; its adapters and its frozen parameters."""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PretrainedConfig, PreTrainedModel

from betakd_ray.batch.sample import IMAGE
from betakd_ray.errors import ModelError
from betakd_ray.models.assemble import CLASS_TOKENS, assembled, require_tower, rows_for, with_image_token, with_row
from betakd_ray.models.completeness import require_complete
from betakd_ray.models.config_keys import misspelt_keys, texts_like_numbers
from betakd_ray.models.load import (
    auto_class,
    load_config,
    load_model,
    load_processor,
    model_skeleton,
    require_images,
    sees_images,
)
from betakd_ray.models.pretrained import from_pretrained, require_safetensors
from betakd_ray.models.quantization import quantization
from betakd_ray.models.vlm import lm_head, part_parameters, parts
from betakd_ray.spec import CheckpointInit, ConfigInit, ModelSpec, PartsInit, StudentSpec


def student_config(student: StudentSpec) -> PretrainedConfig:
    """Return the student's configuration; no weights are read. Raises ModelError."""
    init = student.init
    if isinstance(init, CheckpointInit):
        return _trainable("student.init.path", init, load_config(init))
    if isinstance(init, PartsInit):
        return _assembled(init)[0]
    if init.vision_tower:
        _tower_config(_source(init, init.vision_tower))
    tree = dict(init.config)
    if texts := list(texts_like_numbers(tree, "student.init.config")):
        raise ModelError("; ".join(texts))
    try:
        config = AutoConfig.for_model(tree.pop("model_type"), **tree)
    except KeyError as error:
        raise ModelError(f"student.init.config: model_type {error} is missing or unknown to transformers") from error
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"student.init.config: {error}") from error
    if misspelt := list(misspelt_keys(config, init.config, "student.init.config")):
        raise ModelError("; ".join(misspelt))
    if auto_class(config) is None:
        raise ModelError(
            f"student.init.config: {config.model_type!r} is not a vision–language or causal language model"
        )
    if init.vision_tower and not sees_images(config):
        raise ModelError(f"student.init.vision_tower: {config.model_type!r} has no vision tower. Leave it out.")
    return config


def student_processor(student: StudentSpec) -> Any:
    """Return the student's processor, or its tokenizer if it is a language model. Raises ModelError."""
    init = student.init
    if isinstance(init, PartsInit):
        return _assembled(init)[1]
    source = ModelSpec(path=init.processor, storage=init.storage) if isinstance(init, ConfigInit) else init
    config, processor = student_config(student), load_processor(source)
    require_images(source.path, config, processor)
    return processor


def build_student(student: StudentSpec, dtype: torch.dtype) -> PreTrainedModel:
    """Return the student with its initial weights; parts that `student.train` does not name are frozen.

    Random weights come from torch's global generator: seed it first. Raises ModelError.
    """
    init = student.init
    if isinstance(init, CheckpointInit):
        return _partly_frozen(load_model(init, dtype), student)
    model = _from_config(student, dtype)
    if isinstance(init, PartsInit):
        _copy_language_model(model, _source(init, init.language_model))
    if init.vision_tower:
        _copy_vision_tower(model, _source(init, init.vision_tower))
    return _partly_frozen(model, student)


def student_skeleton(student: StudentSpec, dtype: torch.dtype) -> PreTrainedModel:
    """Return a student like that of `build_student`, but read no weights: for fake tensors. Raises ModelError."""
    if isinstance(student.init, CheckpointInit):
        model = model_skeleton(student.init, dtype)
    else:
        model = _from_config(student, dtype)
    return _partly_frozen(model, student, is_skeleton=True)


def check_adapters(student: StudentSpec) -> None:
    """Raise ModelError if `student.lora` names layers that the language model does not have. No weights are read."""
    if student.lora:
        with torch.device("meta"):
            student_skeleton(student, torch.bfloat16)


def _trainable(field: str, spec: ModelSpec, config: PretrainedConfig) -> PretrainedConfig:
    if method := quantization(spec, config):
        raise ModelError(
            f"{field}: the weights of {spec.path} are quantised ({method}), and cannot be trained. Name the model that "
            "they were made from."
        )
    return config


def _from_config(student: StudentSpec, dtype: torch.dtype) -> PreTrainedModel:
    config = student_config(student)
    return auto_class(config).from_config(config, dtype=dtype)


def _partly_frozen(model: PreTrainedModel, student: StudentSpec, *, is_skeleton: bool = False) -> PreTrainedModel:
    """Freeze the parts that are not trained and add the adapters of `student.lora`; return the model.

    With adapters, they are the only trained parameters of the language model.
    """
    for part, parameters in part_parameters(model).items():
        for parameter in parameters:
            parameter.requires_grad_(part in student.train and not (student.lora and part == "language_model"))
    if student.lora:
        from betakd_ray.models.lora import add_adapters

        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        add_adapters(model, student.lora, is_skeleton=is_skeleton)
        for name in learning:  # peft freezes every parameter that is not an adapter's
            model.get_parameter(name).requires_grad_()
    return model


# ------------------------------------------------------------------------------------------ parts of a student


def _assembled(init: PartsInit) -> tuple[PretrainedConfig, Any]:
    """Return the configuration and the processor of a student made from parts. Raises ModelError."""
    language_model, tower = (_source(init, path) for path in (init.language_model, init.vision_tower))
    text = _trainable("student.init.language_model", language_model, load_config(language_model))
    if sees_images(text):
        raise ModelError(
            f"student.init.language_model: {init.language_model} is a vision–language model with its own projector. "
            "Start from it with kind: checkpoint."
        )
    whole = _tower_config(tower)
    vision = getattr(whole, "vision_config", whole)
    require_tower(f"student.init.vision_tower: {init.vision_tower}", vision)
    tokenizer = with_image_token(load_processor(language_model))
    text.vocab_size = rows_for(tokenizer.get_vocab()[IMAGE], text.vocab_size)
    return assembled(
        text,
        vision,
        tokenizer,
        from_pretrained(AutoImageProcessor, tower),
        projector=init.projector,
        layer=init.vision_feature_layer,
        select="default" if CLASS_TOKENS[vision.model_type] else "full",
    )


def _copy_language_model(model: PreTrainedModel, source: ModelSpec) -> None:
    """Copy the weights and the generation settings of the language model `source` into `model`.

    A missing row for `<image>` is added to embedding and head. The generation settings hold the end-of-sequence tokens.
    """
    original: Any = load_model(source, model.dtype)
    for module in (original.get_input_embeddings(), lm_head(original)):
        module.weight = nn.Parameter(with_row(module.weight.detach(), model.config.image_token_id))
    for copy, part in zip(parts(model)["language_model"], parts(original)["language_model"], strict=True):
        copy.load_state_dict(part.state_dict())
    model.generation_config = original.generation_config


def _copy_vision_tower(model: PreTrainedModel, source: ModelSpec) -> None:
    try:
        _only(parts(model)["vision_tower"]).load_state_dict(_vision_tower(source).state_dict())
    except RuntimeError as error:
        raise ModelError(
            f"student.init.vision_tower: {source.path} does not fit student.init.config.vision_config: {error}"
        ) from error


def _vision_tower(source: ModelSpec) -> nn.Module:
    """Return the vision tower of `source`: a tower, a CLIP, a SigLIP or a vision–language model. Raises ModelError."""
    config = _tower_config(source)
    if auto_class(config) is not None:
        return _only(parts(load_model(source))["vision_tower"])
    own = getattr(config, "vision_config", config)
    options = {"dtype": "auto", "use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    tower, info = from_pretrained(AutoModel, source, config=own, **options)
    require_complete(f"{source.path} (vision tower)", tower, info)
    return tower


def _tower_config(source: ModelSpec) -> PretrainedConfig:
    """Return the configuration of a vision tower, or of the model that contains it. Raises ModelError."""
    config = from_pretrained(AutoConfig, source)
    if auto_class(config) is not None:
        return load_config(source)
    require_safetensors(source, config)
    return config


def _source(init: ConfigInit | PartsInit, path: str) -> ModelSpec:
    return ModelSpec(path=path, storage=init.storage)


def _only(modules: list[nn.Module]) -> nn.Module:
    (module,) = modules
    return module
