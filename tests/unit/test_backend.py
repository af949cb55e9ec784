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
from ray.train.v2._internal.constants import HEALTH_CHECK_INTERVAL_S_ENV_VAR, WORKER_GROUP_START_TIMEOUT_S_ENV_VAR

from betakd_ray.engine import collectives
from betakd_ray.on_ray import backend, local
from betakd_ray.on_ray.backend import LOOK_INTERVAL, START_TIMEOUT, FoundTorchConfig, ReportFailures
from tests.learning import spawned


class Handle(ActorHandle):
    """A handle that can be pickled and leads nowhere."""

    def __init__(self) -> None:
        pass

    def __del__(self) -> None:
        pass

    def __reduce__(self) -> tuple[type[dict], tuple[()]]:
        return dict, ()


@pytest.mark.parametrize(("users", "interval"), [({}, "2.0"), ({LOOK_INTERVAL: "7"}, "7")])
def test_what_a_controller_reads_is_set_in_its_process_and_in_no_other(users: dict[str, str], interval: str) -> None:
    assert (START_TIMEOUT, LOOK_INTERVAL) == (WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, HEALTH_CHECK_INTERVAL_S_ENV_VAR)
    environment = {name: value for name, value in os.environ.items() if name != LOOK_INTERVAL} | users
    callback = pickle.dumps(ReportFailures(Handle(), 12.5, workers=1024))
    assert START_TIMEOUT not in os.environ
    names = f"os.environ[{START_TIMEOUT!r}], os.environ[{LOOK_INTERVAL!r}]"
    code = f"import os, pickle; pickle.loads({callback!r}); print({names})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["12.5", interval]


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
