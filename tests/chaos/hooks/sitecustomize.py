"""A clock that can be set: Python imports a module of this name when it starts, if its folder is in PYTHONPATH.

It stands for a step of the system's clock, as time.time and time.time_ns show it to all Python code of a job and of
Ray. It does not change datetime, and so not the signatures of requests, nor what compiled code reads.
"""

import mmap
import os
import struct
import time

FILE = "BETAKD_TEST_CLOCK"
"""Environment variable with the path of a file of 8 bytes: by how many seconds the clock is ahead, as a double."""


_now, _now_ns = time.time, time.time_ns
_ahead: mmap.mmap


# Functions of a module, because Ray sends classes to other processes that have time.time as a default value.
def shown_time() -> float:
    """Return what the clock shows."""
    return _now() + struct.unpack_from("d", _ahead)[0]


def shown_time_ns() -> int:
    """Return what the clock shows, in nanoseconds."""
    return _now_ns() + int(struct.unpack_from("d", _ahead)[0]) * 10**9


if os.path.exists(os.environ.get(FILE, "")):
    with open(os.environ[FILE], "rb") as file:
        # Mapped, so that all processes see a change at once, and a look costs no system call.
        _ahead = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    time.time, time.time_ns = shown_time, shown_time_ns
