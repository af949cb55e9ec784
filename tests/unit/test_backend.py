"""What Ray Train's controller gets from the driver."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR

from betakd_ray.engine import collectives
from betakd_ray.on_ray import backend, local
from betakd_ray.on_ray.backend import START_TIMEOUT, FoundTorchConfig, ReportFailures
from tests.learning import spawned


class Handle(ActorHandle):
    """A handle that can be pickled and leads nowhere."""

    def __init__(self) -> None:
        pass

    def __del__(self) -> None:
        pass

    def __reduce__(self) -> tuple[type[dict], tuple[()]]:
        return dict, ()


def test_the_limit_of_a_start_is_set_in_the_process_that_keeps_it_and_in_no_other() -> None:
    assert START_TIMEOUT == WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
    callback = pickle.dumps(ReportFailures(Handle(), 12.5))
    assert START_TIMEOUT not in os.environ
    code = f"import os, pickle; pickle.loads({callback!r}); print(os.environ[{START_TIMEOUT!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "12.5"


class OneWorker:
    """Ray Train's worker group, of this process alone."""

    def execute_single(self, _rank: int, function: Any, *arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    def execute(self, function: Any, *arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    execute_single_async = execute_single

    def __len__(self) -> int:
        return 1


def listening() -> set[str]:
    """Return the addresses at which this process listens."""
    return {each.laddr.ip for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("is_local", [True, False])
def test_the_ranks_of_a_local_cluster_meet_at_a_store_that_no_other_machine_reaches(
    is_local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(backend, "is_on_loopback", lambda: is_local)
    monkeypatch.setattr(backend.config, "_set_torch_distributed_env_vars", lambda: None)
    monkeypatch.setattr(ray, "get", lambda answers: answers)
    monkeypatch.setattr(collectives, "_STORES", [])
    before = listening()
    FoundTorchConfig(timeout_s=60).backend_cls().on_start(OneWorker(), FoundTorchConfig(timeout_s=60))
    try:
        dist.barrier()
        reached = {"127.0.0.1", *before}
        # Not local: as torch does it, for the ranks of other machines. So what is asserted for local ones can fail.
        assert (listening() <= reached) == is_local
    finally:
        dist.destroy_process_group()


def _of_gloo() -> list[str]:
    dist.barrier(dist.new_group(backend="gloo"))
    return sorted(listening())


def test_the_ranks_of_a_local_cluster_talk_where_no_other_machine_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "is_on_loopback", lambda: True)
    for name, value in local.loopback_environment().items():
        monkeypatch.setenv(name, value)
    assert spawned(_of_gloo, tmp_path, ranks=2) == ["127.0.0.1"]
