"""Digests of a model's files, by which a job or an evaluation notices that the model behind a path was replaced."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from transformers.utils.hub import cached_file

from betakd_ray.models.gguf import find_gguf
from betakd_ray.models.source import local_folder, store_state
from betakd_ray.spec import CheckpointInit, ModelSpec, PartsInit, StudentSpec

READ = (".json", ".safetensors", ".jinja", ".model", ".txt", ".py")
"""Endings of the files that define a model; others, such as logs and optimizer states, may change."""
WHOLE_BYTES = 16 << 20
"""Largest size in bytes of a file that is read whole. Of a larger one, parts of every tensor are read."""
SAMPLE_BYTES = 1024
SAMPLES = 4096
"""Number of parts that are read of a large file of another format."""


def student_digest(student: StudentSpec) -> str:
    """Return a digest of all files from which a student starts."""
    init = student.init
    if isinstance(init, CheckpointInit):
        return model_digest(init)
    paths = (
        (init.language_model, init.vision_tower) if isinstance(init, PartsInit) else (init.processor, init.vision_tower)
    )
    digests = [model_digest(ModelSpec(path=path, storage=init.storage)) for path in paths if path]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def model_digest(spec: ModelSpec) -> str:
    """Return a digest of a model's files.

    Large files are read in part, so that this takes seconds for any model: another model, or another state of this one,
    has other values in its tensors. It is no protection against single changed bits.
    """
    if spec.gguf_file:
        files = [find_gguf(spec, spec.gguf_file)]
    else:
        folder = local_folder(spec.path, spec.storage)
        if not os.path.isdir(folder):  # a hub id; the folder of a snapshot has the name of its commit
            config = cached_file(folder, "config.json", revision=spec.revision or "main")
            return Path(config).parent.name if config else ""
        files = sorted(file for file in Path(folder).iterdir() if file.suffix in READ and not file.name.startswith("."))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} {_file_digest(file)}\n".encode())
    return digest.hexdigest()


def model_version(spec: ModelSpec) -> str:
    """Return a digest that changes if a model's files do. Unlike `model_digest`, it copies nothing from a URL.

    There, the store's listing tells one state from another. It differs between two copies of one model.
    """
    if "://" not in spec.path:
        return model_digest(spec)
    return hashlib.sha256(store_state(spec.path, spec.storage, spec.gguf_file).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        if path.stat().st_size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for offset in _offsets(path, file):
            file.seek(offset)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _offsets(path: Path, file: BinaryIO) -> Iterator[int]:
    """Yield where to read: in safetensors, the header, and the begin, middle and end of each tensor."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        yield from range(0, size, max(1, size // SAMPLES))
        return
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(min(length, size)))
        tensors = [header[name]["data_offsets"] for name in sorted(header.keys() - {"__metadata__"})]
        # A damaged header may name any place.
        places = [[min(max(0, 8 + length + int(offset)), size) for offset in (begin, end)] for begin, end in tensors]
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
        # Whoever loads the model says that its header is damaged.
        yield from range(0, size, max(1, size // SAMPLES))
        return
    yield from range(0, min(8 + length, size), SAMPLE_BYTES)
    for begin, end in places:
        yield from (begin, (begin + end) // 2, max(begin, end - SAMPLE_BYTES))
