"""The only module through which transformers reads the files of a spec's model.

Weights are read only from safetensors, or from a GGUF that the spec names, because neither can hold code. Code beside a
checkpoint runs only if the spec sets `trust_remote_code`.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, has_file

import betakd_ray.models.mobilevlm  # noqa: F401 (makes the family known to transformers)
from betakd_ray.errors import ModelError
from betakd_ray.models.gguf import find_gguf
from betakd_ray.models.source import local_folder, model_errors
from betakd_ray.spec import ModelSpec


def from_pretrained(auto_class: Any, spec: ModelSpec, **options: Any) -> Any:
    """Return the result of `auto_class.from_pretrained` for a model's files or its GGUF; `options` are its keywords.

    Raises ModelError for files that transformers cannot read, and for the reasons of `find_gguf` and `local_folder`. It
    does not refuse pickles: call `require_safetensors` before weights are read.
    """
    problem = "cannot load it"
    if spec.gguf_file:
        problem = f"cannot load {spec.gguf_file} (fetch it again, or name a model in safetensors)"
    with model_errors(spec, f"{auto_class.__name__} {problem}"):
        if spec.gguf_file:
            file = find_gguf(spec, spec.gguf_file)
            # The full path, because transformers looks for a bare name in the working directory first.
            place, options = str(file.parent), {**options, "gguf_file": str(file)}
        else:
            place = local_folder(spec.path, spec.storage)
        return auto_class.from_pretrained(
            place, revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code, **options
        )


def require_safetensors(spec: ModelSpec, config: PretrainedConfig) -> None:
    """Raise ModelError if transformers would load a pickle. The pickle is neither opened nor fetched from a hub."""
    if spec.gguf_file:  # holds only numbers and text, and is the only file that is read
        return
    with model_errors(spec, "its weights cannot be found"):
        files = _weight_files(local_folder(spec.path, spec.storage), spec.revision or "main", config)
    if pickles := [file for file in files if not file.endswith(".safetensors")]:
        raise ModelError(
            f"{spec.path}: its weights are in {pickles[0]}, a pickle, which can run code when it is loaded. Name a "
            "model in safetensors. Or, if you trust this one, convert it: load it with transformers' from_pretrained, "
            "save it with save_pretrained to another folder, and give the path of that folder here."
        )


def _weight_files(folder: str, revision: str, config: PretrainedConfig) -> set[str]:
    """Return the names of the files in which transformers would find the weights of a folder or hub id.

    The set is empty if there are no weights, or none yet.
    """
    named = getattr(config, "transformers_weights", None)
    # In the order in which transformers looks for them: a pickle beside safetensors is never read.
    names = [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME]
    first = next((name for name in names if has_file(folder, name, revision=revision)), None)
    if first is None or not first.endswith(".index.json"):
        return {first} if first else set()
    index = cached_file(folder, first, revision=revision)
    assert index is not None
    return set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
