"""Errors of writing: a full disk, or a store that fails, becomes an OutputError that names the place."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from betakd_ray.errors import BetaKDError, OutputError, OutputUnreachable

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the system's errors for a full disk, and for a quota that is used up."""
_WORDS = tuple(os.strerror(number) for number in FULL)
_LEFT_BYTES = 1 << 20
"""Free bytes below which a disk counts as full."""


def is_full(error: BaseException) -> bool:
    """Return whether an error says that a disk is full.

    safetensors and torch raise classes of their own, which have only the system's words.
    """
    return getattr(error, "errno", None) in FULL or any(words in str(error) for words in _WORDS)


def disk_full(path: str | Path, error: BaseException) -> OutputError:
    """Return what is raised if the disk is full when `path` is written."""
    folder = os.path.dirname(path) or "."
    return OutputError(
        f"{path}: {type(error).__name__}: {error}. The disk is full: free some space in {folder}, or name another "
        "folder, and run the command again. What was complete before is untouched."
    )


@contextmanager
def full_disk(path: str | Path) -> Iterator[None]:
    """Raise a full disk as the OutputError of `disk_full`. Every other error passes unchanged."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BetaKDError) or not is_full(error):
            raise
        raise disk_full(path, error) from error


@contextmanager
def output_errors(url: str) -> Iterator[None]:
    """Raise the output store's errors as OutputError.

    A full disk is a plain OutputError. Other errors may disappear without help, and are raised as OutputUnreachable.
    """
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise disk_full(url, error) from error
        raise OutputUnreachable(
            f"{url}: {type(error).__name__}: {error}. Check output.path and output.storage, the network and the "
            "credentials in the environment, and run the job again to go on from the last committed checkpoint, which "
            "is untouched."
        ) from error


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise a full disk of this node as OutputError. torch reports one as a RuntimeError about file positions."""
    try:
        yield
    except BetaKDError:
        raise
    except Exception as error:
        is_vague = isinstance(error, OSError | RuntimeError)
        if not is_full(error) and not (is_vague and shutil.disk_usage(folder.parent).free < _LEFT_BYTES):
            raise
        raise OutputError(
            f"{folder}: the disk is full ({error}). Checkpoints and models are written to this folder first: free some "
            "space, or set TMPDIR to a larger disk, and run the job again to go on from the last committed checkpoint."
        ) from error
