"""Packing of conversations and images into checked WebDataset shards, with webdataset's own writer."""

import io
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from PIL import Image
from rich.console import Console
from rich.progress import track

from betakd_ray.data.files import new_file, opened
from betakd_ray.data.manifest import commit_packing, sole_packing
from betakd_ray.data.render import FORMATS, rgb
from betakd_ray.data.samples import check_conversation
from betakd_ray.data.shards import Shard
from betakd_ray.errors import DataError
from betakd_ray.spec import PackSpec, StorageSpec
from betakd_ray.storage import join

MAGIC = {"jpg": rb"\xff\xd8\xff", "png": rb"\x89PNG\r\n\x1a\n", "webp": rb"RIFF....WEBP"}
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def pack(
    samples: Iterable[dict[str, Any]],
    output: str,
    *,
    prefix: str = "train",
    samples_per_shard: int = 1000,
    storage: StorageSpec = StorageSpec(),
    total: int | None = None,
) -> list[Shard]:
    """Write {"id", "conversations", "images": [bytes or path], …} to `output`/`prefix`-000000.tar and so on.

    The same samples give the same bytes. Other fields are kept in the sample's json. Packing again with the same prefix
    replaces its former shards by shards with new names (`prefix`-000000.1.tar, …): the former data are whole until all
    samples are packed, and remain if that fails. `total` is the number of samples for the progress bar.

    Raises DataError for a sample that nobody can train on, if there are no samples, if another process packs this
    prefix, or if the store refuses. Raises OutputError if the disk is full.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", prefix):
        raise DataError(f"prefix {prefix!r}: the name of a shard has only letters, digits, _ and -, e.g. train.")
    with sole_packing(output, prefix, storage) as (packing, claim):
        shards = []
        # groupby is lazy: samples are read while their shard is written, and are never all in memory.
        for number, numbered in groupby(
            enumerate(_with_progress(samples, prefix, total)), key=lambda pair: pair[0] // samples_per_shard
        ):
            claim.require()
            shards.append(_write_shard(join(output, packing.shard(number)), numbered, storage))
        if not shards:
            raise DataError(f"{output}: there are no samples to pack. Check the source, and `limit` if it is set.")
        claim.require()
        commit_packing(output, packing, shards, storage)
    return shards


def pack_from_spec(spec: PackSpec) -> list[Shard]:
    """Pack a LLaVA JSON and its images, shuffled by `shuffle_seed`, with a progress bar on a terminal."""
    entries = _numbered_entries(spec.conversations, spec.storage)
    if spec.shuffle_seed is not None:
        random.Random(spec.shuffle_seed).shuffle(entries)
    samples = (_llava_sample(entry, where, spec.images, spec.storage) for where, entry in entries)
    return pack(
        samples,
        spec.output,
        prefix=spec.prefix,
        samples_per_shard=spec.samples_per_shard,
        storage=spec.storage,
        total=len(entries),
    )


def llava_samples(conversations: str, images: str | None, storage: StorageSpec) -> Iterator[dict[str, Any]]:
    """Yield samples of a LLaVA file: a JSON list, or JSON lines, of {"id", "conversations", "image"?: name or names}.

    Raises DataError with the file and the number of the entry, counted from 1.
    """
    for where, entry in _numbered_entries(conversations, storage):
        yield _llava_sample(entry, where, images, storage)


# ------------------------------------------------------------------------------------------------- writing


def _write_shard(url: str, numbered: Iterable[tuple[int, dict[str, Any]]], storage: StorageSpec) -> Shard:
    from webdataset.writer import TarWriter  # imports torch if it is installed: two seconds that only packing needs

    samples = 0
    # Times and owners are fixed: the same samples then give the same bytes, and the same checksum.
    fixed = {"mtime": 0, "user": "betakd", "group": "betakd", "mode": 0o444}
    with new_file(url, storage) as stream, TarWriter(cast(Any, stream), encoder=False, **fixed) as tar:
        for number, sample in numbered:
            tar.write({"__key__": f"{number:09d}", **_members(sample, number, storage)})
            samples += 1
    return Shard(stream.url, samples, stream.size, stream.checksum)


def _members(sample: dict[str, Any], number: int, storage: StorageSpec) -> dict[str, bytes]:
    """Return extension → content of one sample's members."""
    if not sample.get("id"):
        raise DataError(f"sample {number}: has no id. Give each sample an id; reports name the sample by it.")
    record = {name: value for name, value in sample.items() if name != "images"}
    try:
        images = [_encoded_image(image, storage) for image in sample.get("images", ())]
        check_conversation(record.get("conversations"), len(images))
        members = {"json": json.dumps(record, ensure_ascii=False).encode()}
    except (ValueError, TypeError) as error:
        raise DataError(f"sample {sample['id']!r}: {error}. Repair the sample or leave it out.") from error
    if len(images) == 1:
        return members | {images[0][0]: images[0][1]}
    return members | {f"{order}.{extension}": content for order, (extension, content) in enumerate(images)}


def _encoded_image(image: bytes | str | Path, storage: StorageSpec) -> tuple[str, bytes]:
    """Return extension and content: jpg, png and webp unchanged, others as png. Raises ValueError if it is no image."""
    content = image if isinstance(image, bytes) else _read(str(image), storage)
    for extension, magic in MAGIC.items():
        if re.match(magic, content, re.DOTALL):
            return extension, content
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
        buffer = io.BytesIO()
        (picture if picture.mode in PNG_MODES else rgb(picture)).save(buffer, "PNG")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        seen = f"{len(content)} bytes" if isinstance(image, bytes) else str(image)
        raise ValueError(f"{seen}: cannot be read as an image ({error})") from error
    return "png", buffer.getvalue()


def _with_progress(samples: Iterable[Any], prefix: str, total: int | None) -> Iterable[Any]:
    terminal = sys.stderr.isatty()
    return track(samples, f"packing {prefix}", total, console=Console(stderr=True)) if terminal else samples


def _read(url: str, storage: StorageSpec) -> bytes:
    with opened(url, storage) as stream:
        return stream.read()


# ------------------------------------------------------------------------------------------------- sources


def _numbered_entries(location: str, storage: StorageSpec) -> list[tuple[str, Any]]:
    """Return (location, entry) for each entry of a JSON list or of JSON lines."""
    content = _read(location, storage)
    try:
        # utf-8-sig: some editors write a byte order mark, and json refuses it.
        entries = _json_values(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: is neither a JSON list nor JSON lines: {error}.") from error
    return [(f"{location}, entry {number}", entry) for number, entry in enumerate(entries, 1)]


def _json_values(text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        return json.loads(text)
    # Not splitlines(): it also splits at characters such as U+2028, which a text in JSON may contain.
    return [_json_line(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json_line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _llava_sample(entry: Any, where: str, folder: str | None, storage: StorageSpec) -> dict[str, Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), (str, int)):
        raise DataError(f'{where}: expected an object with "id" and "conversations", found {repr(entry)[:80]}.')
    names = _image_names(entry.get("image"), where)
    if names and folder is None:
        raise DataError(f"{where}: names the image {names[0]!r}; give `images`, the folder it is relative to.")
    try:
        check_conversation(entry.get("conversations"), len(names))
    except ValueError as error:
        raise DataError(f"{where}: {error}. Repair the entry or leave it out.") from error
    try:
        images = [_read(join(folder or "", name), storage) for name in names]
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    record = {name: value for name, value in entry.items() if name not in ("id", "image", "images")}
    return {"id": str(entry["id"]), **record, "images": images}


def _image_names(value: Any, where: str) -> Sequence[str]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f'{where}: "image" is {value!r}; expected a file name or a list of them.')
    for name in names:
        if name.startswith("/") or ".." in name.split("/"):
            raise DataError(f"{where}: image {name!r} is outside the folder `images`; name it relative to that folder.")
    return names
