"""Packing of conversations and images into checked WebDataset shards, with webdataset's own writer."""

import io
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from betakd_ray.data.conversations import check_conversation, read_conversation
from betakd_ray.data.files import new_file, opened
from betakd_ray.data.formats import Rows, open_source
from betakd_ray.data.pictures import FORMATS, require_still, rgb
from betakd_ray.data.records import Reading, samples_of
from betakd_ray.data.replacing import commit_packing, sole_packing
from betakd_ray.data.shards import Shard
from betakd_ray.data.summary import Summary
from betakd_ray.errors import DataError
from betakd_ray.spec import PackSpec, StorageSpec
from betakd_ray.storage import join

MAGIC = {"jpg": rb"\xff\xd8\xff", "png": rb"\x89PNG\r\n\x1a\n", "webp": rb"RIFF....WEBP"}
WINDOW = 1000
"""Number of rows with images that are in memory at a time, to be mixed."""
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


def pack_from_spec(
    spec: PackSpec,
    report: Callable[[Summary], None] = lambda summary: None,
    rows: Rows | list[tuple[str, Any]] | None = None,
) -> list[Shard]:
    """Pack a source's records, shuffled by `shuffle_seed`, with a progress bar on a terminal.

    All records are looked at. `report` gets what was seen before anything is replaced. Raises DataError if some are bad
    and `on_bad` is `stop`; the former shards are then unchanged. `rows` are records to pack in place of the source's.
    """
    reading = Reading(spec.images, spec.storage, spec.map, spec.split_turns)
    if rows is None:
        rows = open_source(spec.conversations, spec.storage, spec.format)
    total = len(rows) if isinstance(rows, list) and not spec.split_turns else None
    return pack(
        _good_samples(_shuffled(rows, spec.shuffle_seed), reading, spec, report),
        spec.output,
        prefix=spec.prefix,
        samples_per_shard=spec.samples_per_shard,
        storage=spec.storage,
        total=total,
    )


def llava_samples(conversations: str, images: str | None, storage: StorageSpec) -> Iterator[dict[str, Any]]:
    """Yield the samples of a file of records, each with the contents of its images.

    Raises DataError with the file and the number of the first bad record, counted from 1.
    """
    for number, (where, record) in enumerate(open_source(conversations, storage), 1):
        try:
            yield from samples_of(record, number, Reading(images, storage))
        except ValueError as error:
            raise DataError(f"{where}: {error}. Repair the entry or leave it out.") from error


def _good_samples(
    numbered: Iterable[tuple[int, tuple[str, Any]]],
    reading: Reading,
    spec: PackSpec,
    report: Callable[[Summary], None],
) -> Iterator[dict[str, Any]]:
    """Yield the samples of good records, look at all others, and raise DataError at the end if they are not to be."""
    summary = Summary()
    for number, (where, record) in numbered:
        try:
            samples = [_checked(sample) for sample in samples_of(record, number, reading)]
        except (ValueError, TypeError) as error:  # TypeError: what JSON cannot hold
            summary.add_bad(where, str(error))
            continue
        summary.good += len(samples)
        if not summary.bad or spec.on_bad == "skip":
            yield from samples
    report(summary)
    if summary.bad and spec.on_bad == "stop":
        raise DataError(
            f"{spec.conversations}: {summary.bad} of {summary.good + summary.bad} samples cannot be used, and nothing "
            "was packed. Repair them, or pack only the good ones with --keep-going (on_bad: skip).\n"
            + "\n".join(summary.lines())
        )


def _shuffled(rows: Rows | list[tuple[str, Any]], seed: int | None) -> Iterable[tuple[int, tuple[str, Any]]]:
    """Return numbered rows in a seeded order; rows that are not in memory are mixed within a window of WINDOW rows."""
    numbered = enumerate(rows, 1)
    if seed is None:
        return numbered
    if not isinstance(rows, list):
        return _mixed(numbered, random.Random(seed))
    whole = list(numbered)
    random.Random(seed).shuffle(whole)
    return whole


def _mixed(rows: Iterable[Any], rng: random.Random) -> Iterator[Any]:
    held: list[Any] = []
    for row in rows:
        held.append(row)
        if len(held) >= WINDOW:
            at = rng.randrange(len(held))
            held[at], held[-1] = held[-1], held[at]
            yield held.pop()
    rng.shuffle(held)
    yield from held


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
        check_conversation(read_conversation(record).turns, len(images))
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
        require_still(picture)
        buffer = io.BytesIO()
        (picture if picture.mode in PNG_MODES else rgb(picture)).save(buffer, "PNG")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        seen = f"{len(content)} bytes" if isinstance(image, bytes) else str(image)
        raise ValueError(f"{seen}: cannot be read as an image ({error})") from error
    return "png", buffer.getvalue()


def _checked(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a sample with its images as they are stored. Raises ValueError or TypeError if it cannot be stored."""
    json.dumps({name: value for name, value in sample.items() if name != "images"}, ensure_ascii=False).encode()
    return {**sample, "images": [_checked_image(image, order) for order, image in enumerate(sample["images"])]}


def _checked_image(content: bytes, order: int) -> bytes:
    """Return an image as it is stored, once its header is read: a web page under an image's name is found here."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            require_still(picture)
        return _encoded_image(content, StorageSpec())[1]
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        said = "it is in none of the formats that are read" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"image {order}, of {len(content)} bytes, cannot be read as an image: {said}") from error


def _with_progress(samples: Iterable[Any], prefix: str, total: int | None) -> Iterable[Any]:
    terminal = sys.stderr.isatty()
    return track(samples, f"packing {prefix}", total, console=Console(stderr=True)) if terminal else samples


def _read(url: str, storage: StorageSpec) -> bytes:
    with opened(url, storage) as stream:
        return stream.read()
