"""Checkpoints that are whole or not there.

Every rank writes its files under a new name; the manifest, which lists them with their sizes, is written last. A
directory without a manifest does not exist as far as a resume is concerned, so a crash at any point leaves the previous
checkpoint current. The manifest is the only truth: the stream and the workers both resume from what it names.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from betakd_ray.data.files import url_like
from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Quarantined
from betakd_ray.errors import OutputError, OutputUnreachable
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
SPEC, PROGRESS = "spec.json", "progress.json"
SKIPPED = "skipped.jsonl"
"""The steps whose gradient was not finite, and their samples."""

_NAME = re.compile(r"step-(\d+)-.+")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LEFT_BYTES = 1 << 20
"""A disk with less is full."""
_listed = Retrying(retry=retry_if_exception_type(FileNotFoundError), stop=stop_after_attempt(9), reraise=True)
"""A manifest that was listed and is gone was pruned meanwhile: what superseded it is in the next listing."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint."""

    name: str
    step: int
    world_size: int
    files: dict[str, int]
    """Relative path → bytes."""

    def __post_init__(self) -> None:
        for file in map(PurePosixPath, self.files):
            if file.is_absolute() or ".." in file.parts:
                raise ValueError(f"{file} is outside of the checkpoint")

    def missing(self, sizes: Mapping[str, int]) -> str | None:
        """The first file that is not among those of so many bytes, and what is there of it."""
        for file, size in self.files.items():
            if sizes.get(file) != size:
                return f"{file}: {sizes.get(file, 0)} of {size} bytes"
        return None


_MANIFEST = TypeAdapter(Manifest)


class CheckpointStore:
    """The checkpoints of one run, newest last. What the store raises is an OutputError here."""

    def __init__(self, run: str, storage: StorageSpec) -> None:
        self.filesystem, root = open_store(run, storage)
        self.root = join(root, FOLDER)
        self.url = join(url_like(run, self.filesystem, root), FOLDER)

    def committed(self) -> list[Manifest]:
        """Every checkpoint that has its manifest, by step. Raises OutputError if one is damaged."""
        with self._errors():
            manifests = _listed(self._manifests)
        found = [self._manifest(name, content) for name, content in manifests.items()]
        return sorted(found, key=lambda manifest: (manifest.step, manifest.name))

    def latest(self) -> Manifest | None:
        """The checkpoint to resume from."""
        return next(reversed(self.committed()), None)

    def upload(self, local: Path, name: str) -> dict[str, int]:
        """Copy one rank's files; returns them with their sizes."""
        files = _sizes(local)
        for file in files:
            target = join(self.root, name, file)
            with self._errors(name, file):
                self.filesystem.makedirs(os.path.dirname(target), exist_ok=True)
                self.filesystem.put_file(str(local / file), target)
        return files

    def commit(self, manifest: Manifest) -> None:
        """Make a checkpoint current. Raises OutputError if a file did not arrive whole."""
        if missing := manifest.missing(self._stored(manifest.name)):
            raise OutputError(
                f"{self.url}/{manifest.name}/{missing} were stored. The checkpoint before stays the current one: find "
                "out what else writes or removes files there, and run the job again to go on from it."
            )
        path = join(self.root, manifest.name, MANIFEST)
        with self._errors(manifest.name, MANIFEST):
            replace_file(self.filesystem, path, json.dumps(asdict(manifest)).encode())

    def prune(self, keep: int) -> None:
        """Remove what `keep` newer checkpoints supersede, and what was begun up to the newest and never committed.

        What cannot be removed stays until the next time; the job goes on, with a warning.
        """
        try:
            self._prune(keep)
        except OutputError as error:
            _LOG.warning("superseded checkpoints are still there: %s", error)

    def read_text(self, manifest: Manifest, file: str) -> str:
        """A small file of a checkpoint."""
        with self._errors(manifest.name, file):
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
        try:
            if _first_of_node():
                self._fetch(manifest, folder)
                if manifest.world_size != dist.get_world_size():
                    _make_universal(folder)
            dist.barrier()
            yield folder
            dist.barrier()
        finally:
            if _first_of_node():
                shutil.rmtree(folder, ignore_errors=True)

    def _fetch(self, manifest: Manifest, folder: Path) -> None:
        missing = manifest.missing(self._stored(manifest.name))
        if not missing:
            for file in manifest.files:
                with self._errors(manifest.name, file), _disk_errors(folder):
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    self.filesystem.get_file(join(self.root, manifest.name, file), str(folder / file))
            missing = manifest.missing(_sizes(folder))
        if missing:
            raise self._unusable(manifest.name, f"{missing} are there")

    # ----------------------------------------------------------------------------------------- the store

    def _stored(self, *name: str) -> dict[str, int]:
        """Every file of one checkpoint, or of all: relative path → bytes."""
        folder = join(self.root, *name)
        with self._errors(*name):
            found = cast(dict[str, Any], self.filesystem.find(folder, detail=True))
        return {path.removeprefix(f"{folder}/"): info["size"] for path, info in found.items()}

    def _manifests(self) -> dict[str, bytes]:
        """Name of a checkpoint → its manifest, unread."""
        found = {}
        for path in self._stored():
            name, _, file = path.partition("/")
            if file == MANIFEST:
                found[name] = self.filesystem.cat_file(join(self.root, path))
        return found

    def _manifest(self, name: str, content: bytes) -> Manifest:
        try:
            manifest = _MANIFEST.validate_json(content)
        except ValidationError as error:
            raise self._unusable(name, f"{MANIFEST} is damaged: {error.errors()[0]['msg']}") from error
        if manifest.name != name:
            raise self._unusable(name, f"{MANIFEST} is that of {manifest.name}")
        return manifest

    def _prune(self, keep: int) -> None:
        committed = self.committed()
        kept = {manifest.name for manifest in committed[-keep:]}
        for name in sorted({path.partition("/")[0] for path in self._stored()} - kept):
            match = _NAME.fullmatch(name)
            # Beyond the newest, another attempt at this run may be writing.
            if match and committed and int(match[1]) <= committed[-1].step:
                self._remove(name)

    def _remove(self, name: str) -> None:
        """Its manifest first: there is never a committed checkpoint without its files."""
        folder = join(self.root, name)
        with self._errors(name):
            if self.filesystem.exists(join(folder, MANIFEST)):
                self.filesystem.rm_file(join(folder, MANIFEST))
            self.filesystem.rm(folder, recursive=True)

    def _unusable(self, name: str, why: str) -> OutputError:
        return OutputError(
            f"{self.url}/{name}: {why}. Remove this folder, and run the job again to go on from the checkpoint before."
        )

    def _errors(self, *parts: str) -> AbstractContextManager[None]:
        return output_errors(join(self.url, *parts))


@contextmanager
def output_errors(url: str) -> Iterator[None]:
    """What the output's store raises, as OutputError: OutputUnreachable where it may go away by itself."""
    try:
        yield
    except OSError as error:
        kind = OutputUnreachable
        remedy = "Check output.path and output.storage, the network and the credentials in the environment"
        if error.errno in _FULL:
            kind = OutputError
            remedy = "The disk is full: free some of it, or keep fewer checkpoints (training.keep)"
        raise kind(
            f"{url}: {type(error).__name__}: {error}. {remedy}, and run the job again to go on from the last committed "
            "checkpoint, which is untouched."
        ) from error


def save(store: CheckpointStore, step: int, attempt: str, keep: int, write: Callable[[Path], None]) -> None:
    """Collective. `write(folder)` writes this rank's files; returns on every rank once the checkpoint is committed."""
    name = f"step-{step:08d}-{attempt}"
    local = Path(tempfile.mkdtemp(prefix="betakd-save-"))
    try:
        with _disk_errors(local):
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


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """A full disk of this node, as OutputError; torch reports one as a RuntimeError about positions in a file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        is_full = getattr(error, "errno", None) in _FULL or shutil.disk_usage(folder.parent).free < _LEFT_BYTES
        if not is_full:
            raise
        raise OutputError(
            f"{folder}: the disk is full ({error}). A checkpoint passes through this folder: free some of the disk, or "
            "set TMPDIR to a larger one, and run the job again to go on from the last committed checkpoint."
        ) from error


def _sizes(folder: Path) -> dict[str, int]:
    """Relative path → bytes of every file."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


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
