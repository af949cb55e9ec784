"""Shards by name: finds them, and detects those that are cut, missing or unknown, by the manifests of their folders."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from glob import has_magic
from itertools import chain
from typing import Any

from braceexpand import braceexpand
from fsspec.spec import AbstractFileSystem
from fsspec.utils import glob_translate

from betakd_ray.data.files import store_errors, url_like
from betakd_ray.data.manifest_file import (
    MANIFEST,
    PLANNING_ATTEMPTS,
    REMEDY,
    Manifest,
    by_name,
    change_manifest,
    folder_of,
    name_of,
    read_elsewhere,
    read_manifest_file,
    write_elsewhere,
)
from betakd_ray.data.shards import Shard, ShardDamaged
from betakd_ray.data.survey import Survey, survey_shard
from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import is_http, join, open_store

LOOKS = 3  # of `find_shards`, if a packing ends meanwhile
TARS = (".tar", ".tar.gz", ".tgz")
"""Endings of the shards that are found in a folder."""
_HELD_OUT = {"test", "val", "valid", "validation", "dev", "eval"}


def find_shards(patterns: Sequence[str], storage: StorageSpec, manifest: str | None = None) -> list[Shard]:
    """Return the shards that the patterns match: paths or URLs with {00..07} braces and * globs, or folders.

    Each comes once, sorted by URL. `manifest` is a manifest elsewhere, which describes shards beside those of their
    folders' manifests. While `pack` replaces shards, these are the former shards or the new ones, all of them.
    Raises DataError if nothing matches, a named shard or one that a manifest lists is missing, the store refuses access
    or is silent for half a minute, or a shard differs from its manifest.
    """
    for _ in range(LOOKS):
        found = _find(patterns, storage, manifest)
        # Otherwise a packing may have ended between the listing and the reading of the manifest.
        if not found.absent and not found.unlisted:
            break
    if found.absent:
        raise DataError(
            f"{found.absent[0]}: {MANIFEST} lists it, but it is not there ({len(found.absent)} such shards). Copy or "
            f"pack it again, or name the shards that you have. If it was removed on purpose: {REMEDY}"
        )
    return [_checked(url, size, found.manifests[folder_of(url)].shards) for url, size in found.sizes.items()]


def index_shards(
    patterns: Sequence[str],
    storage: StorageSpec,
    manifest: str | None = None,
    judge: Callable[[Survey], None] = lambda survey: None,
) -> list[Shard]:
    """Read whole shards that were written elsewhere, and add them to the manifest of their folder, or to `manifest`.

    `judge` gets what was seen in all shards, before anything is written, and may raise. Raises ShardDamaged for a shard
    that is not a complete tar, and DataError as `find_shards` does.
    """
    survey, found = Survey(), list[Shard]()
    for url, size in _find(patterns, storage, is_index=True).sizes.items():
        found.append(_indexed(url, size, storage, survey))
    judge(survey)
    if manifest is not None:
        write_elsewhere(manifest, found, storage)
        return found
    by_folder: dict[str, list[Shard]] = defaultdict(list)
    for shard in found:
        by_folder[folder_of(shard.url)].append(shard)
    for folder, shards in by_folder.items():
        _require_writable(folder)
        change_manifest(folder, storage, lambda there, new=shards: replace(there, shards=there.shards | by_name(new)))
    return found


def list_shards(patterns: Sequence[str], storage: StorageSpec) -> list[str]:
    """Return the URLs of shards that may have no manifest, sorted. Raises DataError as `find_shards` does."""
    return list(_find(patterns, storage, is_index=True).sizes)


def read_manifest(folder: str, storage: StorageSpec) -> dict[str, Shard]:
    """Return base name → shard; empty if there is no manifest. Raises DataError for an invalid line."""
    return read_manifest_file(folder, storage).shards


def _require_writable(folder: str) -> None:
    if is_http(folder):
        raise DataError(
            f"{folder}: a manifest cannot be written over HTTP. Give a file of your own with --manifest FILE, and name "
            "it in data.manifest."
        )


# ------------------------------------------------------------------------------------------------- finding


@dataclass(frozen=True)
class _Found:
    """Shards that patterns match, and the manifests of their folders."""

    sizes: dict[str, int | None]
    """URL → size in bytes, sorted by URL; None where a web server does not say it."""
    manifests: dict[str, Manifest]
    """URL of a folder → manifest."""
    absent: list[str]
    """URLs that a glob would match, and that a manifest lists, but that are not there."""

    @property
    def unlisted(self) -> list[str]:
        """Return the URLs without an entry in the manifest of their folder."""
        return [url for url in self.sizes if name_of(url) not in self.manifests[folder_of(url)].shards]


def _find(
    patterns: Sequence[str], storage: StorageSpec, manifest: str | None = None, *, is_index: bool = False
) -> _Found:
    """Look for shards; leave out what a glob matches, but a manifest knows to be no data."""
    expanded = [url for pattern in patterns for url in _expand_braces(pattern)]
    urls = [one for url in expanded for one in _of_folder(url, storage, is_index=is_index)]
    globs = {url: _glob(url, storage) for url in urls if has_magic(url) and not _is_name(url, storage)}
    by_folder: dict[str, list[str]] = defaultdict(list)
    for url in urls:
        if url not in globs:
            by_folder[folder_of(url)].append(url)
    sizes: dict[str, int | None] = {}
    for folder, named in by_folder.items():
        sizes |= _sizes_in(folder, named, storage)
    folders = {folder_of(url) for url in (*sizes, *chain.from_iterable(globs.values()))}
    manifests = _manifests(sorted(folders), storage, manifest)
    absent: list[str] = []
    for pattern, listed in globs.items():
        data = {url: size for url, size in listed.items() if not manifests[folder_of(url)].leaves_out(name_of(url))}
        if not data:
            raise DataError(f"{pattern}: a `betakd pack` that has not ended wrote these shards. Wait, or run it again.")
        sizes |= data
        matches = _matcher(pattern, storage)
        shards = (shard.url for each in manifests.values() for shard in each.shards.values())
        absent += [url for url in shards if url not in listed and matches(url)]
    return _Found(dict(sorted(sizes.items())), manifests, sorted(absent))


def _manifests(folders: Sequence[str], storage: StorageSpec, elsewhere: str | None) -> dict[str, Manifest]:
    """Return folder → manifest; one elsewhere describes the folders of its shards, whatever lies beside these."""
    described: dict[str, list[Shard]] = defaultdict(list)
    for shard in read_elsewhere(elsewhere, storage).values() if elsewhere else ():
        described[folder_of(shard.url)].append(shard)
    return {
        folder: Manifest(by_name(described[folder])) if folder in described else read_manifest_file(folder, storage)
        for folder in folders
    }


def _of_folder(url: str, storage: StorageSpec, *, is_index: bool) -> list[str]:
    """Return the globs of the shards in a folder; for anything else, the URL itself."""
    if name_of(url).endswith(TARS) or has_magic(name_of(url)):
        return [url]
    with store_errors(url, storage):
        filesystem, path = open_store(url, storage, attempts=PLANNING_ATTEMPTS)
        if is_http(url) or not filesystem.isdir(path):
            return [url]
        names = [info["name"].rstrip("/") for info in filesystem.ls(path, detail=True)]
    endings = [ending for ending in TARS if any(name.endswith(ending) for name in names)]
    if not endings:
        inner = [name_of(name) for name in names if filesystem.isdir(name) and not name_of(name).startswith(".")]
        hint = f" It has the folders {', '.join(sorted(inner)[:8])}: name one." if inner else ""
        raise DataError(f"{url}: is a folder without shards (*.tar, *.tar.gz, *.tgz).{hint}")
    if not is_index:
        _require_one_set(url, [name_of(name) for name in names if name.endswith(TARS)])
    return [join(re.sub(r"([*?[])", r"[\1]", url), f"*{ending}") for ending in endings]


def _require_one_set(url: str, names: Sequence[str]) -> None:
    """Raise DataError if a folder has a set that is kept for tests, beside another one."""
    sets = {re.split(r"[^a-z]", name.lower(), maxsplit=1)[0] for name in names}
    if len(sets) > 1 and sets & _HELD_OUT:
        raise DataError(
            f"{url}: is a folder with the shards of several sets ({', '.join(sorted(sets))}). Name one of them: "
            f"{join(url, f'{min(sets - _HELD_OUT, default=min(sets))}-*.tar')}."
        )


def _is_name(url: str, storage: StorageSpec) -> bool:
    """Return whether a URL with brackets is the name of a file, and not a glob."""
    if not re.search(r"\[", url) or is_http(url):
        return False
    with store_errors(url, storage):
        filesystem, path = open_store(url, storage, attempts=PLANNING_ATTEMPTS)
        return bool(filesystem.exists(path))


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


def _glob(pattern: str, storage: StorageSpec) -> dict[str, int | None]:
    with store_errors(pattern, storage):
        filesystem, path = open_store(pattern, storage, attempts=PLANNING_ATTEMPTS)
        found: dict[str, Any] = filesystem.glob(path, detail=True)  # pyright: ignore[reportAssignmentType]
        sizes = {
            url_like(pattern, filesystem, name): _size(filesystem, name, info)
            for name, info in found.items()
            # Not ==: an interrupted write of the manifest leaves a temporary file whose name begins in the same way.
            # With `**`, there are the claims beside it.
            if _is_file(filesystem, name, info) and f"/{MANIFEST}" not in f"/{name}"
        }
    if not sizes:
        listed = " A web server may give no listing: then name the shards, with braces." if is_http(pattern) else ""
        raise DataError(
            f"{pattern}: no shard matches. Check the path, or write shards there with `betakd pack`.{listed}"
        )
    return sizes


def _is_file(filesystem: AbstractFileSystem, name: str, info: dict[str, Any]) -> bool:
    if not info.get("islink"):
        return info["type"] == "file"
    # A listing of a local folder says of a link only that it is one.
    if not filesystem.exists(name):
        raise DataError(
            f"{name}: is a link to {info.get('destination', 'a file')}, which is not there. Fetch it again."
        )
    return bool(filesystem.isfile(name))


def _size(filesystem: AbstractFileSystem, name: str, info: dict[str, Any]) -> int | None:
    """Return a file's size; a listing of a web server does not have it."""
    return info["size"] if info.get("size") is not None else filesystem.info(name).get("size")


def _sizes_in(folder: str, urls: list[str], storage: StorageSpec) -> dict[str, int | None]:
    """Return the sizes in bytes of single shards, from one listing of their folder instead of a request per shard."""
    with store_errors(folder, storage):
        filesystem, folder_path = open_store(folder, storage, attempts=PLANNING_ATTEMPTS)
        paths = {url: open_store(url, storage)[1] for url in urls}
        listing = _listing(filesystem, folder_path, list(paths.values()), is_listed=not is_http(folder))
    missing = [url for url, path in paths.items() if path not in listing]
    if missing:
        raise DataError(
            f"{missing[0]}: no such shard ({len(missing)} of {len(urls)} named in {folder} are missing; the folder "
            f"has {len(listing)} files). Correct the name or its braces, or write it with `betakd pack`."
        )
    return {url_like(url, filesystem, path): listing[path] for url, path in paths.items()}


def _listing(
    filesystem: AbstractFileSystem, folder: str, paths: list[str], *, is_listed: bool
) -> dict[str, int | None]:
    """Return path → size of the files in a folder; of the named ones alone if the store gives no listing."""
    if is_listed:
        try:
            return {info["name"]: info["size"] for info in filesystem.ls(folder, detail=True)}
        except FileNotFoundError:
            return {}
        except PermissionError:  # a public bucket may give its files, and no listing
            pass
    sizes: dict[str, int | None] = {}
    for path in paths:
        try:
            sizes[path] = filesystem.info(path).get("size")
        except FileNotFoundError:
            continue
    return sizes


def _indexed(url: str, size: int | None, storage: StorageSpec, survey: Survey) -> Shard:
    shard = survey_shard(url, storage, survey)
    if size is not None and shard.bytes != size:
        raise ShardDamaged(f"{url}: only {shard.bytes} of {size} bytes could be read. Copy it again.")
    if not shard.samples:
        raise DataError(f"{url}: holds no sample (members KEY.json, KEY.jpg). Write it with `betakd pack`.")
    return shard


def _checked(url: str, size: int | None, manifest: dict[str, Shard]) -> Shard:
    shard = manifest.get(name_of(url))
    remedy = f"run `betakd index {url}`, which reads the whole shard and adds it to {MANIFEST}"
    if shard is None:
        state = "has no entry in" if manifest else "there is no"
        elsewhere = " If you cannot write there, add --manifest FILE, and name that file in data.manifest."
        raise DataError(
            f"{url}: {state} {MANIFEST} of its folder, so a cut shard would not be noticed: {remedy}.{elsewhere}"
        )
    if size is not None and shard.bytes != size:
        raise ShardDamaged(
            f"{url}: {size} bytes in the store, but {shard.bytes} in {MANIFEST}: the shard was cut or written again. "
            f"Copy or pack it again. If the file is right, {remedy}."
        )
    return Shard(url, shard.samples, shard.bytes, shard.checksum)
