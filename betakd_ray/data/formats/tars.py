"""Shards that others have written: WebDataset, Energon, img2dataset; also with dots in names, or members apart.

A tar is read twice: once as strictly as a reader reads it, since a cut one must not pass for a whole one, and once by
the places of its members.
"""

import tarfile
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, cast

from betakd_ray.data.files import store_errors
from betakd_ray.data.manifest import list_shards
from betakd_ray.data.media import MEDIA
from betakd_ray.data.samples import BadSample, TarMembers, parse_sample
from betakd_ray.data.shards import MAX_SAMPLE_BYTES, member_fault, scan_shard, split_name, tar_errors
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import open_store


def rows(location: str, storage: StorageSpec) -> Iterator[tuple[str, Any]]:
    """Yield the samples of the shards at a location: a name, a glob or a folder."""
    for url in list_shards([location], storage):
        scan_shard(url, storage)
        with store_errors(url, storage), tar_errors(url):
            filesystem, path = open_store(url, storage)
            with (
                cast(Any, filesystem.open(path, "rb")) as stream,
                tarfile.open(fileobj=stream, mode="r:*") as tar,
            ):
                yield from _samples(tar, url)


def _samples(tar: tarfile.TarFile, url: str) -> Iterator[tuple[str, Any]]:
    for number, (key, members) in enumerate(_by_key(tar.getmembers()).items()):
        yield f"{url}, sample {number} ({key})", _record(tar, TarMembers(key, number, True), members)


def _by_key(members: list[tarfile.TarInfo]) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Return key → extension → member. A key is the name of a json or txt without that ending, whatever dots it has."""
    stems = {member.name.rpartition(".")[0] for member in members if member.name.endswith((".json", ".txt"))}
    found: dict[str, dict[str, tarfile.TarInfo]] = defaultdict(dict)
    for member in members:
        key, extension = split_name(member.name)
        if member.isdir() or key is None:
            continue
        stem, _, ending = member.name.rpartition(".")
        shorter, _, number = stem.rpartition(".")
        if stem in stems:
            key, extension = stem, ending.lower()
        elif ending.lower() in MEDIA and shorter in stems:
            key, extension = shorter, f"{number}.{ending}".lower()
        found[key][extension] = member
    return found


def _record(tar: tarfile.TarFile, group: TarMembers, members: dict[str, tarfile.TarInfo]) -> dict[str, Any] | str:
    """Return the record of a sample with the contents of its images; a text that says why it is of no use."""
    for extension, member in members.items():
        group.size += member.size
        group.fault = group.fault or member_fault(member, extension, group)
        if not group.fault and group.size <= MAX_SAMPLE_BYTES:
            content = tar.extractfile(member)
            group.members[extension] = content.read() if content else b""
    sample = parse_sample(group)
    if isinstance(sample, BadSample):
        return sample.reason
    system = [{"from": "system", "value": sample.system}] if sample.system else []
    extra = {name: value for name, value in sample.extra.items() if name not in ("image", "images")}
    return {**extra, "id": sample.id, "conversations": [*system, *sample.conversation], "images": sample.images}
