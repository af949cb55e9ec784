"""Checkpoints that are either complete or ignored.

Every rank writes its files under a new name. The manifest lists them with their sizes, and is written last. A resume
ignores a directory without a manifest. So after a crash at any point the previous checkpoint is still the current one.
The manifest is the only source of truth: the stream and the workers both resume from the checkpoint that it names.

Collectives here run on the host, over a gloo group. Its timeout should be long, because the upload or download of one
rank may take many minutes longer than another's. If a rank dies meanwhile, `watch` finds it, not the timeout.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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
from betakd_ray.engine import unpickling
from betakd_ray.errors import OutputError, OutputUnreachable
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join, open_store, replace_file

MANIFEST = "manifest.json"
FOLDER = "checkpoints"
ENGINE, UNIVERSAL = "deepspeed", "deepspeed_universal"
LEDGER = "ledger.json"
"""File with the samples that took part in a step."""
QUARANTINE = "quarantine.jsonl"
"""File with the samples that will never take part in a step, and why."""
SPEC, PROGRESS = "spec.json", "progress.json"
SKIPPED = "skipped.jsonl"
"""File with the steps that were skipped because their gradient was not finite, and with their samples."""
METRICS = "metrics.json"
"""File that says how much had been logged, as text of `tracking.Metrics.reference`."""
_RANK_0 = {LEDGER, QUARANTINE, SKIPPED, SPEC, PROGRESS, METRICS}
"""Files that are read from the store where they are needed (`read_text`). They are not copied to every node."""
THREADS = 8
"""Number of files that a rank copies at the same time. One stream from an object store gives only 100–200 MB/s."""

_NAME = re.compile(r"step-(\d+)-.+")
_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_")
"""Pattern in the name of a file that DeepSpeed reads on one rank only."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LEFT_BYTES = 1 << 20
"""Free bytes below which a disk counts as full."""
_listed = Retrying(retry=retry_if_exception_type(FileNotFoundError), stop=stop_after_attempt(9), reraise=True)
"""Retry of a listing. A manifest that was listed and is gone was pruned meanwhile; the next listing has a newer one."""
_LOG = logging.getLogger(__name__)
Group = dist.ProcessGroup | None
"""Process group over all ranks; None is torch's default group."""


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint."""

    name: str
    step: int
    world_size: int
    files: dict[str, int]
    """Relative path → size in bytes."""

    def __post_init__(self) -> None:
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
        self.root = join(root, FOLDER)
        self.url = join(url_like(run, self.filesystem, root), FOLDER)

    def committed(self) -> list[Manifest]:
        """Return every committed checkpoint, the newest step last. Raises OutputError if one is damaged."""
        with self._errors():
            manifests = _listed(self._manifests)
        found = [self._manifest(name, content) for name, content in manifests.items()]
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
                f"{self.url}/{manifest.name}/{missing} were stored. The checkpoint before stays the current one: find "
                "out what else writes or removes files there, and run the job again to go on from it."
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
            _LOG.warning("superseded checkpoints are still there: %s", error)

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

    @contextmanager
    def on_disk(self, manifest: Manifest, attempt: str, group: Group = None) -> Iterator[Path]:
        """Yield a folder with the files of a checkpoint that this node's ranks need; remove it afterwards. Collective.

        The ranks of a node share the folder. Each rank copies its own files. The files that all ranks need are divided
        among the ranks of a node. If another number of ranks wrote the checkpoint, rank 0 converts it to DeepSpeed's
        universal form and stores that beside the checkpoint, whose committed files do not change. The other ranks, and
        any later resume from this checkpoint, copy the universal form.
        """
        run = hashlib.sha256(self.root.encode()).hexdigest()[:12]
        folder = Path(tempfile.gettempdir()) / f"betakd-{run}-{manifest.name}-{attempt}"
        try:
            self._require_stored(manifest)
            wanted = manifest
            if manifest.world_size != dist.get_world_size() and _has_optimizer_parts(manifest):
                wanted = _from_rank_0(lambda: self._universal(manifest, folder), group)
            self._fetch(manifest.name, _of_this_rank(wanted), folder)
            dist.barrier(group)
            yield folder
            dist.barrier(group)
        finally:
            # The node's first rank removes the folder: all ranks have passed the barrier, or the job is failing.
            if _local_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)

    def _universal(self, manifest: Manifest, folder: Path) -> Manifest:
        """Return a manifest with DeepSpeed's files in the universal form. Make and store that form if it is missing."""
        path = join(manifest.name, UNIVERSAL, MANIFEST)
        with self._errors(path):
            if self.filesystem.exists(join(self.root, path)):
                content = cast(bytes, self.filesystem.cat_file(join(self.root, path)))
                return self._manifest(manifest.name, content)
        parts = {file: size for file, size in manifest.files.items() if file.startswith(f"{ENGINE}/")}
        self._fetch(manifest.name, parts, folder)
        with _disk_errors(folder):
            _make_universal(folder)
            shutil.rmtree(folder / ENGINE)
        made = {file: size for file, size in _sizes(folder).items() if file.startswith(f"{UNIVERSAL}/")}
        _at_once(lambda file: self._put(folder / file, manifest.name, file), made)
        rest = {file: size for file, size in manifest.files.items() if file not in parts}
        universal = Manifest(manifest.name, manifest.step, manifest.world_size, made | rest)
        with self._errors(path):  # written last: without this manifest, the next resume converts again
            replace_file(self.filesystem, join(self.root, path), json.dumps(asdict(universal)).encode())
        return universal

    def _fetch(self, name: str, files: Mapping[str, int], folder: Path) -> None:
        """Copy files of a checkpoint that the folder lacks, several at a time, and check their sizes."""

        def fetch(file: str) -> None:
            target = folder / file
            if target.exists() and target.stat().st_size == files[file]:
                return  # rank 0 has it from the conversion
            # Renamed when complete: Ray nodes on one machine share the folder, and may copy the same file.
            part = target.with_name(f"{target.name}.{dist.get_rank()}.part")
            with self._errors(name, file), _disk_errors(folder):
                target.parent.mkdir(parents=True, exist_ok=True)
                self.filesystem.get_file(join(self.root, name, file), str(part))
            if (size := part.stat().st_size) != files[file]:
                raise self._unusable(name, f"{file}: {size} of {files[file]} bytes are there")
            part.replace(target)

        _at_once(fetch, files)

    def _require_stored(self, manifest: Manifest) -> None:
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
            raise self._unusable(name, f"{MANIFEST} is that of {manifest.name}")
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
            f"{self.url}/{name}: {why}. Remove this folder, and run the job again to go on from the checkpoint before."
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
            remedy = "The disk is full: free some of it, or keep fewer checkpoints (training.keep)"
        raise kind(
            f"{url}: {type(error).__name__}: {error}. {remedy}, and run the job again to go on from the last committed "
            "checkpoint, which is untouched."
        ) from error


def save(
    store: CheckpointStore, step: int, attempt: str, keep: int, write: Callable[[Path], None], group: Group = None
) -> None:
    """Save a checkpoint (collective: every rank must call it).

    `write(folder)` writes this rank's files to a local folder. The function returns on every rank only after rank 0 has
    committed the checkpoint.
    """
    name = f"step-{step:08d}-{attempt}"
    local = Path(tempfile.mkdtemp(prefix="betakd-save-"))
    try:
        with _disk_errors(local):
            write(local)
        files = gather(store.upload(local, name), group)
    finally:
        shutil.rmtree(local)
    # All ranks have uploaded their files: `gather` waits for each of them. Only now may the manifest be written.
    if dist.get_rank() == 0:
        merged = {file: size for each in files for file, size in each.items()}
        store.commit(Manifest(name, step, dist.get_world_size(), merged))
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


def load_engine(engine: Any, folder: Path) -> None:
    """Load DeepSpeed's state from a checkpoint (collective: every rank must call it).

    The universal form is loaded if the folder has it. Raises OutputError if the checkpoint is incomplete, or would run
    code when loaded.
    """
    is_universal = (folder / UNIVERSAL).exists()
    tag = UNIVERSAL if is_universal else ENGINE
    engine._config.load_universal_checkpoint = is_universal
    # Not strict: frozen parameters are not in the checkpoint. They come from the models that the spec names.
    with unpickling.tensors_only(folder.name):
        path, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
    if path is None:
        raise OutputError(f"{folder}: DeepSpeed cannot read its part of the checkpoint")


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Raise a full disk of this node as OutputError. torch reports one as a RuntimeError about file positions."""
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
    """Return the size of every file in a folder: relative path → bytes."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _at_once(work: Callable[[str], None], files: Iterable[str]) -> None:
    """Run `work` for several files at a time. Raises the first error that it raised."""
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(work, files):
            pass


def _local_rank() -> int:
    return int(os.environ["LOCAL_RANK"])


def _of_this_rank(manifest: Manifest) -> dict[str, int]:
    """Return the files that this rank copies to its node (relative path → bytes).

    They are its own files, and its part of the files that every rank reads.
    """
    rank, node_ranks = dist.get_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    own, shared = {}, []
    for file, size in manifest.files.items():
        if match := _OF_RANK.search(file) if file.startswith(f"{ENGINE}/") else None:
            if int(match[1]) == rank:
                own[file] = size
        elif file not in _RANK_0:
            shared.append(file)
    shared.sort(key=lambda file: (-manifest.files[file], file))
    # Largest first, so that each rank of a node copies about as many bytes. Without LOCAL_WORLD_SIZE the node's first
    # rank copies all of them.
    mine = shared[_local_rank() :: node_ranks] if _local_rank() < node_ranks else []
    return own | {file: manifest.files[file] for file in mine}


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


def _make_universal(folder: Path) -> None:
    """Add DeepSpeed's universal form, which any number of ranks can load, to a folder with every rank's files."""
    command = [sys.executable, "-m", unpickling.__name__, "--inject_missing_state"]
    command += ["--input_folder", str(folder / ENGINE), "--output_folder", str(folder / UNIVERSAL)]
    here = {"PYTHONPATH": os.pathsep.join(sys.path)}  # Ray extends a worker's sys.path, but not its environment
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | here)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OutputError(f"{folder.name}: DeepSpeed cannot convert the checkpoint to this number of ranks: {reason}")


def gather(value: Any, group: Group = None) -> list[Any]:
    """Return every rank's value, in the order of the ranks (collective: every rank must call it)."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value, group=group)
    return everyone
