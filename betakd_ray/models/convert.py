"""Conversion of checkpoints in their authors' formats into folders that transformers loads.

Two layouts are read: the flat one of LLaVA, MobileVLM V2 and TinyLLaVA's first models (a language model's configuration
with additional `mm_…` fields), and the nested one of TinyLLaVA Factory. A weight without a place in the model and a
parameter without a weight are both errors, so no parameter keeps random values.
"""

import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.import_utils import is_sentencepiece_available

from betakd_ray.batch.sample import IMAGE
from betakd_ray.errors import ModelError, OutputError
from betakd_ray.models.assemble import CLASS_TOKENS, assembled, require_tower, with_image_token, with_row
from betakd_ray.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from betakd_ray.models.source import local_folder
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import whole_folder

Names = Mapping[str, str]
"""Prefix of a weight's name → its prefix in transformers. The first prefix that matches is used."""

VISION, PROJECTOR, LANGUAGE = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
EMBEDDING, HEAD = f"{LANGUAGE}embed_tokens.weight", "lm_head.weight"
# The order matters: "model." is also the beginning of the two prefixes before it.
FLAT: Names = {
    "model.vision_tower.vision_tower.vision_model.": VISION,
    "model.mm_projector.": PROJECTOR,
    "model.": LANGUAGE,
    "lm_head.": "lm_head.",
}
NESTED: Names = {
    "vision_tower._vision_tower.vision_model.": VISION,
    "connector._connector.": PROJECTOR,
    "language_model.model.": LANGUAGE,
    "language_model.lm_head.": "lm_head.",
}
TOWER: Names = {"vision_model.": VISION}
"""Prefixes of the vision tower's weights in CLIP and SigLIP, which have a text tower too."""
PROJECTORS: Mapping[str, Names] = {
    "mlp2x_gelu": {"0.": "linear_1.", "2.": "linear_2."},
    "ldpnetv2": {"mlp.mlp.0.": "linear_1.", "mlp.mlp.2.": "linear_2.", "peg.peg.0.": "peg."},
}
COMPUTED = ("inv_freq", "position_ids")
"""Endings of the names of buffers that older versions of transformers saved with the weights."""
LANGUAGE_MODELS = {"Llama": "llama", "Mistral": "mistral", "Qwen": "qwen2"}
"""Part of the architecture's name in the flat layout → model type in transformers."""
SELECTS = {"patch": "default", "cls_patch": "full"}


@dataclass(frozen=True)
class Original:
    """Content of an original configuration, with the same fields for both layouts."""

    names: Names
    projector: str
    tower: str
    """Folder or hub id of the vision tower."""
    text: PretrainedConfig
    layer: int
    select: str
    """Image tokens that the projector gets: `patch` (without the first token) or `cls_patch` (all tokens)."""
    needs_class_token: bool
    """True if `patch` keeps all tokens of a tower that has no class token."""


def convert(
    source: str, target: str | Path, *, vision_tower: str | None = None, allow_pickle: bool = False
) -> PreTrainedModel:
    """Write the original-format checkpoint `source` (folder, hub id or URL) into the folder `target`.

    `vision_tower` replaces the vision tower that the configuration names. Its configuration and image processor are
    read; its weights are read if the checkpoint has none. Pickled weights need `allow_pickle`, and may hold tensors
    only. All weights get the dtype of the language model. The whole model is held in memory. Raises ModelError and
    OutputError.
    """
    with new_folder(target) as written:
        model, processor = _converted(source, vision_tower, allow_pickle)
        model.save_pretrained(written)
        processor.save_pretrained(written)
    return model


def _converted(source: str, vision_tower: str | None, allow_pickle: bool) -> tuple[PreTrainedModel, Any]:
    """Return the model of an original-format checkpoint, and its processor."""
    folder = fetch(source, allow_pickle)
    original = _read(folder / "config.json")
    tower = fetch(vision_tower or original.tower, allow_pickle)
    weights = _renamed(folder, original.names, allow_pickle)
    projector = {PROJECTOR + old: PROJECTOR + new for old, new in PROJECTORS[original.projector].items()}
    weights = {renaming(name, projector): weight for name, weight in weights.items()}
    if EMBEDDING not in weights:
        raise ModelError(f"{folder}: has no weights of a language model (an adapter alone is not enough)")
    if not any(name.startswith(VISION) for name in weights):
        weights |= _renamed(tower, TOWER, allow_pickle, only_these=True)
    tokenizer = _tokenizer(folder)
    for name in {EMBEDDING, HEAD} & weights.keys():
        weights[name] = with_row(weights[name], tokenizer.get_vocab()[IMAGE])
    config, processor = _configured(original, tower, tokenizer, len(weights[EMBEDDING]))
    return _filled(config, weights), processor


def renaming(name: str, names: Names) -> str:
    """Return the name with its prefix replaced, or unchanged if no prefix matches."""
    old = next((old for old in names if name.startswith(old)), "")
    return names.get(old, "") + name.removeprefix(old)


# ------------------------------------------------------------------------------------------ folders


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Yield a folder to write to, which has the name `target` after the block, and is gone after an error.

    Raises OutputError if `target` exists and is not empty, or if the disk is full.
    """
    folder = Path(target).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{target}: exists and is not empty. Name a new folder.")
    with whole_folder(folder) as written:
        yield written


def fetch(location: str, allow_pickle: bool = False) -> Path:
    """Return `location` if it is a folder, otherwise this machine's copy of the URL or hub id. Raises ModelError."""
    if "://" in location:
        return Path(local_folder(location, StorageSpec()))
    if Path(location).is_dir():
        return Path(location)
    patterns = ["*.json", "*.model", "*.safetensors", *(["*.bin"] if allow_pickle else [])]
    try:
        return Path(snapshot_download(location, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{location}: is not a folder, and cannot be fetched from a hub: {error}. If a configuration names it as "
            "its vision tower, give --vision-tower."
        ) from error


def _weights(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if files := _files(folder, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        return {name: weight for file in files for name, weight in load_file(file).items()}
    files = _files(folder, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    if not files:
        raise ModelError(f"{folder}: has no {SAFE_WEIGHTS_NAME}, no {WEIGHTS_NAME}, and no index of several files")
    if not allow_pickle:
        raise ModelError(
            f"{files[0]}: the weights are in a pickle. Give --allow-pickle to read it: only tensors are read, and no "
            "code in it is run."
        )
    return {name: weight for file in files for name, weight in _unpickled(file).items()}


def _files(folder: Path, name: str, index: str) -> list[Path]:
    if (folder / index).exists():
        return sorted({folder / file for file in _json(folder / index)["weight_map"].values()})
    return [folder / name] if (folder / name).exists() else []


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(f"{file}: holds more than tensors, so it was not read: {error}") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file}: does not exist") from error
    except ValueError as error:
        raise ModelError(f"{file}: is not JSON: {error}") from error


# ------------------------------------------------------------------------------------------ configurations


def _read(file: Path) -> Original:
    config = _json(file)
    if config.get("model_type") == "tinyllava":
        original = _nested(file, config)
    elif "mm_projector_type" in config and "text_config" not in config:
        original = _flat(file, config)
    else:
        raise ModelError(
            f"{file}: the layout of a {config.get('model_type')!r} without mm_projector_type is not known here. If "
            "transformers loads this model, there is nothing to convert."
        )
    if original.projector not in PROJECTORS:
        raise ModelError(f"{file}: the projector is {original.projector!r}; the known ones are {', '.join(PROJECTORS)}")
    if original.select not in SELECTS:
        raise ModelError(
            f"{file}: the selected feature is {original.select!r}; the known ones are {', '.join(SELECTS)}"
        )
    return original


def _flat(file: Path, config: Mapping[str, Any]) -> Original:
    if config.get("mm_use_im_start_end"):
        raise ModelError(f"{file}: mm_use_im_start_end is true; tokens around an image are not supported")
    if "anyres" in str(config.get("image_aspect_ratio")):
        raise ModelError(f"{file}: image_aspect_ratio is anyres (LLaVA-NeXT); only images of one size are supported")
    return Original(
        names=FLAT,
        projector=config["mm_projector_type"],
        tower=_given(file, config, "mm_vision_tower"),
        text=_flat_text(file, config),
        layer=_given(file, config, "mm_vision_select_layer"),
        select=config.get("mm_vision_select_feature", "patch"),
        needs_class_token=True,
    )


def _flat_text(file: Path, config: Mapping[str, Any]) -> PretrainedConfig:
    """Return the language model's configuration, made of the fields that belong to it."""
    architecture = _given(file, config, "architectures")[0]
    kind = next((kind for name, kind in LANGUAGE_MODELS.items() if name in architecture), None)
    if kind is None:
        raise ModelError(f"{file}: architecture {architecture!r}; the known ones are {', '.join(LANGUAGE_MODELS)}")
    config_class = CONFIG_MAPPING[kind]
    # transformers has neither of these two as a field, but reads both from a dict into rope_parameters.
    own = own_fields(config_class) | {"rope_theta", "rope_scaling"}
    return config_class.from_dict({name: value for name, value in config.items() if name in own})


def own_fields(config: Any) -> set[str]:
    """Return the names of the fields of a configuration, or of its class, that `PretrainedConfig` does not have."""
    return {field.name for field in fields(config)} - {field.name for field in fields(PretrainedConfig)}


def _nested(file: Path, config: Mapping[str, Any]) -> Original:
    text = dict(_given(file, config, "text_config"))
    kind = text.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"{file}: text_config.model_type {kind!r} is unknown to transformers")
    return Original(
        names=NESTED,
        projector=_given(file, config, "connector_type"),
        tower=_given(file, config, "vision_model_name_or_path"),
        text=CONFIG_MAPPING[kind].from_dict(text),
        layer=config.get("vision_feature_layer", -2),
        select=config.get("vision_feature_select_strategy", "patch"),
        needs_class_token=False,
    )


def _given(file: Path, config: Mapping[str, Any], field: str) -> Any:
    if config.get(field) is None:
        raise ModelError(f"{file}: {field} is missing")
    return config[field]


def _configured(
    original: Original, tower: Path, tokenizer: PreTrainedTokenizerFast, vocabulary: int
) -> tuple[LlavaConfig, LlavaProcessor]:
    """Return the model's configuration in transformers, and its processor."""
    vision, image_processor = _vision(tower)
    no_class_token = original.needs_class_token and not CLASS_TOKENS[vision.model_type]
    original.text.vocab_size = vocabulary
    config, processor = assembled(
        original.text,
        vision,
        tokenizer,
        image_processor,
        projector=original.projector,
        layer=original.layer,
        select="full" if no_class_token else SELECTS[original.select],
    )
    if isinstance(config, MobileVLMConfig):
        config.mm_vision_tower = original.tower
    return config, processor


def _vision(tower: Path) -> tuple[PretrainedConfig, Any]:
    """Return the configuration and the image processor of a vision tower. `tower` may hold a whole CLIP or SigLIP."""
    try:
        config = AutoConfig.from_pretrained(tower, trust_remote_code=False)
        image_processor = AutoImageProcessor.from_pretrained(tower, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{tower}: cannot be read as a vision tower: {error}") from error
    config = getattr(config, "vision_config", config)
    require_tower(str(tower), config)
    return config, image_processor


# ------------------------------------------------------------------------------------------ tokenizer and weights


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return a fast tokenizer that knows `<image>`, at the first free id if it was added."""
    if (folder / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    elif (folder / "tokenizer.model").exists():
        tokenizer = _from_sentencepiece(folder)
    else:
        raise ModelError(f"{folder}: has no tokenizer.json and no tokenizer.model")
    return with_image_token(tokenizer)


def _from_sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    if not is_sentencepiece_available():
        raise ModelError(f"{folder / 'tokenizer.model'}: needs sentencepiece. Run: pip install 'betakd_ray[convert]'")
    # A missing field means the default when these models were trained. Today's defaults would tokenize differently.
    said = _json(folder / "tokenizer_config.json")
    tokenizer = LlamaTokenizer.from_pretrained(
        folder, legacy=said.get("legacy") is not False, add_bos_token=said.get("add_bos_token") is not False
    )
    # Saved as LlamaTokenizer, it would be rebuilt with today's defaults whenever it is loaded.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        model_max_length=tokenizer.model_max_length,
        **tokenizer.special_tokens_map,
    )


def _renamed(folder: Path, names: Names, allow_pickle: bool, *, only_these: bool = False) -> dict[str, Tensor]:
    """Return a folder's weights by their names in transformers.

    Raises ModelError for a weight with an unknown name; with `only_these`, such a weight is left out instead.
    """
    found = _weights(folder, allow_pickle)
    known = {name: weight for name, weight in found.items() if name.startswith(tuple(names))}
    if len(known) < len(found) and not only_these:
        raise ModelError(f"{folder}: weights with unknown names: {_some(found.keys() - known.keys())}")
    return {renaming(name, names): weight for name, weight in known.items() if not name.endswith(COMPUTED)}


def _filled(config: LlavaConfig, weights: dict[str, Tensor]) -> PreTrainedModel:
    """Return the model with exactly these weights. Raises ModelError if some are missing or have no place."""
    is_mobilevlm = isinstance(config, MobileVLMConfig)
    model_class: Any = MobileVLMForConditionalGeneration if is_mobilevlm else LlavaForConditionalGeneration
    dtype = weights[EMBEDDING].dtype
    if config.tie_word_embeddings:
        # A checkpoint with tied weights may hold only the embedding. The head would then count as missing.
        weights = {HEAD: weights[EMBEDDING], **weights}
    # On "meta", random weights take no memory. assign=True, because nothing can be copied into such parameters.
    with torch.device("meta"):
        model = model_class(config)
    try:
        found = model.load_state_dict({name: w.to(dtype) for name, w in weights.items()}, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"the weights do not fit the configuration: {error}") from error
    for problem, names in (("are missing", found.missing_keys), ("it does not have", found.unexpected_keys)):
        if names:
            raise ModelError(f"{model_class.__name__}: weights that {problem}: {_some(names)}")
    model.tie_weights()
    return model


def _some(names: Iterable[str]) -> str:
    first, *more = sorted(names)
    return f"{first} and {len(more)} more" if more else first
