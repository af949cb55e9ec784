"""A cluster of several logical nodes on this machine, with the node types of the clusters in cluster/."""

import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
from ray.cluster_utils import Cluster

LABEL = "betakd.io/pool"
HEAD = "head"


class Nodes:
    """A head node for readers, and nodes for one teacher or student each, which can be lost and are then replaced."""

    def __init__(self, folder: str, pools: Mapping[str, int], gpus: int = 0, **head: Any) -> None:
        head = {"include_dashboard": False, "dashboard_agent_listen_port": 0, "object_store_memory": 256 << 20, **head}
        self.folder = folder
        """Folder of Ray's sessions, with their logs."""
        self._gpus = gpus
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "num_gpus": 0, "labels": {LABEL: "cpu"}, "temp_dir": folder, **head},
        )
        names = [f"{pool}-{number}" for pool, count in pools.items() for number in range(count)]
        self._nodes = {name: self._add(name) for name in names}

    @property
    def address(self) -> str:
        return self._cluster.address

    def of(self, pool: str) -> list[str]:
        """Return the names of a pool's nodes."""
        return [name for name in self._nodes if name.startswith(f"{pool}-")]

    def lose(self, name: str) -> None:
        """Kill the node at once, and add another one in its place."""
        self._cluster.remove_node(self._nodes[name], allow_graceful=False)
        self._nodes[name] = self._add(name)

    def announce(self, name: str, notice_s: int) -> None:
        """Announce the end of a node, as a cloud does before it takes a spot node back."""
        command = ["ray", "drain-node", "--address", self.address, "--node-id", self._nodes[name].node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command += ["--deadline-remaining-seconds", str(notice_s)]
        subprocess.run(command, check=True, capture_output=True)

    def processes(self, role: str) -> dict[int, str]:
        """Return the processes whose command line contains `role`: process id → node."""
        found = {}
        for name, node in {HEAD: self._cluster.head_node, **self._nodes}.items():
            for process in _below(node.all_processes["raylet"][0].process.pid):
                if role in title(process):
                    found[process.pid] = name
        return found

    def shutdown(self) -> None:
        self._cluster.shutdown()

    def _add(self, name: str) -> Any:
        pool = name.split("-")[0]
        return self._cluster.add_node(
            num_cpus=1,
            num_gpus=self._gpus,
            resources={f"{pool}_slot": 1},
            labels={LABEL: pool},
            object_store_memory=128 << 20,
        )


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def title(process: psutil.Process) -> str:
    """Return the command line of a process; an empty string if the process has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


@contextmanager
def nodes(pools: Mapping[str, int], gpus: int = 0, **head: Any) -> Iterator[Nodes]:
    """Yield a cluster of logical nodes in a temporary folder; `head` has further options of its head node."""
    # Not pytest's tmp_path: the folder holds sockets, whose paths may have at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        cluster = Nodes(folder, pools, gpus, **head)
        try:
            yield cluster
        finally:
            cluster.shutdown()
