"""Checkpoints of a run in its store: each is either complete or ignored.

Every rank writes its files under a new name. The manifest lists them with their sizes, and is written last. A resume
ignores a directory without a manifest. So after a crash at any point the previous checkpoint is still the current one.
The manifest is the only source of truth: the stream and the workers both resume from the checkpoint that it names.
`train.checkpoint` has what all ranks do together.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from betakd_ray.data.files import url_like
from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Quarantined
from betakd_ray.errors import OutputError, OutputUnreachable
from betakd_ray.run.folder import CHECKPOINTS, ENGINE, LEDGER, MANIFEST, QUARANTINE, UNIVERSAL
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join, open_store, replace_file

THREADS = 8
"""Number of files that a rank copies at the same time. One stream from an object store gives only 100–200 MB/s."""

_NAME = re.compile(r"step-(\d+)-.+")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LEFT_BYTES = 1 << 20
"""Free bytes below which a disk counts as full."""
_listed = Retrying(retry=retry_if_exception_type(FileNotFoundError), stop=stop_after_attempt(9), reraise=True)
"""Retry of a listing. A manifest that was listed and is gone was pruned meanwhile; the next listing has a newer one."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint."""

    name: str
    step: int
    world_size: int
    files: dict[str, int]
    """Relative path → size in bytes."""

    def __post_init__(self) -> None:
        # A download writes each file to folder/file. A manifest from the store must not lead it out of that folder.
        for file in map(PurePosixPath, self.files):
            if file.is_absolute() or ".." in file.parts:
                raise ValueError(f"{file} is outside of the checkpoint")

    def missing(self, sizes: Mapping[str, int]) -> str | None:
        """Return the first file that is not in `sizes`, or has another size there; None if there is none.

        `sizes` is relative path → bytes. The returned text also says how many bytes of the file are there.
        """
        for file, size in self.files.items():
            if sizes.get(file) != size:
                return f"{file}: {sizes.get(file, 0)} of {size} bytes"
        return None


_MANIFEST = TypeAdapter(Manifest)


class CheckpointStore:
    """The checkpoints of one run. Errors of the store are raised as OutputError."""

    def __init__(self, run: str, storage: StorageSpec) -> None:
        self.filesystem, root = open_store(run, storage)
        self.root = join(root, CHECKPOINTS)
        self.url = join(url_like(run, self.filesystem, root), CHECKPOINTS)

    def committed(self) -> list[Manifest]:
        """Return every committed checkpoint, the newest step last. Raises OutputError if one is damaged."""
        with self._errors():
            manifests = _listed(self._manifests)
        found = [self._manifest(name, content) for name, content in manifests.items()]
        # By name too: two attempts may commit the same step, and every reader must choose the same one.
        return sorted(found, key=lambda manifest: (manifest.step, manifest.name))

    def latest(self) -> Manifest | None:
        """Return the checkpoint to resume from; None if none is committed."""
        return next(reversed(self.committed()), None)

    def named(self, name: str) -> Manifest:
        """Return the committed checkpoint of that name. Raises OutputError if it is gone or damaged."""
        with self._errors(name, MANIFEST):
            content = cast(bytes, self.filesystem.cat_file(join(self.root, name, MANIFEST)))
        return self._manifest(name, content)

    def upload(self, local: Path, name: str) -> dict[str, int]:
        """Copy one rank's files to the store, several at a time. Return relative path → bytes."""
        files = _sizes(local)
        _at_once(lambda file: self._put(local / file, name, file), files)
        return files

    def _put(self, source: Path, name: str, file: str) -> None:
        target = join(self.root, name, file)
        with self._errors(name, file):
            self.filesystem.makedirs(os.path.dirname(target), exist_ok=True)
            self.filesystem.put_file(str(source), target)

    def commit(self, manifest: Manifest) -> None:
        """Make a checkpoint the current one. Raises OutputError if a file is missing or has another size."""
        if missing := manifest.missing(self._stored(manifest.name)):
            raise OutputError(
                f"{self.url}/{manifest.name}/{missing} were stored. The previous checkpoint stays the current one. "
                "Find out what else writes or removes files there, and run the job again to go on from that checkpoint."
            )
        path = join(self.root, manifest.name, MANIFEST)
        # Written last and atomically: a reader sees a complete checkpoint, or none.
        with self._errors(manifest.name, MANIFEST):
            replace_file(self.filesystem, path, json.dumps(asdict(manifest)).encode())

    def prune(self, keep: int) -> None:
        """Remove all but the `keep` newest checkpoints, and uncommitted folders up to the newest committed step.

        A folder that cannot be removed stays until the next call. The job continues, with a warning.
        """
        try:
            self._prune(keep)
        except OutputError as error:
            _LOG.warning("old checkpoints could not be removed: %s", error)

    def read_text(self, manifest: Manifest, file: str) -> str:
        """Return the text of a small file of a checkpoint."""
        with self._errors(manifest.name, file):
            return cast(bytes, self.filesystem.cat_file(join(self.root, manifest.name, file))).decode()

    def ledger(self, manifest: Manifest) -> Ledger:
        """Return the samples that the training had consumed at that checkpoint."""
        return Ledger.from_json(self.read_text(manifest, LEDGER))

    def quarantined(self, manifest: Manifest) -> list[Quarantined]:
        """Return the samples that were in quarantine at that checkpoint."""
        return [Quarantined(**json.loads(line)) for line in self.read_text(manifest, QUARANTINE).splitlines()]

    def fetch(self, name: str, files: Mapping[str, int], folder: Path, part: str) -> None:
        """Copy files of a checkpoint that the folder lacks, several at a time, and check their sizes.

        `files` is relative path → bytes. `part` tells this caller's unfinished copies from those of others.
        """

        def fetch(file: str) -> None:
            target = folder / file
            if target.exists() and target.stat().st_size == files[file]:
                return  # rank 0 has it from the conversion
            # Renamed when complete: Ray nodes on one machine share the folder, and may copy the same file.
            copying = target.with_name(f"{target.name}.{part}.part")
            with self._errors(name, file), disk_errors(folder):
                target.parent.mkdir(parents=True, exist_ok=True)
                self.filesystem.get_file(join(self.root, name, file), str(copying))
            if (size := copying.stat().st_size) != files[file]:
                raise self._unusable(name, f"{file}: {size} of {files[file]} bytes are there")
            copying.replace(target)

        _at_once(fetch, files)

    def universal(self, manifest: Manifest) -> Manifest | None:
        """Return a checkpoint's manifest with DeepSpeed's files in the universal form; None if that is not stored."""
        path = join(manifest.name, UNIVERSAL, MANIFEST)
        with self._errors(path):
            if not self.filesystem.exists(join(self.root, path)):
                return None
            content = cast(bytes, self.filesystem.cat_file(join(self.root, path)))
        return self._manifest(manifest.name, content)

    def add_universal(self, manifest: Manifest, folder: Path) -> Manifest:
        """Store the universal form of DeepSpeed's files from `folder` beside a checkpoint; return its manifest."""
        made = {file: size for file, size in _sizes(folder).items() if file.startswith(f"{UNIVERSAL}/")}
        _at_once(lambda file: self._put(folder / file, manifest.name, file), made)
        rest = {file: size for file, size in manifest.files.items() if not file.startswith(f"{ENGINE}/")}
        universal = Manifest(manifest.name, manifest.step, manifest.world_size, made | rest)
        path = join(manifest.name, UNIVERSAL, MANIFEST)
        with self._errors(path):  # written last: without this manifest, the next resume converts again
            replace_file(self.filesystem, join(self.root, path), json.dumps(asdict(universal)).encode())
        return universal

    def require_stored(self, manifest: Manifest) -> None:
        """Raise OutputError if a file of a checkpoint is missing, or has another size."""
        if missing := manifest.missing(self._stored(manifest.name)):
            raise self._unusable(manifest.name, f"{missing} are there")

    # ----------------------------------------------------------------------------------------- the store

    def _stored(self, *name: str) -> dict[str, int]:
        """Return the stored files of one checkpoint, or of all: relative path → bytes."""
        folder = join(self.root, *name)
        with self._errors(*name):
            found = cast(dict[str, Any], self.filesystem.find(folder, detail=True))
        return {path.removeprefix(f"{folder}/"): info["size"] for path, info in found.items()}

    def _manifests(self) -> dict[str, bytes]:
        """Return the unparsed manifests: name of a checkpoint → content."""
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
            raise self._unusable(name, f"{MANIFEST} is the manifest of {manifest.name}")
        return manifest

    def _prune(self, keep: int) -> None:
        committed = self.committed()
        kept = {manifest.name for manifest in committed[-keep:]}
        for name in sorted({path.partition("/")[0] for path in self._stored()} - kept):
            match = _NAME.fullmatch(name)
            # Folders of later steps stay: another attempt at this run may be writing them.
            if match and committed and int(match[1]) <= committed[-1].step:
                self._remove(name)

    def _remove(self, name: str) -> None:
        """Remove a checkpoint, its manifest first, so that no committed checkpoint ever lacks files."""
        folder = join(self.root, name)
        with self._errors(name):
            if self.filesystem.exists(join(folder, MANIFEST)):
                self.filesystem.rm_file(join(folder, MANIFEST))
            self.filesystem.rm(folder, recursive=True)

    def _unusable(self, name: str, why: str) -> OutputError:
        return OutputError(
            f"{self.url}/{name}: {why}. Remove this folder, and run the job again to go on from the previous one."
        )

    def _errors(self, *parts: str) -> AbstractContextManager[None]:
        return output_errors(join(self.url, *parts))


@contextmanager
def output_errors(url: str) -> Iterator[None]:
    """Raise the output store's errors as OutputError.

    A full disk is a plain OutputError. Other errors may disappear without help, and are raised as OutputUnreachable.
    """
    try:
        yield
    except OSError as error:
        kind = OutputUnreachable
        remedy = "Check output.path and output.storage, the network and the credentials in the environment"
        if error.errno in _FULL:
            kind = OutputError
            remedy = "The disk is full: free some space, or keep fewer checkpoints (training.keep)"
        raise kind(
            f"{url}: {type(error).__name__}: {error}. {remedy}, and run the job again to go on from the last committed "
            "checkpoint, which is untouched."
        ) from error


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise a full disk of this node as OutputError. torch reports one as a RuntimeError about file positions."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        is_full = getattr(error, "errno", None) in _FULL or shutil.disk_usage(folder.parent).free < _LEFT_BYTES
        if not is_full:
            raise
        raise OutputError(
            f"{folder}: the disk is full ({error}). Checkpoints are written to this folder first: free some space, or "
            "set TMPDIR to a larger disk, and run the job again to go on from the last committed checkpoint."
        ) from error


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size of every file in a folder: relative path → bytes."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _at_once(work: Callable[[str], None], files: Iterable[str]) -> None:
    """Run `work` for several files at a time. Raises the first error that it raised."""
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(work, files):
            pass
