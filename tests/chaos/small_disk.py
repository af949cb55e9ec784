"""A disk that can be full: a small file system in memory, which only one program and its children see."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DISK_BYTES = 64 << 20
"""Size of the small disk; a checkpoint of the tiny student has less than one MB."""
_PLACED = "BETAKD_SOAK_DISK"
_MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


def on_small_disk(folder: Path) -> bool:
    """Start this program again, with a small file system in memory at `folder` that only it and its children see.

    Returns true in the program that was started again. Returns false where neither root nor a user namespace may mount:
    then nothing was started.
    """
    if _PLACED in os.environ:
        return True
    for options in ([], ["--user", "--map-root-user"]):
        start = ["unshare", "--mount", *options, "sh", "-c", _MOUNT, "sh", str(DISK_BYTES), str(folder)]
        if subprocess.run([*start, "true"], capture_output=True, check=False).returncode == 0:
            os.execvpe("unshare", [*start, *sys.orig_argv], {**os.environ, _PLACED: "1"})
    return False


class SmallDisk:
    """A file system that is small enough to be filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def full(self) -> Iterator[None]:
        """Keep the disk full in the block, also if others free some of it."""
        ballast, ended = self.folder / "ballast", threading.Event()
        with ballast.open("ab", buffering=0) as file:

            def keep_full() -> None:
                while not ended.wait(0.02):
                    _fill(file)

            _fill(file)
            filling = threading.Thread(target=keep_full, name="ballast", daemon=True)
            filling.start()
            try:
                yield
            finally:
                ended.set()
                filling.join()
                ballast.unlink()


def _fill(file: Any) -> None:
    try:
        while True:
            file.write(bytes(1 << 16))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
