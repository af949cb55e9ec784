"""Checkpoints, as all ranks save and load them together. `run.checkpoint` is the store; its docstring has the rules.

Collectives here run on the host, over a gloo group. Its timeout should be long, because the upload or download of one
rank may take many minutes longer than another's. If a rank dies meanwhile, `watch` finds it, not the timeout.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from betakd_ray.data.ledger import Ledger
from betakd_ray.engine.checkpoint import make_universal
from betakd_ray.leftovers import TEMPORARY, owned, temporary_folder
from betakd_ray.output import disk_errors
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.folder import ENGINE, READ_WHERE_NEEDED
from betakd_ray.run.manifest import Manifest

_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_")
"""Pattern in the name of a file that DeepSpeed reads on one rank only."""
Group = dist.ProcessGroup | None
"""Process group over all ranks; None is torch's default group."""


def save(
    store: CheckpointStore, step: int, attempt: str, keep: int, write: Callable[[Path], None], group: Group = None
) -> None:
    """Save a checkpoint (collective: every rank must call it).

    `write(folder)` writes this rank's files to a local folder. The function returns on every rank only after rank 0 has
    committed the checkpoint.
    """
    name = f"step-{step:08d}-{attempt}"
    with temporary_folder("save") as local:
        with disk_errors(local):
            write(local)
        files = gather(store.upload(local, name), group)
    # All ranks have uploaded their files: `gather` waits for each of them. Only now may the manifest be written.
    if dist.get_rank() == 0:
        merged = {file: stored for each in files for file, stored in each.items()}
        store.commit(store.manifest(name, step, dist.get_world_size(), merged))
        store.prune(keep)
    dist.barrier(group)


def merge_ledgers(whole: Ledger | None, delta: Ledger, group: Group = None) -> None:
    """Add every rank's `delta` to `whole` (collective: every rank must call it).

    `delta` holds a rank's samples since the last checkpoint. Only rank 0 has `whole`. Raises what `Ledger.merge_delta`
    raises if two ranks, or a rank and an earlier checkpoint, trained on the same sample.
    """
    deltas: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(delta.delta_to_json(), deltas, dst=0, group=group)
    if deltas is None:
        return
    assert whole is not None, "rank 0 holds the whole ledger"
    for each in deltas:
        whole.merge_delta(each)


@contextmanager
def on_disk(store: CheckpointStore, manifest: Manifest, attempt: str, group: Group = None) -> Iterator[Path]:
    """Yield a folder with the files of a checkpoint that this node's ranks need; remove it afterwards. Collective.

    The ranks of a node share the folder. Each rank copies its own files. The files that all ranks need are divided
    among the ranks of a node. If another number of ranks wrote the checkpoint, rank 0 converts it to DeepSpeed's
    universal form and stores that beside the checkpoint, whose committed files do not change. The other ranks, and
    any later resume from this checkpoint, copy the universal form.
    """
    run = hashlib.sha256(store.root.encode()).hexdigest()[:12]
    # The attempt is in the name, because a rank of an earlier start may still remove its own folder of this checkpoint.
    with owned(Path(tempfile.gettempdir(), f"{TEMPORARY}{run}-{manifest.name}-{attempt}")) as folder:
        store.require_stored(manifest)
        wanted = manifest
        if manifest.world_size != dist.get_world_size() and _has_optimizer_parts(manifest):
            wanted = _from_rank_0(lambda: _universal(store, manifest, folder), group)
        store.fetch(wanted, _of_this_rank(wanted), folder, str(dist.get_rank()))
        # Each rank has copied only a part of what all ranks of the node read.
        dist.barrier(group)
        yield folder
        # No rank may remove the folder while another one reads it.
        dist.barrier(group)


def _universal(store: CheckpointStore, manifest: Manifest, folder: Path) -> Manifest:
    """Return a manifest with DeepSpeed's files in the universal form. Make and store that form if it is missing."""
    if stored := store.universal(manifest):
        return stored
    parts = [file for file in manifest.files if file.startswith(f"{ENGINE}/")]
    store.fetch(manifest, parts, folder, str(dist.get_rank()))
    with disk_errors(folder):
        make_universal(folder)
        shutil.rmtree(folder / ENGINE)
    return store.add_universal(manifest, folder)


def _local_rank() -> int:
    return int(os.environ["LOCAL_RANK"])


def _of_this_rank(manifest: Manifest) -> list[str]:
    """Return the files that this rank copies to its node: its own, and its part of those that every rank reads."""
    rank, node_ranks = dist.get_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    own, shared = [], []
    for file in manifest.files:
        if match := _OF_RANK.search(file) if file.startswith(f"{ENGINE}/") else None:
            if int(match[1]) == rank:
                own.append(file)
        elif file not in READ_WHERE_NEEDED:
            shared.append(file)
    shared.sort(key=lambda file: (-manifest.files[file].size, file))
    # Largest first, so that each rank of a node copies about as many bytes. Without LOCAL_WORLD_SIZE the node's first
    # rank copies all of them.
    return own + (shared[_local_rank() :: node_ranks] if _local_rank() < node_ranks else [])


def _has_optimizer_parts(manifest: Manifest) -> bool:
    """Return whether each rank holds a part of the optimizer's state.

    With DeepSpeed's plain engine (stage 0, float32) the state is equal on all ranks, so no conversion is needed.
    """
    return any(file.endswith("_optim_states.pt") for file in manifest.files)


def _from_rank_0(make: Callable[[], Manifest], group: Group) -> Manifest:
    """Return on every rank what `make` returns on rank 0 (collective: every rank must call it)."""
    made = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made, src=0, group=group)
    return cast(Manifest, made[0])


def gather(value: Any, group: Group = None) -> list[Any]:
    """Return every rank's value, in the order of the ranks (collective: every rank must call it)."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value, group=group)
    return everyone
