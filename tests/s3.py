"""A real S3 server for tests: SeaweedFS on loopback, which starts within a second and ends with its parent."""

import ctypes
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import s3fs

LOOPBACK = "127.0.0.1"
REGION = "us-east-1"
# S3, master, volume, filer, admin. SeaweedFS opens a gRPC port 10,000 above each; all stay below the ephemeral ports.
PORTS = 5
GRPC_OFFSET = 10_000
FIRST_PORTS = range(12_000, 22_000, PORTS)

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


class SeaweedServer:
    """One SeaweedFS process with one bucket.

    The bucket is empty at first. Its objects survive `stop()` and `start()`. They survive the end of the `with` block,
    for the next server of that folder, only if a `folder` is given.

    with SeaweedServer() as s3:
        os.environ |= s3.environment
        fsspec.open("s3://betakd/x", endpoint_url=s3.endpoint_url)
    """

    def __init__(self, bucket: str = "betakd", ready_timeout_s: float = 30.0, folder: str | Path | None = None) -> None:
        self.bucket = bucket
        self.port = _free_ports()
        self.access_key = "betakd-tests"
        self._secret = secrets.token_hex(20)
        self._ready_timeout_s = ready_timeout_s
        self._kept = Path(folder) if folder else None
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint_url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Return variables with a client's credentials, so that it does not ask an instance's metadata service."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def filesystem(self) -> s3fs.S3FileSystem:
        return s3fs.S3FileSystem(
            key=self.access_key,
            secret=self._secret,
            client_kwargs={"endpoint_url": self.endpoint_url, "region_name": REGION},
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def start(self) -> None:
        """Start the process on the same objects and port as before, and wait until a put succeeds."""
        if self._directory is None:
            self._directory = self._kept or Path(tempfile.mkdtemp(prefix="weed-"))
            self._directory.mkdir(parents=True, exist_ok=True)
            (self._directory / "identities.json").write_text(json.dumps(self._identities()))
        with open(self._directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                self._command(self._directory),
                env=self._own_environment(self._directory),
                cwd=self._directory,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the tests, which then stop the server
                preexec_fn=_die_with_parent,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End this server's own process, and no other process."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        for port in range(self.port, self.port + PORTS):  # SeaweedFS does not remove all of its sockets
            for forgotten in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-grpc-{port + GRPC_OFFSET}.sock"):
                forgotten.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._directory is not None and self._kept is None:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._directory = None

    def _own_environment(self, directory: Path) -> dict[str, str]:
        """Return this process's variables, less the credentials: another server's would replace those of the file."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        # Without GOMEMLIMIT, the process grows to 1.8 GB.
        return {**inherited, "GOMEMLIMIT": "400MiB", "TMPDIR": str(directory)}

    def _identities(self) -> dict[str, Any]:
        """Return who may do what. SeaweedFS reloads identities while it runs; those of a file stay valid meanwhile."""
        credentials = [{"accessKey": self.access_key, "secretKey": self._secret}]
        return {"identities": [{"name": "tests", "credentials": credentials, "actions": ["Admin"]}]}

    def _command(self, directory: Path) -> list[str]:
        ports = {name: self.port + i for i, name in enumerate(["s3", "master", "volume", "filer", "admin"])}
        return [
            str(Path(sysconfig.get_path("scripts"), "weed")),
            "mini",
            f"-dir={directory}",
            f"-bucket={self.bucket}",
            f"-s3.config={directory / 'identities.json'}",
            # Its defaults bind 0.0.0.0 and report home.
            f"-ip={LOOPBACK}",
            f"-ip.bind={LOOPBACK}",
            "-master.telemetry=false",
            *(f"-{name}.port={port}" for name, port in ports.items()),
            f"-filer.localSocket={directory / 'filer.sock'}",
            f"-s3.localSocket={directory / 's3.sock'}",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        assert self._directory is not None
        deadline = time.monotonic() + self._ready_timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            if self._accepts_a_put():
                return
            time.sleep(0.05)
        tail = (self._directory / "log").read_text(errors="replace")[-2000:]
        raise RuntimeError(
            f"SeaweedFS did not take an object at {self.endpoint_url} within {self._ready_timeout_s:g} s "
            f"(exit code {self._process.poll()}); its log ends with:\n{tail}"
        )

    def _accepts_a_put(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((LOOPBACK, self.port)) != 0:
                return False
        probe_path = f"{self.bucket}/.ready"
        filesystem = self.filesystem()
        try:
            filesystem.pipe_file(probe_path, b"ready")
            filesystem.rm_file(probe_path)
        except OSError:  # listening, but the bucket or its first volume is still being made
            return False
        return True


@contextmanager
def served(folder: str | Path | None = None) -> Iterator[SeaweedServer]:
    """Yield a server; its credentials are in this process's environment while it runs.

    Its bucket is empty, or has what an earlier server of `folder` has left.
    """
    with SeaweedServer(folder=folder) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


def _free_ports() -> int:
    """Return the first of `PORTS` consecutive free ports, whose gRPC ports are free too."""
    for first in random.SystemRandom().sample(FIRST_PORTS, 100):
        if all(_is_free(port) and _is_free(port + GRPC_OFFSET) for port in range(first, first + PORTS)):
            return first
    raise RuntimeError(f"no {PORTS} neighbouring ports are free on {LOOPBACK} between {FIRST_PORTS[0]} and 22000")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def _die_with_parent() -> None:
    """Make the kernel end this process when the thread that started it ends. It runs in the child before exec."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
