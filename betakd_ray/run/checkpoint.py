"""Checkpoints of a run in its store: each is either complete and unchanged, or ignored.

Every rank writes its files under a new name. The manifest lists them with sizes and digests, and is written last. A
resume ignores a directory without a manifest. So after a crash at any point the previous checkpoint is still the
current one. Every file is compared with its digest when it is read. A checkpoint with a damaged file is rejected for
good, and the one before it is the current one again. The manifest is the only source of truth: the stream and the
workers both resume from the checkpoint that it names. `train.checkpoint` has what all ranks do together.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from betakd_ray.data.files import url_like
from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Plan, Quarantined
from betakd_ray.errors import CheckpointDamaged, OutputError, OutputUnreachable
from betakd_ray.leftovers import temporary_folder
from betakd_ray.output import disk_errors, output_errors
from betakd_ray.run.files import MAX_BYTES, MAX_LARGE_BYTES, File, read, reason
from betakd_ray.run.folder import CHECKPOINTS, DAMAGED, ENGINE, MANIFEST, UNIVERSAL
from betakd_ray.run.lease import Permit
from betakd_ray.run.manifest import Files, Manifest, StoredFile
from betakd_ray.run.records import ledger_file, quarantine_file
from betakd_ray.run.survey import Survey, step_of
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join, open_store, put_file, replace_file

THREADS = 8
"""Number of files that a rank copies at the same time. One stream from an object store gives only 100–200 MB/s."""

COPIES = 2
"""Number of times that a file is copied before it counts as damaged: the damage may be the copy's."""

_listed = Retrying(retry=retry_if_exception_type(FileNotFoundError), stop=stop_after_attempt(9), reraise=True)
"""Retry of a listing. A manifest that was listed and is gone was pruned meanwhile; the next listing has a newer one."""
_LOG = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointStore:
    """The checkpoints of one run. Errors of the store are raised as OutputError.

    With a permit, a commit fails once another driver has taken the run over. `origins` says what the run was made from,
    and is stored with every checkpoint.
    """

    def __init__(
        self,
        run: str,
        storage: StorageSpec,
        permit: Permit | None = None,
        origins: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._permit, self._origins = permit, dict(origins)
        self.filesystem, root = open_store(run, storage)
        self.root = join(root, CHECKPOINTS)
        self.url = join(url_like(run, self.filesystem, root), CHECKPOINTS)

    def survey(self) -> Survey:
        """Return all checkpoints as they are now. It takes one listing, and one request for each checkpoint."""
        return Survey(self.url, *self._survey())

    def committed(self) -> list[Manifest]:
        """Return every committed checkpoint that is not known to be damaged, the newest last."""
        return self.survey().committed

    def latest(self) -> Manifest | None:
        """Return the checkpoint to resume from; None if none was committed. Raises OutputError if all are damaged."""
        return self.survey().newest()

    def newest_with(self, read: Callable[[Manifest], T]) -> tuple[Manifest, T] | None:
        """Return the checkpoint to resume from, and what `read` returns for it; None if none was committed.

        One for which `read` raises CheckpointDamaged is rejected, and the one before it is taken.
        """
        return self.surveyed_with(read)[1]

    def surveyed_with(self, read: Callable[[Manifest], T]) -> tuple[Survey, tuple[Manifest, T] | None]:
        """Return what `newest_with` returns, after the survey in which that checkpoint is the newest."""
        while (manifest := (survey := self.survey()).newest()) is not None:
            try:
                return survey, (manifest, read(manifest))
            except CheckpointDamaged as error:
                self.reject(manifest.name, str(error))
        return survey, None

    def reject(self, name: str, why: str) -> None:
        """Note that a checkpoint is damaged: it does not count any more. `why` says how.

        If its universal form is stored, that is dropped first: the damage may be there, and the form can be made again.
        """
        universal = join(self.root, name, UNIVERSAL, MANIFEST)
        with self._errors(name, DAMAGED):
            if self.filesystem.exists(universal):
                self.filesystem.rm_file(universal)
                return
            replace_file(self.filesystem, join(self.root, name, DAMAGED), why.encode())

    def named(self, name: str) -> Manifest:
        """Return the committed checkpoint of that name. Raises OutputError if it is gone, or CheckpointDamaged."""
        with self._errors(name, MANIFEST):
            content = self._content(name, MANIFEST)
        return self._manifest(name, content)

    def upload(self, local: Path, name: str) -> Files:
        """Copy one rank's files to the store, several at a time. Return their sizes and digests."""
        return self._upload(local, name, _files(local))

    def _upload(self, local: Path, name: str, files: Iterable[str]) -> Files:
        def upload(file: str) -> StoredFile:
            # Before the copy: a digest of what the store got would call damage on the way the original.
            stored = StoredFile.of(local / file)
            self._put(local / file, name, file)
            return stored

        names = list(files)
        return dict(zip(names, _at_once(upload, names), strict=True))

    def _put(self, source: Path, name: str, file: str) -> None:
        target = join(self.root, name, file)
        with self._errors(name, file):
            put_file(self.filesystem, source, target)

    def manifest(self, name: str, step: int, world_size: int, files: Files) -> Manifest:
        """Return the manifest of a checkpoint that is to be committed."""
        token = self._permit.token if self._permit else 0
        return Manifest(name, step, world_size, files, token, self._origins)

    def commit(self, manifest: Manifest) -> None:
        """Make a checkpoint the current one.

        Raises OutputError if a file is missing or has another size, and RunTaken if the run has another driver now.
        """
        if missing := manifest.missing(self._stored(manifest.name)):
            raise OutputError(
                f"{self.url}/{manifest.name}/{missing} were stored. The previous checkpoint stays the current one. "
                "Find out what else writes or removes files there, and run the job again to go on from that checkpoint."
            )
        if self._permit:
            self._permit.check()
        path = join(self.root, manifest.name, MANIFEST)
        # Written last and atomically: a reader sees a complete checkpoint, or none.
        with self._errors(manifest.name, MANIFEST):
            replace_file(self.filesystem, path, manifest.to_json())

    def prune(self, keep: int) -> None:
        """Remove all but the `keep` newest checkpoints, and uncommitted folders of steps before these.

        A folder that cannot be removed stays until the next call. The job continues, with a warning.
        """
        try:
            self._prune(keep)
        except OutputError as error:
            _LOG.warning("old checkpoints could not be removed: %s", error)

    def parsed(self, manifest: Manifest, file: File[T]) -> T:
        """Return what a small file of a checkpoint holds. Raises CheckpointDamaged if it is not as it was written.

        Raises OutputUnreachable if it is missing: another process may have pruned the checkpoint meanwhile.
        """

        def parse(content: bytes) -> T:
            # A file that the manifest lacks was read by versions that asked for it in vain.
            stored = manifest.files.get(file.name)
            if stored and (why := stored.difference(StoredFile.holding(content))):
                raise ValueError(why)
            return file.parse(content)

        where = (manifest.name, file.name)
        url, compared = join(self.url, *where), replace(file, parse=parse)
        try:
            found = read(self.filesystem, join(self.root, *where), url, compared, partial(self._errors, *where))
        except OutputUnreachable:
            raise
        except OutputError as error:
            cause = error.__cause__
            why = reason(cause) if isinstance(cause, ValueError) else str(error)
            raise self._unusable(manifest.name, f"{file.name}: {why}") from error
        if found is None:
            raise OutputUnreachable(f"{url}: no such file. Run the job again: a newer checkpoint may be there now.")
        return found

    def read_text(self, manifest: Manifest, file: str) -> str:
        """Return the text of a small file of a checkpoint. Raises CheckpointDamaged if it is not as it was written."""
        return self.parsed(manifest, File(file, bytes.decode, limit=MAX_LARGE_BYTES))

    def ledger(self, manifest: Manifest, plan: Plan | None = None) -> Ledger:
        """Return the samples that the training had consumed at that checkpoint.

        With a plan, a ledger of another one counts as damaged.
        """
        return self.parsed(manifest, ledger_file(plan))

    def quarantined(self, manifest: Manifest, plan: Plan | None = None) -> list[Quarantined]:
        """Return the samples that were in quarantine at that checkpoint.

        With a plan, a sample outside of it counts as damage.
        """
        return self.parsed(manifest, quarantine_file(plan))

    def fetch(self, manifest: Manifest, files: Iterable[str], folder: Path, part: str) -> None:
        """Copy files of a checkpoint that the folder lacks, several at a time, and compare them with the manifest.

        `part` tells this caller's unfinished copies from those of others. Raises CheckpointDamaged.
        """

        def fetch(file: str) -> None:
            target, stored = folder / file, manifest.files[file]
            if target.exists() and target.stat().st_size == stored.size:
                return  # rank 0 has it from the conversion
            # Renamed when complete: Ray nodes on one machine share the folder, and may copy the same file.
            copying = target.with_name(f"{target.name}.{part}.part")
            for _ in range(COPIES):
                with self._errors(manifest.name, file), disk_errors(folder):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self.filesystem.get_file(join(self.root, manifest.name, file), str(copying))
                why = stored.difference(StoredFile.of(copying))
                if why is None:
                    copying.replace(target)
                    return
            raise self._unusable(manifest.name, f"{file}: {why}")

        _at_once(fetch, files)

    def verify(self, manifest: Manifest) -> str | None:
        """Read every file of a checkpoint; return a text about the first that is damaged, or None."""
        with temporary_folder("verify") as folder:
            for file in manifest.files:
                try:
                    self.fetch(manifest, [file], folder, "verify")
                except CheckpointDamaged as error:
                    return str(error)
                (folder / file).unlink()
        return None

    def universal(self, manifest: Manifest) -> Manifest | None:
        """Return a checkpoint's manifest with DeepSpeed's files in the universal form; None if that is not stored."""
        path = join(manifest.name, UNIVERSAL, MANIFEST)
        with self._errors(path):
            if not self.filesystem.exists(join(self.root, path)):
                return None
            content = self._content(path)
        try:
            found = self._manifest(manifest.name, content)
            if (found.step, found.world_size) != (manifest.step, manifest.world_size):
                raise self._unusable(manifest.name, f"{UNIVERSAL}/{MANIFEST}: it belongs to another checkpoint")
        except CheckpointDamaged as error:  # only a conversion is lost then, not the checkpoint
            _LOG.warning("the universal form is made again: %s", error)
            return None
        return found

    def add_universal(self, manifest: Manifest, folder: Path) -> Manifest:
        """Store the universal form of DeepSpeed's files from `folder` beside a checkpoint; return its manifest."""
        made = self._upload(folder, manifest.name, _files(folder / UNIVERSAL, folder))
        rest = {file: stored for file, stored in manifest.files.items() if not file.startswith(f"{ENGINE}/")}
        universal = replace(manifest, files=made | rest)
        path = join(manifest.name, UNIVERSAL, MANIFEST)
        with self._errors(path):  # written last: without this manifest, the next resume converts again
            replace_file(self.filesystem, join(self.root, path), universal.to_json())
        return universal

    def require_stored(self, manifest: Manifest) -> None:
        """Raise CheckpointDamaged if a file of a checkpoint is missing, or has another size.

        Raises OutputUnreachable if another process has pruned the checkpoint meanwhile: its manifest goes first.
        """
        if missing := manifest.missing(stored := self._stored(manifest.name)):
            if MANIFEST not in stored:
                raise OutputUnreachable(f"{self.url}/{manifest.name}: was removed, and there is a newer checkpoint.")
            raise self._unusable(manifest.name, f"{missing} are there")

    # ----------------------------------------------------------------------------------------- the store

    def _stored(self, *name: str) -> dict[str, int]:
        """Return the stored files of one checkpoint, or of all: relative path → bytes."""
        folder = join(self.root, *name)
        with self._errors(*name):
            found = cast(dict[str, Any], self.filesystem.find(folder, detail=True))
        return {path.removeprefix(f"{folder}/"): info["size"] for path, info in found.items()}

    def _survey(self) -> tuple[list[Manifest], dict[str, str]]:
        """Return the committed checkpoints, the newest last, and the damaged ones (name → what is wrong)."""
        with self._errors():
            found = _listed(self._markers)
        manifests, damaged = [], {}
        for name, markers in found.items():
            if DAMAGED in markers:
                damaged[name] = (markers[DAMAGED] or b"").decode(errors="replace")
                continue
            try:
                manifests.append(self._manifest(name, markers[MANIFEST]))
            except CheckpointDamaged as error:
                damaged[name] = str(error)
        # By token first: a driver that was replaced may be ahead, and commit once more. By name too: two attempts may
        # commit the same step, and every reader must choose the same one.
        return sorted(manifests, key=lambda each: (each.token, each.step, each.name)), damaged

    def _markers(self) -> dict[str, dict[str, bytes | None]]:
        """Return what decides about the committed checkpoints: name → {manifest.json or damaged.txt: content}."""
        found: dict[str, dict[str, bytes | None]] = {}
        for path, size in self._stored().items():
            name, _, file = path.partition("/")
            if file in (MANIFEST, DAMAGED):
                found.setdefault(name, {})[file] = self._content(path, size=size)
        return found

    def _content(self, *path: str, size: int | None = None) -> bytes | None:
        """Return the bytes of a small file; None if they are too many for one. A listing may have told the size."""
        where = join(self.root, *path)
        is_small = cast(int, self.filesystem.size(where) if size is None else size) <= MAX_BYTES
        return cast(bytes, self.filesystem.cat_file(where)) if is_small else None

    def _manifest(self, name: str, content: bytes | None) -> Manifest:
        try:
            return Manifest.parse(name, content)
        except ValueError as error:
            raise self._unusable(name, f"{MANIFEST}: {reason(error)}") from error

    def _prune(self, keep: int) -> None:
        committed, damaged = self._survey()
        kept = committed[-keep:]
        superseded = {manifest.name for manifest in committed[:-keep]}
        superseded |= {name for name in damaged if kept and step_of(name) <= kept[-1].step}
        # Other folders of these steps stay, even of the newest: other workers of this run may be writing them, and
        # would commit them without the files that are removed here.
        first = min((manifest.step for manifest in kept), default=0)
        folders = {path.partition("/")[0] for path in self._stored()} - {manifest.name for manifest in kept}
        for name in sorted(folders):
            if name in superseded or 0 <= step_of(name) < first:
                self._remove(name)

    def _remove(self, name: str) -> None:
        """Remove a checkpoint, its manifest first, so that no committed checkpoint ever lacks files."""
        folder = join(self.root, name)
        with self._errors(name):
            if self.filesystem.exists(join(folder, MANIFEST)):
                self.filesystem.rm_file(join(folder, MANIFEST))
            self.filesystem.rm(folder, recursive=True)

    def _unusable(self, name: str, why: str) -> CheckpointDamaged:
        return CheckpointDamaged(f"{self.url}/{name} is damaged: {why}")

    def _errors(self, *parts: str) -> AbstractContextManager[None]:
        return output_errors(join(self.url, *parts))


def _files(folder: Path, root: Path | None = None) -> list[str]:
    """Return every file in a folder, relative to `root`; by default, that is the folder itself."""
    return [str(path.relative_to(root or folder)) for path in folder.rglob("*") if path.is_file()]


def _at_once(work: Callable[[str], T], files: Iterable[str]) -> list[T]:
    """Run `work` for several files at a time; return its results. Raises the first error that it raised."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, files))
