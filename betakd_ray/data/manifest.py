"""Manifest of a folder of shards: finds shards by name, and detects shards that are cut, missing or unknown.

A folder of shards has a `manifest.jsonl`, one line per shard: {"shard": name, "samples": n, "bytes": b, "crc32": hex}.
While `pack` replaces shards, it also says which files are no data:

    {"unfinished": prefix, "number": n}    shards that are being written
    {"replaced": name}                     a former shard that is about to be removed
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from glob import has_magic
from itertools import chain
from typing import Any

from braceexpand import braceexpand
from fsspec.utils import glob_translate

from betakd_ray.data.claims import Claim, claimed
from betakd_ray.data.files import store_errors, url_like
from betakd_ray.data.shards import Shard, ShardDamaged, scan_shard
from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import ASIDE, join, open_store, replace_file

MANIFEST = "manifest.jsonl"
LOOKS = 3  # of `find_shards`, if a packing ends meanwhile
PLANNING_ATTEMPTS = 3  # fewer than while reading: a user waits at the terminal until the job starts

_REMEDY = "Delete the manifest and run `betakd index` on the folder's shards."


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


def find_shards(patterns: Sequence[str], storage: StorageSpec) -> list[Shard]:
    """Return the shards that the patterns match (paths or URLs with {00..07} braces and * globs), sorted, each once.

    They are sorted by URL. While `pack` replaces shards, these are the former shards or the new ones, all of them.
    Raises DataError if nothing matches, a named shard or one that a manifest lists is missing, the store refuses access
    or is silent for half a minute, or a shard differs from its manifest.
    """
    for _ in range(LOOKS):
        found = _find(patterns, storage)
        # Otherwise a packing may have ended between the listing and the reading of the manifest.
        if not found.absent and not found.unlisted:
            break
    if found.absent:
        raise DataError(
            f"{found.absent[0]}: {MANIFEST} lists it, but it is not there ({len(found.absent)} such shards). Copy or "
            f"pack it again, or name the shards that you have. If it was removed on purpose: {_REMEDY}"
        )
    return [_checked(url, size, found.manifests[_folder(url)].shards) for url, size in found.sizes.items()]


def index_shards(patterns: Sequence[str], storage: StorageSpec) -> list[Shard]:
    """Read whole shards that were written elsewhere, and add them to the manifest of their folder.

    Raises ShardDamaged for a shard that is not a complete tar, and DataError as `find_shards` does.
    """
    by_folder: dict[str, list[Shard]] = defaultdict(list)
    for url, size in _find(patterns, storage).sizes.items():
        by_folder[_folder(url)].append(_indexed(url, size, storage))
    for folder, shards in by_folder.items():
        _change(folder, storage, lambda there, new=shards: replace(there, shards=there.shards | _by_name(new)))
    return sorted((shard for shards in by_folder.values() for shard in shards), key=lambda shard: shard.url)


def read_manifest(folder: str, storage: StorageSpec) -> dict[str, Shard]:
    """Return base name → shard; empty if there is no manifest. Raises DataError for an invalid line."""
    return _read(folder, storage).shards


# ------------------------------------------------------------------------------------------------- packing


@contextmanager
def sole_packing(folder: str, prefix: str, storage: StorageSpec) -> Iterator[tuple[Packing, Claim]]:
    """Note in the manifest that shards of a prefix are being written; yield their names and the claim to write them.

    Until `commit_packing` they are no data. What an interrupted packing of the prefix left is removed before, and what
    this one left or replaced after the block. Raises DataError if another process packs this prefix.
    """
    with claimed(join(folder, MANIFEST), f"prefix-{prefix}", storage, waits=False) as claim:
        packing = _begun(folder, prefix, storage)
        try:
            yield packing, claim
        finally:
            if claim.is_held():
                clear_packings(folder, prefix, storage)
            else:  # the prefix is another process's now: only what this one wrote may go
                _remove(folder, storage, lambda name, _: Packing.of(name, prefix) == packing)


def _begun(folder: str, prefix: str, storage: StorageSpec) -> Packing:
    """Clear a prefix, and note a new packing of it. Its number is higher than that of any other, also of a cleared one.

    So a process that stood still while its packing was cleared writes to no file of another, and learns it at its end.
    """
    manifest, names = _read(folder, storage), _names(folder, storage)
    known = [Packing.of(name, prefix) for name in (*manifest.shards, *manifest.replaced, *names)]
    known += [each for each in manifest.unfinished if each.prefix == prefix]
    packing = Packing(prefix, 1 + max((each.number for each in known if each), default=-1))
    clear_packings(folder, prefix, storage)
    _change(folder, storage, lambda there: replace(there, unfinished=there.unfinished | {packing}))
    return packing


def commit_packing(folder: str, packing: Packing, shards: Iterable[Shard], storage: StorageSpec) -> None:
    """Replace the former shards of the packing's prefix by `shards` in the manifest, at once.

    Raises DataError if another process has cleared this packing meanwhile.
    """

    def change(there: Manifest) -> Manifest:
        if packing not in there.unfinished:
            raise DataError(
                f"{folder}: another `betakd pack` of {packing.prefix} has removed the shards of this one, which stood "
                "still. See that only one writes there, and run it again."
            )
        former = {name for name in there.shards if Packing.of(name, packing.prefix)}
        kept = {name: shard for name, shard in there.shards.items() if name not in former}
        return Manifest(kept | _by_name(shards), there.replaced | former, there.unfinished - {packing})

    _change(folder, storage, change)


def clear_packings(folder: str, prefix: str, storage: StorageSpec) -> None:
    """Remove the shards of a prefix that were replaced or are unfinished, and what the manifest says of them.

    No other file is removed: neither a shard that the manifest lists, nor one that it does not know.
    """
    manifest = _read(folder, storage)
    replaced = {name for name in manifest.replaced if Packing.of(name, prefix)}
    unfinished = {packing for packing in manifest.unfinished if packing.prefix == prefix}
    if not replaced and not unfinished:
        return
    _remove(folder, storage, lambda name, there: bool(Packing.of(name, prefix)) and there.leaves_out(name))
    # Last: otherwise nobody would know, after an interruption, what is still to be removed.
    _change(folder, storage, lambda now: Manifest(now.shards, now.replaced - replaced, now.unfinished - unfinished))


def _remove(folder: str, storage: StorageSpec, is_waste: Callable[[str, Manifest], bool]) -> None:
    """Remove the files of a folder that are waste, given their base name and the manifest; never a listed shard."""
    manifest = _read(folder, storage)
    for name in _names(folder, storage):
        if name not in manifest.shards and is_waste(name, manifest):
            with store_errors(join(folder, name), storage):
                filesystem, path = open_store(join(folder, name), storage)
                filesystem.rm_file(path)


def _names(folder: str, storage: StorageSpec) -> list[str]:
    """Return the base names in a folder, sorted; [] if there is no such folder."""
    with store_errors(folder, storage):
        filesystem, path = open_store(folder, storage)
        try:
            return sorted(_name(name) for name in filesystem.ls(path, detail=False))
        except FileNotFoundError:
            return []


def _by_name(shards: Iterable[Shard]) -> dict[str, Shard]:
    return {_name(shard.url): shard for shard in shards}


# ------------------------------------------------------------------------------------------------- the file


def _read(folder: str, storage: StorageSpec) -> Manifest:
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
                if entries.setdefault(_name(shard.url), shard) != shard:
                    raise DataError(
                        f"{url}, line {number}: {_name(shard.url)} has other numbers in a line above. {_REMEDY}"
                    )
    return Manifest(entries, frozenset(replaced), frozenset(unfinished))


def _change(folder: str, storage: StorageSpec, change: Callable[[Manifest], Manifest]) -> None:
    """Replace the manifest by what `change` returns for it. Of two processes that do so at once, one waits."""
    with claimed(join(folder, MANIFEST), "change", storage, waits=True) as claim:
        changed = change(_read(folder, storage))
        claim.require()
        _store(folder, changed, storage)


def _store(folder: str, manifest: Manifest, storage: StorageSpec) -> None:
    """Replace the manifest of a folder, at once; remove it if there is nothing to say."""
    rows: list[dict[str, Any]] = [
        {"shard": name, "samples": shard.samples, "bytes": shard.bytes, "crc32": shard.checksum}
        for name, shard in sorted(manifest.shards.items())
    ]
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


# ------------------------------------------------------------------------------------------------- finding


@dataclass(frozen=True)
class _Found:
    """Shards that patterns match, and the manifests of their folders."""

    sizes: dict[str, int]
    """URL → size in bytes, sorted by URL."""
    manifests: dict[str, Manifest]
    """URL of a folder → manifest."""
    absent: list[str]
    """URLs that a glob would match, and that a manifest lists, but that are not there."""

    @property
    def unlisted(self) -> list[str]:
        """Return the URLs without an entry in the manifest of their folder."""
        return [url for url in self.sizes if _name(url) not in self.manifests[_folder(url)].shards]


def _find(patterns: Sequence[str], storage: StorageSpec) -> _Found:
    """Look for shards; leave out what a glob matches, but a manifest knows to be no data."""
    urls = [url for pattern in patterns for url in _expand_braces(pattern)]
    by_folder: dict[str, list[str]] = defaultdict(list)
    for url in urls:
        if not has_magic(url):
            by_folder[_folder(url)].append(url)
    sizes: dict[str, int] = {}
    for folder, named in by_folder.items():
        sizes |= _sizes_in(folder, named, storage)
    globs = {url: _glob(url, storage) for url in urls if has_magic(url)}
    folders = {_folder(url) for url in (*sizes, *chain.from_iterable(globs.values()))}
    manifests = {folder: _read(folder, storage) for folder in sorted(folders)}
    absent: list[str] = []
    for pattern, listed in globs.items():
        data = {url: size for url, size in listed.items() if not manifests[_folder(url)].leaves_out(_name(url))}
        if not data:
            raise DataError(f"{pattern}: a `betakd pack` that has not ended wrote these shards. Wait, or run it again.")
        sizes |= data
        matches = _matcher(pattern, storage)
        shards = (shard.url for manifest in manifests.values() for shard in manifest.shards.values())
        absent += [url for url in shards if url not in listed and matches(url)]
    return _Found(dict(sorted(sizes.items())), manifests, sorted(absent))


def _matcher(pattern: str, storage: StorageSpec) -> Callable[[str], bool]:
    """Return a function that says whether `_glob` would list a URL."""
    filesystem, path = open_store(pattern, storage)
    compiled = re.compile(glob_translate(path))
    return lambda url: compiled.match(str(filesystem._strip_protocol(url))) is not None


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
        # With `**`, there are the claims beside it.
        if info["type"] == "file" and f"/{MANIFEST}" not in f"/{name}"
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


def _manifest_entry(folder: str, where: str, line: bytes | str) -> Shard | Packing | str:
    """Return what a line is about: a shard, a packing that has not ended, or the name of a replaced shard."""
    try:
        row = json.loads(line)
        if "unfinished" in row:
            return Packing(str(row["unfinished"]), int(row["number"]))
        if "replaced" in row:
            return str(row["replaced"])
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
