"""Local copies of models from a folder, a hub id or a URL, and errors of transformers as ModelError."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError

from betakd_ray.errors import ModelError
from betakd_ray.spec import ModelSpec, StorageSpec
from betakd_ray.storage import join, open_store


def local_folder(location: str, storage: StorageSpec, only: str | None = None) -> str:
    """Return a folder or hub id unchanged; for a URL, copy it to this node's cache once and return the copy's path.

    With `only`, a single file of the URL is copied. Raises ModelError for a URL that cannot be listed or has no files.
    """
    if "://" not in location:
        return location
    filesystem, path = open_store(location, storage)
    source = join(path, only) if only else path
    cache = Path(os.environ.get("BETAKD_CACHE", Path.home() / ".cache" / "betakd")) / "models"
    try:
        listing = cast(dict[str, Any], filesystem.find(source, detail=True))  # it is a list only without `detail`
    except OSError as error:
        raise ModelError(f"{location}: cannot be listed ({error})") from error
    if not listing:
        raise ModelError(f"{location}: no {only or 'files'} there. Give the folder that holds {only or 'config.json'}.")
    state = repr(sorted((name, info.get("size"), str(info.get("ETag", ""))) for name, info in listing.items()))
    target = cache / hashlib.sha256((location + state).encode()).hexdigest()[:20]
    if not target.exists():
        # Two processes of a node may copy at the same time. Each copies to its own folder and renames it, so no process
        # sees an incomplete copy.
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        if only:
            (partial / only).parent.mkdir(parents=True, exist_ok=True)
            filesystem.get(source, str(partial / only))
        else:
            filesystem.get(source.rstrip("/") + "/", str(partial) + "/", recursive=True)
        try:
            partial.rename(target)
        except OSError:
            # If it exists now, another process was faster. Its copy is the same: the name is a hash of the listing.
            if not target.exists():
                raise
    return str(target)


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
        raise ModelError(f"{spec.path}: {problem}: {said.splitlines()[0]}") from error
