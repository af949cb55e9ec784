"""Process groups and shared memory: what torch.distributed and DeepSpeed offer no option for."""

import os
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d


def bound_collectives(timeout: timedelta) -> None:
    """Set the timeout of all process groups that exist so far, including DeepSpeed's.

    DeepSpeed makes its groups with torch's default of half an hour, and has no option to change it.
    """
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timeout, group)


def unname_shared_memory(rank: int, group: dist.ProcessGroup) -> None:
    """Unlink the shared memory of DeepSpeed's CPU collectives, 66 MB per rank. Collective over `group`, on the host.

    DeepSpeed does not remove it. After the barrier every rank has it open, so its name is no longer needed, and the
    system frees the memory when the processes end.
    """
    dist.barrier(group=group)  # pyright: ignore[reportArgumentType]
    place = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
    name = "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *place, str(rank)])
    Path("/dev/shm", name).unlink(missing_ok=True)
