"""Spare processes: each has imported what a worker needs, and waits for a worker to be placed in it.

After a death, the imports of torch, transformers and DeepSpeed take most of the time until the next step. Ray can start
a process before there is work for it, but has no public call for that. Here a worker asks its own node for one more
process like its own. Ray places the next worker with the same environment in it.
"""

import importlib
import logging
import os
import threading
import time
from contextlib import suppress
from functools import cache
from typing import Any

import psutil
import ray
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR as HOOK

MODULES = "BETAKD_MODULES"
"""Environment variable with the modules that a process imports before it takes work, separated by commas."""
KEPT_S = 24 * 3600
"""Seconds for which Ray keeps a process that has no work. It ends all processes of a job with the job."""
SETTLED_S = 30.0
"""Seconds at work after which a process asks for a spare one: in a short job it would cost more than it saves."""
TIMEOUT_S = 10.0
_LOG = logging.getLogger(__name__)
_has_asked = threading.Lock()
"""Taken by the call that asks, for good."""


def importing(*modules: str) -> dict[str, str]:
    """Return the environment variables of a worker whose process imports the modules before it takes work.

    They are empty if the user has given the job's processes a setup hook: Ray runs only one.
    """
    if HOOK in ray.get_runtime_context().runtime_env.env_vars():
        return {}
    return {
        HOOK: f"{__name__}.import_modules",
        MODULES: ",".join(modules),
        # A spare process starts before Ray has chosen its GPUs. With this, torch asks the driver's library whether
        # there are any; otherwise it would open all of them, and keep to that choice.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }


def import_modules() -> None:
    """Import the modules that the environment names. Ray calls this in a new process."""
    for module in os.environ[MODULES].split(","):
        with suppress(Exception):  # the worker imports it again, and there the error is raised
            importlib.import_module(module)


def keep_spare() -> None:
    """Ask this node for one more process like this one, if it has fewer spare ones than there are at work.

    Call it after each piece of work: the first call notes the time, and the first one after `SETTLED_S` asks. If the
    node does not answer, a warning is logged.
    """
    if MODULES not in os.environ:
        return
    if time.monotonic() - _first_call() < SETTLED_S or not _has_asked.acquire(blocking=False):
        return
    try:
        at_work, spare = processes_like_this()
        if len(spare) < len(at_work):
            _ask_for_one()
    except Exception as error:
        _LOG.warning("this node keeps no spare process, so that a restart takes some seconds more: %r", error)


@cache
def _first_call() -> float:
    """Return when this was called for the first time, on the monotonic clock in seconds."""
    return time.monotonic()


def processes_like_this() -> tuple[list[int], list[int]]:
    """Return the ids of this node's processes like this one that are at work, and of those that have no work yet."""
    at_work: list[int] = []
    spare: list[int] = []
    for process in psutil.Process(os.getppid()).children():  # those of this node's raylet
        with suppress(psutil.Error):  # it has ended
            title = " ".join(process.cmdline())
            if process.environ().get(MODULES) == os.environ[MODULES]:
                is_spare = title.startswith("ray::IDLE") or "default_worker.py" in title  # or one that still imports
                (spare if is_spare else at_work).append(process.pid)
    return at_work, spare


def _ask_for_one() -> None:
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.utils import get_runtime_env_info
    from ray.core.generated.node_manager_pb2 import (
        PrestartWorkersRequest,  # pyright: ignore[reportAttributeAccessIssue]  # generated
    )
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
    from ray.runtime_env import RuntimeEnv

    context = ray.get_runtime_context()
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    environment = context.get_runtime_env_string()
    info: Any = get_runtime_env_info(RuntimeEnv.deserialize(environment))
    info.serialized_runtime_env = environment  # to the letter: Ray compares its hash with that of the next worker's
    request = PrestartWorkersRequest(
        job_id=bytes.fromhex(context.get_job_id()),
        runtime_env_info=info,
        keep_alive_duration_secs=KEPT_S,
        num_workers=1,
    )
    channel: Any = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    with channel:
        NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=TIMEOUT_S)
