"""A Ray that a job starts for itself: who can reach it, and what is left when its driver is killed."""

import ipaddress
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from betakd_ray.data.pack import pack
from tests.tiny import numbered_samples, save_tiny

ROOT = Path(__file__).parents[2]
JOB = """
import os, sys
from betakd_ray.job import BetaKDJob
from betakd_ray.spec import parse_spec
folder = sys.argv[1]
tree = {
    "name": "job", "data": {"train": f"{folder}/shards/train-*.tar"}, "output": f"{folder}/runs",
    "student": {"init": {"kind": "checkpoint", "path": f"{folder}/model"}},
    "training": {"global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "workers": 2},
}
BetaKDJob(parse_spec(tree)).fit()
"""
CONNECTS = """
import sys
from types import SimpleNamespace
from betakd_ray.on_ray.cluster import connected
from betakd_ray.spec import ClusterSpec
with connected(SimpleNamespace(cluster=ClusterSpec())):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[str]]]:
    """Yield a list for drivers, which are killed after the test, in an environment without a token or a cluster."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    drivers: list[subprocess.Popen[str]] = []
    yield drivers
    for process in drivers:
        process.kill()
        process.communicate()


def start(code: str, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def listening(driver: int) -> set[tuple[str, str]]:
    """Return the name of each process of a driver that listens, and the address at which it does."""
    found = set()
    for process in psutil.Process(driver).children(recursive=True):
        try:
            name = process.cmdline()[0].split("/")[-1].split()[0]
            sockets = process.net_connections("inet")
        except (psutil.Error, IndexError):  # it has ended
            continue
        found |= {(name, each.laddr.ip) for each in sockets if each.status == psutil.CONN_LISTEN}
    return found


def is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    # gRPC listens at ::ffff:127.0.0.1, which is 127.0.0.1 on a socket that speaks both versions of IP.
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


@pytest.mark.timeout(600)
def test_no_process_of_a_local_job_can_be_reached_from_another_machine(
    tmp_path: Path, driver: list[subprocess.Popen[str]]
) -> None:
    save_tiny(tmp_path / "model")
    pack(numbered_samples(16), str(tmp_path / "shards"))
    driver.append(start(JOB, str(tmp_path)))
    found = set()
    while driver[0].poll() is None:
        found |= listening(driver[0].pid)
        time.sleep(0.1)
    assert driver[0].returncode == 0
    names = {name for name, _ in found}
    assert {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::RayTrainWorker"} <= {
        name.partition(".")[0] for name in names
    }, names
    assert {(name, address) for name, address in found if not is_loopback(address)} == set()
    token = tmp_path / "home" / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert not list((tmp_path / "home" / ".cache" / "betakd" / "ray-train").iterdir())


def test_the_next_start_ends_what_a_killed_driver_left_running(driver: list[subprocess.Popen[str]]) -> None:
    driver.append(start(CONNECTS))
    assert driver[0].stdout is not None
    assert driver[0].stdout.readline() == "ready\n"
    processes = psutil.Process(driver[0].pid).children(recursive=True)
    assert {"ray::DashboardAgent", "ray::RuntimeEnvAgent"} <= {each.cmdline()[0].split()[0] for each in processes}
    os.kill(driver[0].pid, signal.SIGKILL)
    driver.append(start(CONNECTS))
    assert driver[1].stdout is not None
    assert driver[1].stdout.readline() == "ready\n"
    # At once: without help the agents go on for a minute or more.
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert not alive
