"""Replacing of shards in a folder: the former ones stay whole until all new ones are, by one process at a time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from betakd_ray.data.claims import Claim, claimed
from betakd_ray.data.files import store_errors
from betakd_ray.data.manifest_file import (
    MANIFEST,
    Manifest,
    Packing,
    by_name,
    change_manifest,
    name_of,
    read_manifest_file,
)
from betakd_ray.data.shards import Shard
from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join, open_store


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
    manifest, names = read_manifest_file(folder, storage), _names(folder, storage)
    known = [Packing.of(name, prefix) for name in (*manifest.shards, *manifest.replaced, *names)]
    known += [each for each in manifest.unfinished if each.prefix == prefix]
    packing = Packing(prefix, 1 + max((each.number for each in known if each), default=-1))
    clear_packings(folder, prefix, storage)
    change_manifest(folder, storage, lambda there: replace(there, unfinished=there.unfinished | {packing}))
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
        return Manifest(kept | by_name(shards), there.replaced | former, there.unfinished - {packing})

    change_manifest(folder, storage, change)


def clear_packings(folder: str, prefix: str, storage: StorageSpec) -> None:
    """Remove the shards of a prefix that were replaced or are unfinished, and what the manifest says of them.

    No other file is removed: neither a shard that the manifest lists, nor one that it does not know.
    """
    manifest = read_manifest_file(folder, storage)
    replaced = {name for name in manifest.replaced if Packing.of(name, prefix)}
    unfinished = {packing for packing in manifest.unfinished if packing.prefix == prefix}
    if not replaced and not unfinished:
        return
    _remove(folder, storage, lambda name, there: bool(Packing.of(name, prefix)) and there.leaves_out(name))
    # Last: otherwise nobody would know, after an interruption, what is still to be removed.
    change_manifest(
        folder, storage, lambda now: Manifest(now.shards, now.replaced - replaced, now.unfinished - unfinished)
    )


def _remove(folder: str, storage: StorageSpec, is_waste: Callable[[str, Manifest], bool]) -> None:
    """Remove the files of a folder that are waste, given their base name and the manifest; never a listed shard."""
    manifest = read_manifest_file(folder, storage)
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
            return sorted(name_of(name) for name in filesystem.ls(path, detail=False))
        except FileNotFoundError:
            return []
