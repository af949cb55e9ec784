"""Lookup of a language model's GGUF file, and checks that transformers reads it correctly and completely."""

import os
import struct
from pathlib import Path

from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_gguf_available

from betakd_ray.errors import ModelError
from betakd_ray.models.source import local_folder, model_errors
from betakd_ray.spec import ModelSpec


def find_gguf(spec: ModelSpec, name: str) -> Path:
    """Return the path on this node of the file `name` among a model's files.

    Raises ModelError if the file does not exist or is not a GGUF, if transformers would read it wrongly or only in
    part, and if the package gguf is missing.
    """
    if not is_gguf_available():
        raise ModelError(f"gguf_file: {name} needs the package gguf. Run: pip install 'betakd_ray[gguf]'")
    with model_errors(spec, f"gguf_file {name} cannot be found"):
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
            f"{spec.path}/{name}: is not a GGUF, or is damaged ({error}). Fetch or convert it again."
        ) from error
    if "rope_freqs.weight" in tensors or metadata.get(f"{architecture}.rope.scaling.type", "none") != "none":
        raise ModelError(
            f"{spec.path}/{name}: scales its rotary positions, as Llama 3.1 does. transformers does not read this "
            "scale from a GGUF, so the model's answers would be wrong. Name the model in safetensors."
        )
    if (files := metadata.get("split.count", 1)) > 1:
        raise ModelError(
            f"{spec.path}/{name}: is one of {files} files of a model, but transformers would read only this one. "
            "Merge them with llama.cpp's llama-gguf-split --merge."
        )
    return Path(found)
