"""Process groups and shared memory: what torch.distributed and DeepSpeed offer no option for."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from betakd_ray.leftovers import owned, remove_abandoned

MEMORY = Path("/dev/shm")
"""Folder in which Linux names shared memory."""
BUFFER = "deepspeed_allreduce_buffer"
"""Start of the name of DeepSpeed's: then come user, MASTER_ADDR, MASTER_PORT and rank."""


_STORES: list[Any] = []


def store_on_loopback() -> tuple[str, int]:
    """Start the store at which the ranks of a process group meet, and which only this machine reaches; return where.

    torch's own listens on all interfaces, and does whatever it is told there. A later `init_process_group` of this
    process finds this one at its port, and starts none.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    host, port = listener.getsockname()
    descriptor = listener.detach()  # the store closes it
    options = {"is_master": True, "wait_for_workers": False, "multi_tenant": True, "master_listen_fd": descriptor}
    store = dist.TCPStore(host, port, **options)  # pyright: ignore[reportPrivateImportUsage]
    _STORES.append(store)  # it must live as long as this process
    return host, port


def bound_collectives(timeout: timedelta) -> None:
    """Set the timeout of all process groups that exist so far, including DeepSpeed's.

    DeepSpeed makes its groups with torch's default of half an hour, and has no option to change it.
    """
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timeout, group)


@contextmanager
def named_shared_memory(rank: int) -> Iterator[None]:
    """Own the shared memory that DeepSpeed's CPU collectives make in the block, 66 MB per rank; remove its name after.

    DeepSpeed does not remove it. End the block with a barrier: then every rank has the memory open, its name is no
    longer needed, and the system frees it when the processes end. What ranks left that were killed within their block
    is removed first.
    """
    if not os.access(MEMORY, os.W_OK):  # no such folder, or a container that may not write there
        yield
        return
    remove_abandoned(MEMORY, f"{BUFFER}_*")
    place = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
    with owned(MEMORY / "_".join([BUFFER, str(os.getuid()), *place, str(rank)])):
        yield
