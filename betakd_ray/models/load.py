"""Models by path, hub id, URL or configuration; what a spec names becomes weights only here.

Weights are read from safetensors, or from a GGUF that the spec names, and from nothing else: neither holds code. Code
beside a checkpoint runs only where the spec says `trust_remote_code`.
"""

import difflib
import hashlib
import inspect
import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, has_file
from transformers.utils.import_utils import is_gguf_available

import betakd_ray.models.mobilevlm  # noqa: F401 (makes the family known to transformers)
from betakd_ray.errors import ModelError
from betakd_ray.models.assemble import (
    CLASS_TOKENS,
    IMAGE,
    assembled,
    require_tower,
    rows_for,
    with_image_token,
    with_row,
)
from betakd_ray.models.split import device_map
from betakd_ray.models.vlm import lm_head, part_parameters, parts
from betakd_ray.spec import CheckpointInit, ConfigInit, ModelSpec, PartsInit, StorageSpec, StudentSpec, TeacherSpec
from betakd_ray.storage import join, open_store

CPU = torch.device("cpu")


def local_folder(location: str, storage: StorageSpec, only: str | None = None) -> str:
    """A folder or hub id as it is; a URL, or only a file of it, copied to this node's cache once."""
    if "://" not in location:
        return location
    filesystem, path = open_store(location, storage)
    source = join(path, only) if only else path
    cache = Path(os.environ.get("BETAKD_CACHE", Path.home() / ".cache" / "betakd")) / "models"
    try:
        listing = cast(dict[str, Any], filesystem.find(source, detail=True))  # a list only without detail
    except OSError as error:
        raise ModelError(f"{location}: cannot be listed ({error})") from error
    if not listing:
        raise ModelError(f"{location}: no {only or 'files'} there. Give the folder that holds {only or 'config.json'}.")
    state = repr(sorted((name, info.get("size"), str(info.get("ETag", ""))) for name, info in listing.items()))
    target = cache / hashlib.sha256((location + state).encode()).hexdigest()[:20]
    if not target.exists():
        # Two processes of a node may copy at once; the rename decides, and a half copy is never seen.
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        if only:
            (partial / only).parent.mkdir(parents=True, exist_ok=True)
            filesystem.get(source, str(partial / only))
        else:
            filesystem.get(source.rstrip("/") + "/", str(partial) + "/", recursive=True)
        try:
            partial.rename(target)
        except OSError:
            if not target.exists():
                raise
    return str(target)


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """The configuration alone.

    Raises ModelError if it cannot be read, is no model that this trains, or has its weights in a pickle.
    """
    config = _from_pretrained(AutoConfig, spec)
    if hasattr(config, "mm_projector_type"):  # transformers would take it for a LLaVA, with random weights
        raise ModelError(
            f"{spec.path}: is in its authors' layout. Run: betakd convert {spec.path} FOLDER, and name that folder."
        )
    if _auto_class(config, is_trusted=spec.trust_remote_code) is None:
        raise ModelError(
            f"{spec.path}: a {config.model_type!r} is neither a vision–language model nor a causal language model "
            "(AutoModelForImageTextToText, AutoModelForCausalLM) of transformers. Name one such as LLaVA."
        )
    _require_safetensors(spec, config)
    return config


def _auto_class(config: PretrainedConfig, *, is_trusted: bool = False) -> Any:
    """What loads it: as a vision–language model where it is one, else as a causal language model; or None."""
    own_code = (getattr(config, "auto_map", None) or {}) if is_trusted else {}
    for auto_class, mapping in (
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    ):
        if auto_class.__name__ in own_code or type(config) in mapping:
            return auto_class
    return None


def sees_images(config: PretrainedConfig) -> bool:
    """Whether it is a vision–language model's."""
    return getattr(config, "vision_config", None) is not None


def load_processor(spec: ModelSpec) -> Any:
    """Tokenizer and image processor of a model; of a language model its tokenizer. Raises ModelError."""
    processor = _from_pretrained(AutoTokenizer if spec.gguf_file else AutoProcessor, spec)
    if isinstance(processor, PreTrainedTokenizerBase):
        return processor
    if getattr(processor, "image_processor", None) is None or not hasattr(processor, "image_token_id"):
        raise ModelError(f"{spec.path}: {type(processor).__name__} has no image processor with a tokenizer beside it")
    return processor


def require_images(path: str, config: PretrainedConfig, processor: Any) -> None:
    """Raises ModelError for a vision–language model that comes with nothing that would read its images."""
    if sees_images(config) and isinstance(processor, PreTrainedTokenizerBase):
        raise ModelError(f"{path}: there is only a tokenizer, which takes no images; add the processor's files")


def load_model(
    spec: ModelSpec, dtype: torch.dtype | str = "auto", devices: Sequence[torch.device] = (CPU,)
) -> PreTrainedModel:
    """Weights in `dtype`, in evaluation mode, on a device or over several (`models.split`).

    A teacher's `options` may name another `device_map`. Weights of a GGUF are unpacked. Raises ModelError.
    """
    config = load_config(spec)
    extra: dict[str, Any] = deepcopy(spec.options) if isinstance(spec, TeacherSpec) else {}
    if spec.attn_implementation:
        extra["attn_implementation"] = spec.attn_implementation
    if "device_map" not in extra:
        if len(devices) > 1:
            with torch.device("meta"):
                extra["device_map"] = device_map(model_skeleton(spec, dtype), devices)
        elif quantization(spec, config):  # is made for the device that it is loaded to, and may not be moved
            extra["device_map"] = {"": devices[0]}
    if spec.gguf_file:  # packed they could be neither trained nor saved
        extra["quantization_config"] = GgufConfig(dequantize=True)
    model, info = _from_pretrained(
        _auto_class(config, is_trusted=spec.trust_remote_code),
        spec,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        **extra,
    )
    if spec.gguf_file and (missing := info["missing_keys"]):  # transformers would make them at random
        raise ModelError(f"{spec.path}/{spec.gguf_file}: has not all of the weights, e.g. none for {min(missing)}")
    model.eval()
    return model if "device_map" in extra else model.to(devices[0])


def check_options(spec: TeacherSpec, config: PretrainedConfig) -> None:
    """Raises ModelError for an option that neither transformers nor the teacher's configuration knows, and for a
    quantisation that cannot be read, or whose package is not here. No weights are read.
    """
    given = {name: value for name, value in spec.options.items() if name != "quantization_config"}
    if given and not spec.trust_remote_code:  # code of its own may take any
        _check_keywords(spec, given, config)
    asked = spec.options.get("quantization_config")
    if settings := asked or _own_quantization(config):
        _check_quantization(spec, settings, is_own=not asked)


def _check_keywords(spec: TeacherSpec, given: dict[str, Any], config: PretrainedConfig) -> None:
    try:
        # As from_pretrained does it: what the configuration does not take is a keyword, or of the model's __init__.
        _, others = _from_pretrained(AutoConfig, spec, return_unused_kwargs=True, **given)
    except (ModelError, TypeError) as error:
        raise ModelError(f"teacher.options: {error}") from error
    known = _loading_keywords()
    if not others.keys() <= known:
        with torch.device("meta"):
            known |= inspect.signature(type(model_skeleton(spec)).__init__).parameters.keys()
    if unknown := sorted(others.keys() - known):
        name = unknown[0]
        close = difflib.get_close_matches(name, known | config.to_dict().keys(), n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "Leave it out."
        raise ModelError(
            f"teacher.options.{name}: is no keyword of transformers' from_pretrained, and no setting of a "
            f"{config.model_type!r}. {hint}"
        )


_RETIRED = {"from_flax", "from_tf", "low_cpu_mem_usage", "mirror", "offload_state_dict"}
"""Keywords that from_pretrained takes, and no longer heeds."""


def _loading_keywords() -> set[str]:
    """Of from_pretrained: in its signature, or taken out of its **kwargs, of which there is no other list."""
    function = inspect.unwrap(PreTrainedModel.from_pretrained)
    popped = re.findall(r'kwargs\.pop\(\s*"(\w+)"', inspect.getsource(function))
    return {*inspect.signature(function).parameters, *popped, *_RETIRED}


def quantization(spec: ModelSpec, config: PretrainedConfig) -> str | None:
    """The method by which a model's weights are packed when they are loaded; None if they are plain numbers."""
    asked = spec.options.get("quantization_config") if isinstance(spec, TeacherSpec) else None
    found = asked or _own_quantization(config)
    # bitsandbytes alone may be asked for without a name
    return str(found.get("quant_method") or "bitsandbytes") if found else None


def _own_quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """Of the weights as they are stored."""
    found = (getattr(each, "quantization_config", None) for each in (config, config.get_text_config()))
    return next(filter(None, found), None)


def _check_quantization(spec: TeacherSpec, settings: dict[str, Any], *, is_own: bool) -> None:
    where = f"{spec.path}: its quantization_config" if is_own else "teacher.options.quantization_config"
    try:
        quantizer = AutoHfQuantizer.from_config(deepcopy(settings), pre_quantized=is_own)
    except (ValueError, TypeError, KeyError, AssertionError, ImportError) as error:
        raise ModelError(f"{where}: transformers cannot read it: {error}") from error
    try:
        quantizer.validate_environment(device_map=None, weights_only=True)
    except ImportError as error:
        raise ModelError(f"{where}: {error}") from error
    except (RuntimeError, ValueError, NotImplementedError):
        pass  # the devices are not those that the teacher will have


def student_processor(student: StudentSpec) -> Any:
    """Tokenizer and image processor of a student; of a language model its tokenizer. Raises ModelError."""
    init = student.init
    if isinstance(init, PartsInit):
        return _assembled(init)[1]
    source = ModelSpec(path=init.processor, storage=init.storage) if isinstance(init, ConfigInit) else init
    config, processor = student_config(student), load_processor(source)
    require_images(source.path, config, processor)
    return processor


def student_config(student: StudentSpec) -> PretrainedConfig:
    """The student's configuration, without weights. Raises ModelError."""
    init = student.init
    if isinstance(init, CheckpointInit):
        return _trainable("student.init.path", init, load_config(init))
    if isinstance(init, PartsInit):
        return _assembled(init)[0]
    if init.vision_tower:
        _tower_config(_source(init, init.vision_tower))
    tree = dict(init.config)
    try:
        config = AutoConfig.for_model(tree.pop("model_type"), **tree)
    except KeyError as error:
        raise ModelError(f"student.init.config: model_type {error} is missing or unknown to transformers") from error
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"student.init.config: {error}") from error
    if _auto_class(config) is None:
        raise ModelError(f"student.init.config: {config.model_type!r} is no vision–language or causal language model")
    if init.vision_tower and not sees_images(config):
        raise ModelError(f"student.init.vision_tower: {config.model_type!r} has no vision tower. Leave it out.")
    return config


def _trainable(field: str, spec: ModelSpec, config: PretrainedConfig) -> PretrainedConfig:
    if method := quantization(spec, config):
        raise ModelError(
            f"{field}: the weights of {spec.path} are quantised ({method}), and cannot learn. Name the model that they "
            "were made from."
        )
    return config


def build_student(student: StudentSpec, dtype: torch.dtype) -> PreTrainedModel:
    """The student with its initial weights, frozen where `student.train` does not name a part. Raises ModelError.

    Random weights come from torch's global generator: seed it first.
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
    """The student as `build_student` makes it, with none of its weights read: for fake tensors. Raises ModelError."""
    if isinstance(student.init, CheckpointInit):
        model = model_skeleton(student.init, dtype)
    else:
        model = _from_config(student, dtype)
    return _partly_frozen(model, student, is_skeleton=True)


def _from_config(student: StudentSpec, dtype: torch.dtype) -> PreTrainedModel:
    config = student_config(student)
    return _auto_class(config).from_config(config, dtype=dtype)


def model_skeleton(spec: ModelSpec, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A model from its configuration alone, for fake tensors; "auto" is the dtype in it. Raises ModelError."""
    config = load_config(spec)
    return _auto_class(config).from_config(
        config,
        dtype=(config.dtype or torch.float32) if dtype == "auto" else dtype,
        attn_implementation=spec.attn_implementation,
        trust_remote_code=spec.trust_remote_code,
    )


def _partly_frozen(model: PreTrainedModel, student: StudentSpec, *, is_skeleton: bool = False) -> PreTrainedModel:
    """With its adapters, if it is to have some; they alone learn in the language model then."""
    for part, parameters in part_parameters(model).items():
        for parameter in parameters:
            parameter.requires_grad_(part in student.train and not (student.lora and part == "language_model"))
    if student.lora:
        from betakd_ray.models.lora import add_adapters

        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        add_adapters(model, student.lora, is_skeleton=is_skeleton)
        for name in learning:  # peft freezes all that is not its own
            model.get_parameter(name).requires_grad_()
    return model


def check_adapters(student: StudentSpec) -> None:
    """Raises ModelError for adapters that the student's language model has no layers for. No weights are read."""
    if student.lora:
        with torch.device("meta"):
            student_skeleton(student, torch.bfloat16)


# ------------------------------------------------------------------------------------------ parts of a student


def _assembled(init: PartsInit) -> tuple[PretrainedConfig, Any]:
    """Configuration and processor of a student in parts. Raises ModelError."""
    language_model, tower = (_source(init, path) for path in (init.language_model, init.vision_tower))
    text = _trainable("student.init.language_model", language_model, load_config(language_model))
    if sees_images(text):
        raise ModelError(
            f"student.init.language_model: {init.language_model} is a vision–language model, and has a projector. "
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
        _from_pretrained(AutoImageProcessor, tower),
        projector=init.projector,
        layer=init.vision_feature_layer,
        select="default" if CLASS_TOKENS[vision.model_type] else "full",
    )


def _copy_language_model(model: PreTrainedModel, source: ModelSpec) -> None:
    """With a row for `<image>` where there was none, and the ends of sequence that it generates to."""
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
    """By itself, or out of a CLIP, a SigLIP or a vision–language model. Raises ModelError."""
    config = _tower_config(source)
    if _auto_class(config) is not None:
        return _only(parts(load_model(source))["vision_tower"])
    own = getattr(config, "vision_config", config)
    options = {"dtype": "auto", "use_safetensors": True, "output_loading_info": True}
    tower, info = _from_pretrained(AutoModel, source, config=own, **options)
    if missing := info["missing_keys"]:
        raise ModelError(f"{source.path}: has no vision tower's weights, e.g. no {min(missing)}")
    return tower


def _tower_config(source: ModelSpec) -> PretrainedConfig:
    """Of a vision tower, or of the model that it is a part of. Raises ModelError."""
    config = _from_pretrained(AutoConfig, source)
    if _auto_class(config) is not None:
        return load_config(source)
    _require_safetensors(source, config)
    return config


def _source(init: ConfigInit | PartsInit, path: str) -> ModelSpec:
    return ModelSpec(path=path, storage=init.storage)


def _only(modules: list[nn.Module]) -> nn.Module:
    (module,) = modules
    return module


# ------------------------------------------------------------------------------------------ what is read


def _from_pretrained(auto_class: Any, spec: ModelSpec, **options: Any) -> Any:
    problem = "cannot load it"
    if spec.gguf_file:
        problem = f"cannot load {spec.gguf_file} (fetch it again, or name a model in safetensors)"
    with _explained(spec, f"{auto_class.__name__} {problem}"):
        if spec.gguf_file:
            file = _gguf(spec, spec.gguf_file)
            # By its whole path: a bare name transformers would look for in the working directory first.
            place, options = str(file.parent), {**options, "gguf_file": str(file)}
        else:
            place = local_folder(spec.path, spec.storage)
        return auto_class.from_pretrained(
            place, revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code, **options
        )


def _gguf(spec: ModelSpec, name: str) -> Path:
    """The GGUF on this node. Raises ModelError for what transformers would not read, or only a part of."""
    if not is_gguf_available():
        raise ModelError(f"gguf_file: {name} is read by the package gguf: pip install 'betakd_ray[gguf]'")
    with _explained(spec, f"gguf_file {name} cannot be found"):
        folder = local_folder(spec.path, spec.storage, only=name)
        if os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, name)):
            there = sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*.gguf"))
            raise ModelError(f"{spec.path}: has no {name}. Its GGUFs are: {', '.join(there) or 'none'}.")
        found = cached_file(folder, name, revision=spec.revision or "main")
    assert found is not None
    try:
        metadata, tensors = read_gguf_metadata(found)
        architecture = metadata["general.architecture"]
    except (ValueError, IndexError, OverflowError, struct.error) as error:
        raise ModelError(
            f"{spec.path}/{name}: is no GGUF, or a damaged one ({error}). Fetch or convert it again."
        ) from error
    if "rope_freqs.weight" in tensors or metadata.get(f"{architecture}.rope.scaling.type", "none") != "none":
        raise ModelError(
            f"{spec.path}/{name}: scales its rotary positions, as Llama 3.1 does; transformers leaves that out of a "
            "GGUF, and its answers would be others. Name the model in safetensors."
        )
    if (files := metadata.get("split.count", 1)) > 1:
        raise ModelError(
            f"{spec.path}/{name}: is one of {files} files of a model, of which transformers would read this one alone. "
            "Merge them with llama.cpp's llama-gguf-split --merge."
        )
    return Path(found)


def _require_safetensors(spec: ModelSpec, config: PretrainedConfig) -> None:
    """Raises ModelError where transformers would come to a pickle. It is not opened, nor fetched from a hub."""
    if spec.gguf_file:  # numbers and text, and the only file that is read
        return
    with _explained(spec, "its weights cannot be found"):
        files = _weight_files(local_folder(spec.path, spec.storage), spec.revision or "main", config)
    if pickles := [file for file in files if not file.endswith(".safetensors")]:
        raise ModelError(
            f"{spec.path}: its weights are in {pickles[0]}, a pickle, which can run code when it is loaded. Name a "
            "model in safetensors, or, if you trust this one, convert it: transformers' from_pretrained and then "
            "save_pretrained into another folder, whose path to give here."
        )


def _weight_files(folder: str, revision: str, config: PretrainedConfig) -> set[str]:
    """Where transformers would find weights, of a folder or hub id; nothing if they are not there, or not yet."""
    named = getattr(config, "transformers_weights", None)
    names = [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME]
    first = next((name for name in names if has_file(folder, name, revision=revision)), None)
    if first is None or not first.endswith(".index.json"):
        return {first} if first else set()
    index = cached_file(folder, first, revision=revision)
    assert index is not None
    return set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())


@contextmanager
def _explained(spec: ModelSpec, problem: str) -> Iterator[None]:
    """What transformers raises, as ModelError."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, TypeError, StrictDataclassError) as error:
        said = str(error).strip() or type(error).__name__
        if isinstance(error, StrictDataclassError):  # says which field, and then what is wrong with it
            said = " ".join(said.split())
        if "trust_remote_code" in said and not spec.trust_remote_code:
            raise ModelError(
                f"{spec.path}: comes with code of its own, which was not run. Read it; if you trust it, set "
                "trust_remote_code: true beside this path, and revision to the commit that you read."
            ) from error
        raise ModelError(f"{spec.path}: {problem}: {said.splitlines()[0]}") from error
