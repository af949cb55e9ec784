"""What killed processes leave on a machine, found at a later start and removed if all its owners are surely dead.

An owner of PATH holds a lock (flock) on PATH.lock from before PATH exists until after it is removed. The kernel
releases the lock when the owner dies, in whatever way and container. The file also names the running kernel, because
other machines may see it too (a home folder on NFS), and a lock need not reach them. So PATH has no living owner if its
lock is free and the file names this kernel. All else is left alone: what has no such file, and what another user owns.
"""

import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOG = logging.getLogger(__name__)

LOCK = ".lock"
"""End of the name of an owner's lock, after the name of what is owned."""
KERNEL = Path("/proc/sys/kernel/random/boot_id")
"""File with an id that all containers of a running kernel share, and that is new after each start of the machine."""
TEMPORARY = "betakd-"
"""Start of the name of everything that this package makes in the folder for temporary files."""
UNFINISHED = re.compile(r".\.(\d+|[0-9a-f]{16})\.tmp$")
"""Pattern in the name of a file or folder that is written aside and then renamed (by `storage`)."""
UNFINISHED_S = 3600.0
"""Seconds without a change after which such a file has no writer: it is written at once, and renamed."""


@contextmanager
def owned(path: Path) -> Iterator[Path]:
    """Own `path` in the block, alone or with other processes. The last living owner removes what is there.

    Where files cannot be locked, nobody is known to own `path`, so nobody but its owner ever removes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(path)
    try:
        yield path
    finally:
        if descriptor is None:
            _remove(path)
        else:
            with os.fdopen(descriptor):
                if _is_locked(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    _remove(path)
                    _lock_of(path).unlink(missing_ok=True)


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """Make a folder for the block; if this process is killed, `remove_abandoned` finds it."""
    with owned(Path(tempfile.gettempdir(), f"{TEMPORARY}{purpose}-{secrets.token_hex(8)}")) as folder:
        folder.mkdir(mode=0o700)
        yield folder


def abandoned(folder: Path, pattern: str) -> Iterator[Path]:
    """Yield each path of `folder` that had owners, all of them dead. Its lock is held until the next, then removed."""
    for lock in sorted(folder.glob(pattern + LOCK)):
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # removed meanwhile, or another user's
            continue
        with os.fdopen(descriptor):
            if (
                _is_ours(descriptor)
                and _is_locked(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                and _is_at(descriptor, lock)
            ):
                yield (path := lock.with_name(lock.name.removesuffix(LOCK)))
                if not path.exists():  # it does if it could not be removed: the next start tries again
                    lock.unlink(missing_ok=True)


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove each path of `folder` that had owners, all of them dead."""
    for path in abandoned(folder, pattern):
        _LOG.info("%s: removed, because the process that made it was killed", path)
        _remove(path)


def remove_temporary() -> None:
    """Remove what killed processes of this package left in the folder for temporary files."""
    remove_abandoned(Path(tempfile.gettempdir()), f"{TEMPORARY}*")


def remove_unfinished(folder: Path) -> None:
    """Remove files that were being written, in `folder` and two levels below, when their writer was killed.

    They have no lock, because their writer may be on another machine. Only their age tells.
    """
    for path in (*folder.glob("*.tmp"), *folder.glob("*/*.tmp"), *folder.glob("*/*/*.tmp")):
        with suppress(FileNotFoundError):  # renamed or removed meanwhile
            changed = max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
            if UNFINISHED.search(path.name) and time.time() - changed > UNFINISHED_S:
                _remove(path)


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + LOCK)


def _acquire(path: Path) -> int | None:
    """Return the descriptor of the lock of `path`, held together with other owners; None where no lock is possible."""
    lock = _lock_of(path)
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        if not _is_locked(descriptor, fcntl.LOCK_SH):
            os.close(descriptor)
            lock.unlink(missing_ok=True)
            return None
        # `remove_abandoned` may have removed the file between the two calls: then its lock says nothing.
        if _is_at(descriptor, lock):
            with suppress(OSError):  # a full disk: then nobody will take this owner for dead
                os.pwrite(descriptor, _kernel(), 0)
            return descriptor
        os.close(descriptor)


def _is_locked(descriptor: int, operation: int) -> bool:
    """Return whether the lock is now ours."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _is_ours(descriptor: int) -> bool:
    """Return whether the file is a lock of this user's, made under the running kernel."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
        return False
    kernel = _kernel()
    return bool(kernel) and os.pread(descriptor, len(kernel) + 1, 0) == kernel


def _kernel() -> bytes:
    """Return the id of the running kernel; empty if the system has none, and then no owner counts as dead."""
    return KERNEL.read_bytes().strip() if KERNEL.exists() else b""


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:  # it costs space, not the result
        _LOG.warning("%s: is no longer needed, and cannot be removed (%s)", path, error)
