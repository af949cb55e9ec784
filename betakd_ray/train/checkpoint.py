"""Checkpoints, as all ranks save and load them together. `run.checkpoint` is the store; its docstring has the rules.

Collectives here run on the host, over gloo groups. Their timeout should be long, because the upload or download of one
rank may take many minutes longer than another's. If a rank dies meanwhile, `watch` finds it, not the timeout.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from betakd_ray.background import in_background
from betakd_ray.data.ledger import Ledger
from betakd_ray.engine.checkpoint import make_universal
from betakd_ray.leftovers import TEMPORARY, owned, temporary_folder
from betakd_ray.output import disk_errors
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.folder import ENGINE, LOGGED, METRICS, READ_WHERE_NEEDED
from betakd_ray.run.manifest import Manifest
from betakd_ray.run.records import LOGGED_FILE

_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_")
"""Pattern in the name of a file that DeepSpeed reads on one rank only."""
Group = dist.ProcessGroup | None
"""Process group over all ranks; None is torch's default group."""


class Saver:
    """Saver of checkpoints: a step waits only until this rank's files are on its own disk; a thread stores them.

    Every rank has one, and calls `save` at the same steps. The threads of all ranks meet in `group`, which nobody else
    may use: in a group of two threads, ranks could match collectives in different orders.
    """

    def __init__(
        self,
        store: CheckpointStore,
        attempt: str,
        keep: int,
        group: Group = None,
        on_commit: Callable[[int, float], None] = lambda step, seconds: None,
    ) -> None:
        """`on_commit(step, seconds)` is called on rank 0 after each commit, with the time since the save began."""
        self._store, self._attempt, self._keep, self._group = store, attempt, keep, group
        self._on_commit = on_commit
        self._storing: Future[None] | None = None

    def save(self, step: int, write: Callable[[Path], None], before_commit: Callable[[], None] = lambda: None) -> None:
        """Take a checkpoint. Collective.

        `write(folder)` writes this rank's files to a local folder, and returns when they are as of this step. The rest
        happens while the training goes on: the upload, then, when all ranks have uploaded, `before_commit()` and the
        commit on rank 0. Waits until the checkpoint before is stored, and raises the error that prevented that.
        """
        self.wait()
        begun = time.monotonic()
        with ExitStack() as folders:
            folder = folders.enter_context(temporary_folder("save"))
            with disk_errors(folder):
                write(folder)
            owner = folders.pop_all()  # from here on, the thread removes the folder

        def store() -> None:
            with owner:
                self._commit(step, folder, before_commit)
            if dist.get_rank() == 0:
                self._on_commit(step, time.monotonic() - begun)

        self._storing = in_background(store, "checkpoint")

    def check(self) -> None:
        """Raise the error of the checkpoint that is being stored, if it has failed. Never waits."""
        if self._storing and self._storing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is stored. Raises the error that prevented it."""
        storing, self._storing = self._storing, None
        if storing:
            storing.result()

    def _commit(self, step: int, folder: Path, before_commit: Callable[[], None]) -> None:
        name = f"step-{step:08d}-{self._attempt}"
        files = gather(self._store.upload(folder, name), self._group)
        # All ranks have uploaded their files: `gather` waits for each of them. Only now may the manifest be written.
        if dist.get_rank() == 0:
            before_commit()
            merged = {file: stored for each in files for file, stored in each.items()}
            self._store.commit(self._store.manifest(name, step, dist.get_world_size(), merged))
            self._store.prune(self._keep)
        # Otherwise a rank could end well, although the last checkpoint was not committed.
        dist.barrier(self._group)


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


def metrics_reference(store: CheckpointStore, manifest: Manifest) -> str:
    """Return how many metrics had been logged at a checkpoint, as text of `tracking.MetricsWriter.reference`.

    Checkpoints of older versions hold all the metrics themselves.
    """
    if LOGGED in manifest.files:
        return json.dumps(asdict(store.parsed(manifest, LOGGED_FILE)))
    return json.dumps({"step": manifest.step, "records": store.read_text(manifest, METRICS).count("\n")})


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
