"""A cluster that starts with only a head node, and grows under Ray's own autoscaler (v2); its nodes are logical."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml
from tenacity import Retrying, stop_after_delay, wait_fixed

from tests.nodes import LABEL, free_port

HEAD_ID = "f" * 51 + "00000"
"""Node id by which the provider recognises the head."""
ADDRESS = "127.0.0.2"  # Ray replaces 127.0.0.1 by the machine's public address
IDLE_MINUTES = 0.1


@contextmanager
def autoscaled(most: dict[str, int]) -> Iterator[str]:
    """Yield the address of a cluster that may grow to `most[pool]` nodes per pool, each for one teacher or student."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        address = f"{ADDRESS}:{free_port(ADDRESS)}"
        config = Path(folder) / "autoscaler.yaml"
        config.write_text(yaml.safe_dump(_config(most, address)))
        command = ["ray", "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0", f"--labels={LABEL}=cpu"]
        command += [f"--port={address.rpartition(':')[2]}", f"--node-ip-address={ADDRESS}", f"--temp-dir={folder}/ray"]
        command += [f"--autoscaling-config={config}", "--include-dashboard=false", "--dashboard-agent-listen-port=0"]
        environment = {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        with open(Path(folder) / "log", "wb") as log:
            head = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
        try:
            Retrying(stop=stop_after_delay(60), wait=wait_fixed(1), reraise=True)(_status, address)
            yield address
        finally:
            _end(head)


def _config(most: dict[str, int], address: str) -> dict[str, object]:
    head = {"resources": {"CPU": 2}, "labels": {LABEL: "cpu"}, "node_config": {}}
    nodes = {
        pool: {
            "resources": {"CPU": 1, "GPU": 1, f"{pool}_slot": 1},
            "labels": {LABEL: pool},
            "min_workers": 0,
            "max_workers": count,
            "node_config": {},
        }
        for pool, count in most.items()
    }
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "head_node_id": HEAD_ID,
        "gcs_address": address,
        "launch_multiple": True,
    }
    empty: dict[str, object] = {"auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": []}
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    commands = ("head_start_ray_commands", "worker_start_ray_commands", "file_mounts_sync_continuously")
    return {
        **empty,
        **{name: [] for name in (*lists, *commands)},
        "file_mounts_sync_continuously": False,
        "cluster_name": "autoscaled",
        "provider": provider,
        "max_workers": sum(most.values()),
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "head_node_type": "ray.head.default",
        "available_node_types": {"ray.head.default": head, **nodes},
    }


def _status(address: str) -> None:
    """Raise an error until the cluster answers."""
    subprocess.run(["ray", "status", "--address", address], check=True, capture_output=True, timeout=20)


def _end(head: subprocess.Popen[bytes]) -> None:
    """End the head process and all processes that it started."""
    try:
        family = psutil.Process(head.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    head.send_signal(signal.SIGTERM)
    psutil.wait_procs([psutil.Process(head.pid)] if head.poll() is None else [], timeout=10)
    for process in family:
        if process.is_running():
            process.kill()
    if head.poll() is None:
        head.kill()
    head.wait()
