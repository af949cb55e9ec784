"""Checkpoints that are whole or not there.

Every rank writes its files under a new name; the manifest, which lists them with their sizes, is written last. A
directory without a manifest does not exist as far as a resume is concerned, so a crash at any point leaves the previous
checkpoint current. The manifest is the only truth: the stream and the workers both resume from what it names.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from betakd_ray.data.ledger import Ledger
from betakd_ray.data.stream import Quarantined
from betakd_ray.errors import OutputError
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join, open_store, replace_file
from betakd_ray.train import unpickling

MANIFEST = "manifest.json"
FOLDER = "checkpoints"
ENGINE, UNIVERSAL = "deepspeed", "deepspeed_universal"
LEDGER = "ledger.json"
"""The samples that took part in a step."""
QUARANTINE = "quarantine.jsonl"
"""The samples that never will, and why."""
SKIPPED = "skipped.jsonl"
"""The steps whose gradient was not finite, and their samples."""


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint."""

    name: str
    step: int
    world_size: int
    files: dict[str, int]
    """Relative path → bytes."""


class CheckpointStore:
    """The checkpoints of one run, newest last."""

    def __init__(self, run: str, storage: StorageSpec) -> None:
        self.filesystem, root = open_store(run, storage)
        self.root = join(root, FOLDER)

    def committed(self) -> list[Manifest]:
        """Every checkpoint that has its manifest, by step."""
        found = [
            Manifest(**json.loads(self.filesystem.cat_file(path)))
            for path in self.filesystem.glob(join(self.root, "*", MANIFEST))
        ]
        return sorted(found, key=lambda manifest: manifest.step)

    def latest(self) -> Manifest | None:
        """The checkpoint to resume from."""
        return next(reversed(self.committed()), None)

    def upload(self, local: Path, name: str) -> dict[str, int]:
        """Copy one rank's files; returns them with their sizes."""
        files = {str(path.relative_to(local)): path.stat().st_size for path in local.rglob("*") if path.is_file()}
        for file in files:
            target = join(self.root, name, file)
            self.filesystem.makedirs(os.path.dirname(target), exist_ok=True)
            self.filesystem.put_file(str(local / file), target)
        return files

    def commit(self, manifest: Manifest) -> None:
        """Make a checkpoint current. Raises OutputError if a file did not arrive whole."""
        for file, size in manifest.files.items():
            seen = self.filesystem.info(join(self.root, manifest.name, file))["size"]
            if seen != size:
                raise OutputError(f"{self.root}/{manifest.name}/{file}: {seen} of {size} bytes were stored")
        path = join(self.root, manifest.name, MANIFEST)
        replace_file(self.filesystem, path, json.dumps(asdict(manifest)).encode())

    def prune(self, keep: int) -> None:
        """Remove what `keep` newer checkpoints supersede, and what never got a manifest."""
        committed = self.committed()
        kept = {manifest.name for manifest in committed[-keep:]}
        for path in self.filesystem.ls(self.root, detail=False) if self.filesystem.exists(self.root) else []:
            if path.rstrip("/").rsplit("/", 1)[-1] not in kept:
                self.filesystem.rm(path, recursive=True)

    def read_text(self, manifest: Manifest, file: str) -> str:
        """A small file of a checkpoint."""
        return cast(bytes, self.filesystem.cat_file(join(self.root, manifest.name, file))).decode()

    def ledger(self, manifest: Manifest) -> Ledger:
        """What the training up to that checkpoint consumed."""
        return Ledger.from_json(self.read_text(manifest, LEDGER))

    def quarantined(self, manifest: Manifest) -> list[Quarantined]:
        """What the readers had set aside by then."""
        return [Quarantined(**json.loads(line)) for line in self.read_text(manifest, QUARANTINE).splitlines()]

    @contextmanager
    def on_disk(self, manifest: Manifest, attempt: str) -> Iterator[Path]:
        """Collective: the checkpoint in a folder of this node, which its ranks share, for as long as it is needed.

        A checkpoint of another number of ranks gets DeepSpeed's universal form beside it; the committed one is only
        read.
        """
        run = hashlib.sha256(self.root.encode()).hexdigest()[:12]
        folder = Path(tempfile.gettempdir()) / f"betakd-{run}-{manifest.name}-{attempt}"
        if _first_of_node():
            self._fetch(manifest, folder)
            if manifest.world_size != dist.get_world_size():
                _make_universal(folder)
        dist.barrier()
        try:
            yield folder
            dist.barrier()
        finally:
            if _first_of_node():
                shutil.rmtree(folder, ignore_errors=True)

    def _fetch(self, manifest: Manifest, folder: Path) -> None:
        for file in manifest.files:
            target = folder / file
            if not target.resolve().is_relative_to(folder.resolve()):
                raise OutputError(f"{self.root}/{manifest.name}/{MANIFEST}: {file} is outside of the checkpoint")
            target.parent.mkdir(parents=True, exist_ok=True)
            self.filesystem.get_file(join(self.root, manifest.name, file), str(target))


def save(store: CheckpointStore, step: int, attempt: str, keep: int, write: Callable[[Path], None]) -> None:
    """Collective. `write(folder)` writes this rank's files; returns on every rank once the checkpoint is committed."""
    name = f"step-{step:08d}-{attempt}"
    local = Path(tempfile.mkdtemp(prefix="betakd-save-"))
    try:
        write(local)
        files = gather(store.upload(local, name))
    finally:
        shutil.rmtree(local)
    if dist.get_rank() == 0:
        merged = {file: size for each in files for file, size in each.items()}
        store.commit(Manifest(name, step, dist.get_world_size(), merged))
        store.prune(keep)
    dist.barrier()


def load_engine(engine: Any, folder: Path) -> None:
    """Collective: DeepSpeed's state from a checkpoint, in its universal form where that was made.

    Raises OutputError for a checkpoint that is incomplete, or would run code when loaded.
    """
    is_universal = (folder / UNIVERSAL).exists()
    tag = UNIVERSAL if is_universal else ENGINE
    engine._config.load_universal_checkpoint = is_universal
    # Frozen parameters are not in the checkpoint: they are as the spec's models have them.
    with unpickling.tensors_only(folder.name):
        path, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
    if path is None:
        raise OutputError(f"{folder}: DeepSpeed cannot read its part of the checkpoint")


def _first_of_node() -> bool:
    return int(os.environ["LOCAL_RANK"]) == 0


def _make_universal(folder: Path) -> None:
    """DeepSpeed's form for any number of ranks. Its plain engine (stage 0, float32) is alike on all and needs none."""
    if not list((folder / ENGINE).glob("*_optim_states.pt")):
        return
    command = [sys.executable, "-m", unpickling.__name__, "--inject_missing_state"]
    command += ["--input_folder", str(folder / ENGINE), "--output_folder", str(folder / UNIVERSAL)]
    here = {"PYTHONPATH": os.pathsep.join(sys.path)}  # Ray adds to the path of a worker, not to its environment
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | here)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OutputError(f"{folder.name}: DeepSpeed cannot convert the checkpoint to this number of ranks: {reason}")


def gather(value: Any) -> list[Any]:
    """Collective: every rank's value, by rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone
