"""The file `manifest.jsonl` of a folder of shards: its lines, and changes of it.

It has one line per shard: {"shard": name, "samples": n, "bytes": b, "crc32": hex}. While `pack` replaces shards, it
also says which files are no data:

    {"unfinished": prefix, "number": n}    shards that are being written
    {"replaced": name}                     a former shard that is about to be removed

A manifest elsewhere, for shards whose folder cannot be written, has whole URLs in place of names.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from betakd_ray.data.claims import claimed
from betakd_ray.data.files import store_errors
from betakd_ray.data.shards import Shard
from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import ASIDE, join, open_store, replace_file

MANIFEST = "manifest.jsonl"
PLANNING_ATTEMPTS = 3  # fewer than while reading: a user waits at the terminal until the job starts
REMEDY = "Delete the manifest and run `betakd index` on the folder's shards."


@dataclass(frozen=True)
class Packing:
    """One call of `pack`: the shards of a prefix that have one number. No name is used for two calls."""

    prefix: str
    number: int

    def shard(self, at: int) -> str:
        """Return the base name of the shard at that place."""
        return f"{self.prefix}-{at:06d}{f'.{self.number}' if self.number else ''}.tar"

    @classmethod
    def of(cls, name: str, prefix: str) -> "Packing | None":
        """Return the call for `prefix` that wrote the shard with this base name, also if it is not whole yet."""
        match = re.fullmatch(rf"{re.escape(prefix)}-\d{{6,}}(?:\.(\d+))?\.tar(?:\.\w+{re.escape(ASIDE)})?", name)
        return None if match is None else cls(prefix, int(match[1] or 0))


@dataclass(frozen=True)
class Manifest:
    """What a folder's manifest says."""

    shards: dict[str, Shard] = field(default_factory=dict)
    """Base name → shard."""
    replaced: frozenset[str] = frozenset()
    """Base names of shards that a packing has replaced and has still to remove."""
    unfinished: frozenset[Packing] = frozenset()
    """Packings that have not ended, or were interrupted: their shards are no data."""

    def leaves_out(self, name: str) -> bool:
        """Return whether the file with this base name is known to be no data, and why it is there."""
        if name in self.shards:
            return False
        return name in self.replaced or any(Packing.of(name, each.prefix) == each for each in self.unfinished)


def read_manifest_file(folder: str, storage: StorageSpec) -> Manifest:
    """Return the manifest of a folder. Raises DataError for an invalid line."""
    url = join(folder, MANIFEST)
    with store_errors(url, storage):
        filesystem, path = open_store(url, storage, attempts=PLANNING_ATTEMPTS)
        try:
            lines = filesystem.cat_file(path).splitlines()
        except FileNotFoundError:
            return Manifest()
    entries, replaced, unfinished = dict[str, Shard](), set[str](), set[Packing]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match _manifest_entry(folder, f"{url}, line {number}", line):
            case Packing() as packing:
                unfinished.add(packing)
            case str() as name:
                replaced.add(name)
            case Shard() as shard:
                if entries.setdefault(name_of(shard.url), shard) != shard:
                    raise DataError(
                        f"{url}, line {number}: {name_of(shard.url)} has other numbers in a line above. {REMEDY}"
                    )
    return Manifest(entries, frozenset(replaced), frozenset(unfinished))


def change_manifest(folder: str, storage: StorageSpec, change: Callable[[Manifest], Manifest]) -> None:
    """Replace the manifest by what `change` returns for it. Of two processes that do so at once, one waits."""
    with claimed(join(folder, MANIFEST), "change", storage, waits=True) as claim:
        changed = change(read_manifest_file(folder, storage))
        claim.require()
        _store(folder, changed, storage)


def _store(folder: str, manifest: Manifest, storage: StorageSpec) -> None:
    """Replace the manifest of a folder, at once; remove it if there is nothing to say."""
    rows = [_row(name, shard) for name, shard in sorted(manifest.shards.items())]
    rows += [{"replaced": name} for name in sorted(manifest.replaced)]
    rows += [{"unfinished": each.prefix, "number": each.number} for each in manifest.unfinished]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    url = join(folder, MANIFEST)
    with store_errors(url, storage):
        filesystem, path = open_store(url, storage)
        if content:
            replace_file(filesystem, path, content)
        elif filesystem.exists(path):
            filesystem.rm_file(path)


def _manifest_entry(folder: str, where: str, line: bytes | str) -> Shard | Packing | str:
    """Return what a line is about: a shard, a packing that has not ended, or the name of a replaced shard."""
    try:
        row = json.loads(line)
        if "unfinished" in row:
            return Packing(str(row["unfinished"]), int(row["number"]))
        if "replaced" in row:
            return str(row["replaced"])
        shard = Shard(_url_of(folder, str(row["shard"])), int(row["samples"]), int(row["bytes"]), str(row["crc32"]))
        if not 1 <= shard.samples <= shard.bytes:  # otherwise a wrong count would decide the size of the ledger
            raise ValueError(f"{shard.samples} samples in {shard.bytes} bytes")
        return shard
    # OverflowError: int() of JSON's Infinity. RecursionError: JSON that is nested too deeply.
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            f'{where}: {line[:80]!r} is not {{"shard", "samples", "bytes", "crc32"}} ({error}). {REMEDY}'
        ) from error


def read_elsewhere(location: str, storage: StorageSpec) -> dict[str, Shard]:
    """Return URL → shard of a manifest with whole URLs. Raises DataError if there is none, or for an invalid line."""
    with store_errors(location, storage):
        filesystem, path = open_store(location, storage, attempts=PLANNING_ATTEMPTS)
        lines = filesystem.cat_file(path).splitlines()
    found: dict[str, Shard] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            entry = _manifest_entry("", f"{location}, line {number}", line)
            if not isinstance(entry, Shard) or "/" not in entry.url:
                raise DataError(
                    f"{location}, line {number}: {line[:80]!r} does not name a shard by its whole path or URL, as "
                    "`betakd index SHARDS --manifest FILE` writes it."
                )
            found[entry.url] = entry
    return found


def write_elsewhere(location: str, shards: Iterable[Shard], storage: StorageSpec) -> None:
    """Add shards to a manifest with whole URLs. Of two processes that do so at once, one waits."""
    with claimed(location, "change", storage, waits=True) as claim:
        with store_errors(location, storage):
            filesystem, path = open_store(location, storage)
            there = read_elsewhere(location, storage) if filesystem.exists(path) else {}
        rows = there | {shard.url: shard for shard in shards}
        content = "".join(json.dumps(_row(url, shard)) + "\n" for url, shard in sorted(rows.items())).encode()
        claim.require()
        with store_errors(location, storage):
            replace_file(filesystem, path, content)


def _row(name: str, shard: Shard) -> dict[str, Any]:
    return {"shard": name, "samples": shard.samples, "bytes": shard.bytes, "crc32": shard.checksum}


def _url_of(folder: str, name: str) -> str:
    return join(folder, name) if folder else name


def folder_of(url: str) -> str:
    """Return the URL of the folder that a file is in."""
    return url.rpartition("/")[0] if "/" in url else "."


def name_of(url: str) -> str:
    """Return the base name of a file."""
    return url.rpartition("/")[2]


def by_name(shards: Iterable[Shard]) -> dict[str, Shard]:
    """Return base name → shard."""
    return {name_of(shard.url): shard for shard in shards}
