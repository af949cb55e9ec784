"""A Ray that a job starts for itself on this machine: closed to other machines and users, and ended with its driver."""

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray
from ray._private import ray_constants

from betakd_ray.errors import ClusterError
from betakd_ray.leftovers import abandoned, owned

_LOG = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
DRIVER = "betakd-driver"
"""Name in a session's folder that the driver owns as long as it lives."""
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Variables with which a user names the token. Without them Ray reads ~/.ray/auth_token, and makes it if need be."""


@contextmanager
def closed() -> Iterator[None]:
    """Let a Ray that is started in the block listen on 127.0.0.1 alone, with a token that only this user can read.

    Raises ClusterError if the token cannot be written.
    """
    try:
        keep_token_private()
    except OSError as error:
        raise ClusterError(
            f"cluster.address: a Ray on this machine needs a token in ~/.ray/auth_token, which cannot be written "
            f"({error}). Set HOME to a folder that can be written, or RAY_AUTH_TOKEN to a random text."
        ) from error
    # Ray has no option for this: it replaces `_node_ip_address="127.0.0.1"` by an address that other machines reach.
    # But all its processes listen where the node is. Where Ray supports no clusters, as on macOS, it takes its node to
    # be at 127.0.0.1.
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def keep_token_private() -> None:
    """Make the token file that Ray would make, but for this user alone; close one that others can read."""
    is_users_own = any(os.environ.get(name) for name in TOKEN_VARIABLES)
    if is_users_own or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as aside:  # its mode is 0600
            aside.write(secrets.token_hex(32))
            aside.flush()
            with suppress(FileExistsError):  # another process was faster: its token is as good
                os.link(aside.name, path)
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)


@contextmanager
def driven(session: Path) -> Iterator[None]:
    """Mark a session's folder as this process's; end what is left of sessions whose driver was killed."""
    for mark in abandoned(session.parent, f"session_*/{DRIVER}"):
        end_processes(mark.parent.resolve())
    with owned(session / DRIVER):
        yield


def end_processes(session: Path) -> None:
    """End the processes of Ray that have files of the session open. Its driver must be dead.

    The kernel ends most of them with their driver. But each node's two agents may try for minutes to tell a dead GCS
    that the raylet is gone.
    """
    for process in psutil.process_iter():
        with suppress(psutil.Error, FileNotFoundError, PermissionError):  # it has ended, or is another user's
            if _is_of(session, process):
                _LOG.info("process %d is ended: its driver was killed", process.pid)
                process.kill()


def _is_of(session: Path, process: psutil.Process) -> bool:
    """Return whether a process is this user's, Ray's, and of the session."""
    if process.uids().real != os.getuid() or process.pid == os.getpid():
        return False
    here, there = (os.stat(f"/proc/{pid}/ns/mnt").st_ino for pid in ("self", process.pid))
    if here != there:  # in another container the same path may be another folder
        return False
    of_ray = str(Path(ray.__file__).parent)
    # Someone who reads the session's log is not of Ray.
    if not any(part.startswith("ray::") or of_ray in part for part in process.cmdline()):
        return False
    return any(Path(file.path).is_relative_to(session) for file in process.open_files())


def loopback_environment() -> dict[str, str]:
    """Return the variables with which gloo and NCCL listen on loopback; empty if the connected Ray does not."""
    if not is_on_loopback():
        return {}
    addresses = psutil.net_if_addrs().items()
    name = next((name for name, each in addresses if any(one.address == LOOPBACK for one in each)), "lo")
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}


def is_on_loopback() -> bool:
    """Return whether this node of the connected Ray listens on loopback alone."""
    return ray.util.get_node_ip_address() == LOOPBACK
