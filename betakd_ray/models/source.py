"""Local copies of models from a folder, a hub id or a URL, and errors of transformers as ModelError."""

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem
from huggingface_hub.errors import StrictDataclassError

from betakd_ray.errors import ModelError
from betakd_ray.leftovers import owned, remove_abandoned
from betakd_ray.spec import ModelSpec, StorageSpec
from betakd_ray.storage import join, open_store

CHECKSUMS = ("etag", "contentmd5", "md5hash", "crc32c", "digest", "sha", "blobid", "oid", "generation", "versionid")
TIMES = ("lastmodified", "updated", "modified", "mtime", "modificationtime", "created")
"""Fields of a file's description that change if the file is replaced, in small letters without - and _."""


def local_folder(location: str, storage: StorageSpec, only: str | None = None) -> str:
    """Return a folder or hub id unchanged; for a URL, copy it to this node's cache once and return the copy's path.

    With `only`, a single file of the URL is copied. The copy belongs to a state of the store: if a file is replaced,
    the model is copied again. Raises ModelError for a URL that cannot be listed, has no files, or changes meanwhile.
    """
    if "://" not in location:
        if location.startswith("/") and not os.path.exists(location):
            raise ModelError(f"{location}: there is no such folder on this machine. Correct the path of the model.")
        return location
    filesystem, path = open_store(location, storage)
    source = join(path, only) if only else path
    state = _state(filesystem, location, source, only)
    cache = Path(os.environ.get("BETAKD_CACHE", Path.home() / ".cache" / "betakd")) / "models"
    target = cache / hashlib.sha256((location + state).encode()).hexdigest()[:20]
    if not target.exists():
        remove_abandoned(cache, "*")
        # Two processes of a node may copy at the same time. Each copies to its own folder and renames it, so no process
        # sees an incomplete copy.
        with owned(target.with_name(f"{target.name}.{secrets.token_hex(8)}")) as partial:
            try:
                _copy(filesystem, source, partial, only)
                if _state(filesystem, location, source, only) != state:
                    raise ModelError(f"{location}: its files changed while they were copied. Run the job again.")
                partial.rename(target)
            except OSError:
                # If it exists now, another process was faster. Its copy is the same: the name is a hash of the listing.
                if not target.exists():
                    raise
    return str(target)


def _copy(filesystem: AbstractFileSystem, source: str, target: Path, only: str | None) -> None:
    if only:
        (target / only).parent.mkdir(parents=True, exist_ok=True)
        filesystem.get(source, str(target / only))
    else:
        filesystem.get(source.rstrip("/") + "/", str(target) + "/", recursive=True)


def store_state(location: str, storage: StorageSpec, only: str | None = None) -> str:
    """Return a text that changes if a file of a model's URL is added, removed or replaced; nothing is copied.

    Raises ModelError for a URL that cannot be listed or has no files.
    """
    filesystem, path = open_store(location, storage)
    return _state(filesystem, location, join(path, only) if only else path, only)


def _state(filesystem: AbstractFileSystem, location: str, source: str, only: str | None) -> str:
    """Return a text that changes if a file is added, removed or replaced. Raises ModelError as `local_folder`."""
    try:
        listing = cast(dict[str, Any], filesystem.find(source, detail=True))  # it is a list only without `detail`
        files = [(name, *_version(filesystem, name, info)) for name, info in listing.items()]
    except OSError as error:
        raise ModelError(f"{location}: cannot be listed ({error})") from error
    if not listing:
        raise ModelError(f"{location}: no {only or 'files'} there. Give the folder that holds {only or 'config.json'}.")
    return repr(sorted(files))


def _version(filesystem: AbstractFileSystem, name: str, info: dict[str, Any]) -> tuple[str, ...]:
    """Return what tells a file from another of its name and size."""
    if isinstance(filesystem, LocalFileSystem):
        # ctime, because a copy may keep the time of the file that it replaces. In nanoseconds, as fsspec's are not.
        found = os.stat(name)
        return str(found.st_size), str(found.st_ino), str(found.st_mtime_ns), str(found.st_ctime_ns)
    for known in (info, filesystem.info(name)):  # the listing of a store may have less than its answer for one file
        if marks := [f"{key}={value}" for key, value in known.items() if _is_mark(key) and value]:
            return str(known.get("size")), *sorted(marks)
    raise ModelError(
        f"{name}: its store gives neither an ETag, a checksum nor a time of change, so a model that is replaced would "
        "not be noticed. Copy the model to a folder or an object store, and give the path of that."
    )


def _is_mark(key: str) -> bool:
    return re.sub("[-_]", "", key.lower()) in CHECKSUMS + TIMES


@contextmanager
def model_errors(spec: ModelSpec, problem: str) -> Iterator[None]:
    """Raise errors of transformers inside the block as ModelError.

    The message has the model's path, `problem`, and the first line of the original message. If the model needs its own
    code, which was not run, the message says how to allow it.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, TypeError, StrictDataclassError) as error:
        said = str(error).strip() or type(error).__name__
        if isinstance(error, StrictDataclassError):  # the first line names only the field, the next one the fault
            said = " ".join(said.split())
        if "trust_remote_code" in said and not spec.trust_remote_code:
            raise ModelError(
                f"{spec.path}: comes with code of its own, which was not run. Read that code. If you trust it, set "
                "trust_remote_code: true beside this path, and set revision to the commit that you read."
            ) from error
        raise ModelError(f"{spec.path}: {problem}: {said.splitlines()[0]}{_not_here(spec.path)}") from error


def _not_here(path: str) -> str:
    """Return a note that a relative path names no folder, so that it was taken for an id of the hub; or nothing."""
    if "://" in path or os.path.exists(path):
        return ""
    return f" (there is no folder {path} in {os.getcwd()}, so it was looked for on the Hugging Face Hub)"
