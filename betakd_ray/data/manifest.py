"""Manifest of a folder of shards: finds shards by name, and detects shards that are cut, missing or unknown.

A folder of shards has a `manifest.jsonl`, one line per shard: {"shard": name, "samples": n, "bytes": b, "crc32": hex}.
"""

import json
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from glob import has_magic
from typing import Any

from braceexpand import braceexpand

from betakd_ray.data.files import store_errors, url_like
from betakd_ray.data.shards import Shard, ShardDamaged, scan_shard
from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join, open_store, replace_file

MANIFEST = "manifest.jsonl"
PLANNING_ATTEMPTS = 3  # fewer than while reading: a user waits at the terminal until the job starts

_REMEDY = "Delete the manifest and run `betakd index` on the folder's shards."


def find_shards(patterns: Sequence[str], storage: StorageSpec) -> list[Shard]:
    """Return the shards that the patterns match (paths or URLs with {00..07} braces and * globs), sorted, each once.

    They are sorted by URL. Raises DataError if nothing matches, a named shard is missing, the store refuses access or
    is silent for half a minute, or a shard differs from its manifest.
    """
    sizes = _locate(patterns, storage)
    manifests = {folder: read_manifest(folder, storage) for folder in sorted({_folder(url) for url in sizes})}
    return [_checked(url, size, manifests[_folder(url)]) for url, size in sizes.items()]


def index_shards(patterns: Sequence[str], storage: StorageSpec) -> list[Shard]:
    """Read whole shards that were written elsewhere, and add them to the manifest of their folder.

    Raises ShardDamaged for a shard that is not a complete tar, and DataError as `find_shards` does.
    """
    by_folder: dict[str, list[Shard]] = defaultdict(list)
    for url, size in _locate(patterns, storage).items():
        by_folder[_folder(url)].append(_indexed(url, size, storage))
    for folder, shards in by_folder.items():
        merge_manifest(folder, shards, storage)
    return sorted((shard for shards in by_folder.values() for shard in shards), key=lambda shard: shard.url)


def read_manifest(folder: str, storage: StorageSpec) -> dict[str, Shard]:
    """Return base name → shard; empty if there is no manifest. Raises DataError for an invalid line."""
    url = join(folder, MANIFEST)
    with store_errors(url, storage):
        filesystem, path = open_store(url, storage, attempts=PLANNING_ATTEMPTS)
        try:
            lines = filesystem.cat_file(path).splitlines()
        except FileNotFoundError:
            return {}
    entries: dict[str, Shard] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            shard = _manifest_entry(folder, f"{url}, line {number}", line)
            if entries.setdefault(_name(shard.url), shard) != shard:
                raise DataError(
                    f"{url}, line {number}: {_name(shard.url)} has other numbers in a line above. {_REMEDY}"
                )
    return entries


def merge_manifest(folder: str, shards: Iterable[Shard], storage: StorageSpec, dropped: Container[str] = ()) -> None:
    """Add shards to a folder's manifest, by base name, after removing the names in `dropped`.

    The manifest is replaced atomically. If two processes write at the same time, one of them loses its entries.
    """
    entries = {name: shard for name, shard in read_manifest(folder, storage).items() if name not in dropped}
    entries |= {_name(shard.url): shard for shard in shards}
    rows = [
        {"shard": name, "samples": shard.samples, "bytes": shard.bytes, "crc32": shard.checksum}
        for name, shard in sorted(entries.items())
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    url = join(folder, MANIFEST)
    with store_errors(url, storage):
        filesystem, path = open_store(url, storage)
        replace_file(filesystem, path, content)


def remove_shards(folder: str, names: Iterable[str], storage: StorageSpec) -> None:
    """Delete shards; a shard that does not exist is no error."""
    for url in (join(folder, name) for name in names):
        with store_errors(url, storage):
            filesystem, path = open_store(url, storage)
            if filesystem.exists(path):
                filesystem.rm_file(path)


def _locate(patterns: Sequence[str], storage: StorageSpec) -> dict[str, int]:
    """Return URL → size in bytes, sorted by URL."""
    urls = [url for pattern in patterns for url in _expand_braces(pattern)]
    by_folder: dict[str, list[str]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for url in urls:
        if has_magic(url):
            sizes |= _glob(url, storage)
        else:
            by_folder[_folder(url)].append(url)
    for folder, named in by_folder.items():
        sizes |= _sizes_in(folder, named, storage)
    return dict(sorted(sizes.items()))


def _expand_braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"{pattern}: its braces do not pair ({error}). Write them as train-{{00..07}}.tar.") from error


def _glob(pattern: str, storage: StorageSpec) -> dict[str, int]:
    with store_errors(pattern, storage):
        filesystem, path = open_store(pattern, storage, attempts=PLANNING_ATTEMPTS)
        found: dict[str, Any] = filesystem.glob(path, detail=True)  # pyright: ignore[reportAssignmentType]
    sizes = {
        url_like(pattern, filesystem, name): info["size"]
        for name, info in found.items()
        # Not ==: an interrupted write of the manifest leaves a temporary file whose name begins in the same way.
        if info["type"] == "file" and not _name(name).startswith(MANIFEST)
    }
    if not sizes:
        raise DataError(f"{pattern}: no shard matches. Check the path, or write shards there with `betakd pack`.")
    return sizes


def _sizes_in(folder: str, urls: list[str], storage: StorageSpec) -> dict[str, int]:
    """Return the sizes in bytes of single shards, from one listing of their folder instead of a request per shard."""
    with store_errors(folder, storage):
        filesystem, folder_path = open_store(folder, storage, attempts=PLANNING_ATTEMPTS)
        try:
            listing = {info["name"]: info["size"] for info in filesystem.ls(folder_path, detail=True)}
        except FileNotFoundError:
            listing = {}
        paths = {url: open_store(url, storage)[1] for url in urls}
    missing = [url for url, path in paths.items() if path not in listing]
    if missing:
        raise DataError(
            f"{missing[0]}: no such shard ({len(missing)} of {len(urls)} named in {folder} are missing; the folder "
            f"has {len(listing)} files). Correct the name or its braces, or write it with `betakd pack`."
        )
    return {url_like(url, filesystem, path): listing[path] for url, path in paths.items()}


def _indexed(url: str, size: int, storage: StorageSpec) -> Shard:
    shard = scan_shard(url, storage)
    if shard.bytes != size:
        raise ShardDamaged(f"{url}: only {shard.bytes} of {size} bytes could be read. Copy it again.")
    if not shard.samples:
        raise DataError(f"{url}: holds no sample (members KEY.json, KEY.jpg). Write it with `betakd pack`.")
    return shard


def _checked(url: str, size: int, manifest: dict[str, Shard]) -> Shard:
    shard = manifest.get(_name(url))
    remedy = f"run `betakd index {url}`, which reads the whole shard and adds it to {MANIFEST}"
    if shard is None:
        state = "has no entry in" if manifest else "there is no"
        raise DataError(f"{url}: {state} {MANIFEST} of its folder, so a cut shard would not be noticed: {remedy}.")
    if shard.bytes != size:
        raise ShardDamaged(
            f"{url}: {size} bytes in the store, but {shard.bytes} in {MANIFEST}: the shard was cut or written again. "
            f"Copy or pack it again. If the file is right, {remedy}."
        )
    return Shard(url, shard.samples, shard.bytes, shard.checksum)


def _manifest_entry(folder: str, where: str, line: bytes | str) -> Shard:
    try:
        row = json.loads(line)
        shard = Shard(join(folder, str(row["shard"])), int(row["samples"]), int(row["bytes"]), str(row["crc32"]))
        if not 1 <= shard.samples <= shard.bytes:  # otherwise a wrong count would decide the size of the ledger
            raise ValueError(f"{shard.samples} samples in {shard.bytes} bytes")
        return shard
    # OverflowError: int() of JSON's Infinity. RecursionError: JSON that is nested too deeply.
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            f'{where}: {line[:80]!r} is not {{"shard", "samples", "bytes", "crc32"}} ({error}). {_REMEDY}'
        ) from error


def _folder(url: str) -> str:
    return url.rpartition("/")[0] if "/" in url else "."


def _name(url: str) -> str:
    return url.rpartition("/")[2]
