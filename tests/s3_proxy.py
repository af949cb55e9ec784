"""A bad network in front of an S3 server: a proxy on loopback that breaks some requests, by seed or on demand."""

import http.client
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self, cast

import pytest
from tenacity import wait_none

from betakd_ray.storage import S3
from tests.s3 import LOOPBACK, SeaweedServer

FAULTS = (
    "slow_down",  # 503; for this and the next two, the server does not get the request
    "error",  # 500
    "reset",  # the connection is reset in the middle of the request
    "cut",  # the server did as asked; the connection is reset in the middle of the answer, or before its first byte
    "truncated",  # like `cut`, but the connection is closed normally
    "pause",  # nothing comes for `pause_s` in the middle of the answer
    "silence",  # nothing comes for `silence_s` in the middle of the answer, which is more than a client waits
)
SHORT = "short"
"""A well-formed answer without the end of an object. No network does this, so it happens only on demand."""
NO_BUCKET = "no_bucket"
"""Answer 404, which also happens only on demand."""
_ERRORS = {"slow_down": (503, "SlowDown"), "error": (500, "InternalError"), NO_BUCKET: (404, "NoSuchBucket")}
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Fault:
    """A fault of one request, and its place in the message."""

    kind: str
    at: int | None = None
    """Bytes of the body that are sent before the fault; None for `fraction` of the whole message."""
    fraction: float = 0.0
    only: str = ""
    """Regular expression that must match a part of `METHOD /path?query`."""

    def position(self, head: int, body: int) -> int:
        """Return the bytes that are sent before the fault, for a message of `head` + `body` bytes."""
        return head + min(self.at, body) if self.at is not None else int(self.fraction * (head + body))


class FaultyS3:
    """A second address of the server, where a share `rate` of the requests fails. Signatures stay valid.

    with FaultyS3(server, seed=0, rate=0.02) as proxy:
        fsspec.open("s3://betakd/x", endpoint_url=proxy.endpoint_url)
        proxy.faults_injected  # Counter of kinds
    """

    def __init__(
        self,
        server: SeaweedServer,
        seed: int = 0,
        rate: float = 0.02,
        faults: Sequence[str] = FAULTS,
        pause_s: float = 0.5,
        silence_s: float = 10.0,
    ) -> None:
        self.rate = rate
        self.faults = faults
        self.pause_s, self.silence_s = pause_s, silence_s
        self.faults_injected: Counter[str] = Counter()
        self.requests: list[str] = []
        """All requests as `METHOD /path?query`, in order."""
        self.planned: list[Fault] = []
        """Injected faults that have not happened yet."""
        self.upstream = server.port
        self.ended = threading.Event()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._listener = _Listener(self)
        self._thread = threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def endpoint_url(self) -> str:
        return f"http://{LOOPBACK}:{self._listener.server_port}"

    def inject(self, kind: str, at: int | None = None, only: str = "", times: int = 1) -> None:
        """Make the next `times` requests that `only` matches fail, whatever `rate` is.

        `at` is the number of bytes of the answer's body that are sent before the fault (for a reset, of the request's
        body). With None, no byte of the message is sent.
        """
        with self._lock:
            self.planned += [Fault(kind, at, only=only)] * times

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Answer every request with 500 inside the block."""
        before = self.rate, self.faults
        self.rate, self.faults = 1.0, ("error",)
        try:
            yield
        finally:
            self.rate, self.faults = before

    def draw(self, request: str) -> Fault | None:
        """Return the fault that the request gets, or None, and record both."""
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self.planned if re.search(fault.only, request)), None)
            if fault is not None:
                self.planned.remove(fault)
            elif self._random.random() < self.rate:
                fault = Fault(self._random.choice(self.faults), fraction=self._random.random())
            if fault is not None:
                self.faults_injected[fault.kind] += 1
            return fault

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()


class _Listener(ThreadingHTTPServer):
    """HTTP server with one thread per connection; all threads end with the proxy."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, proxy: FaultyS3) -> None:
        self.proxy = proxy
        self.connections: set[socket.socket] = set()
        super().__init__((LOOPBACK, 0), _Connection)

    def server_close(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):  # the connection has ended already
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()


class _Connection(BaseHTTPRequestHandler):
    """Connection of one client, whose requests are passed to the server one by one."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def proxy(self) -> FaultyS3:
        return cast(_Listener, self.server).proxy

    def setup(self) -> None:
        super().setup()
        cast(_Listener, self.server).connections.add(self.connection)

    def finish(self) -> None:
        cast(_Listener, self.server).connections.discard(self.connection)
        super().finish()

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the client closed the connection after its timeout
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None: ...

    def _pass_on(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        fault = self.proxy.draw(f"{self.command} {self.path}")
        if fault and fault.kind == "reset":
            self.rfile.read(fault.position(0, size))
            return self._reset()
        body = self.rfile.read(size)
        if fault and fault.kind in _ERRORS:
            return self._write(*self._error(*_ERRORS[fault.kind]))
        try:
            answer, content = self._ask(body)
            if answer.status == http.HTTPStatus.FORBIDDEN:  # SeaweedFS has refused a valid signature, once in weeks
                answer, content = self._ask(body)
        except (OSError, http.client.HTTPException):  # no server listens, or it ended during the request
            return self._reset()
        if fault and fault.kind == SHORT:
            content = content[: fault.position(0, len(content))]
        head = self._head(answer, len(content))
        if fault is None or fault.kind == SHORT:
            return self._write(head, content)
        self._break(head, content, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815

    def _ask(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        """Return the server's answer. The Host header stays the client's, because it is signed."""
        upstream = http.client.HTTPConnection(LOOPBACK, self.proxy.upstream)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                upstream.putheader(name, value)
        upstream.endheaders(body)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        return answer, content

    def _head(self, answer: http.client.HTTPResponse, size: int) -> bytes:
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP}
        if self.command != "HEAD" and answer.status != http.HTTPStatus.NO_CONTENT:
            headers["Content-Length"] = str(size)
        return _head(answer.status, answer.reason, headers)

    def _error(self, status: int, code: str) -> tuple[bytes, bytes]:
        content = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        headers = {"Content-Type": "application/xml", "Content-Length": str(len(content))}
        return _head(status, code, headers), b"" if self.command == "HEAD" else content

    def _write(self, head: bytes, content: bytes) -> None:
        self.wfile.write(head + content)

    def _break(self, head: bytes, content: bytes, fault: Fault) -> None:
        answer = head + content
        at = fault.position(len(head), len(content))
        self.wfile.write(answer[:at])
        if fault.kind == "pause":
            self.proxy.ended.wait(self.proxy.pause_s)
            self.wfile.write(answer[at:])
        elif fault.kind == "truncated":
            self.close_connection = True
        else:
            self.proxy.ended.wait(self.proxy.silence_s if fault.kind == "silence" else 0)
            self._reset()

    def _reset(self) -> None:
        """Close the connection with RST, which a plain close does not send."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.connection.close()
        self.rfile.close()  # the socket closes only when the last file on it is closed


def _head(status: int, reason: str, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def client_without_pauses(patch: pytest.MonkeyPatch) -> None:
    """Make the package's S3 client retry without a delay, and without its limit on retries after a SlowDown."""
    patch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.0)
    patch.setattr("aiobotocore.retries.bucket.AsyncTokenBucket.acquire", _at_once)
    patch.setattr(cast(Any, S3._whole_answer).retry, "wait", wait_none())


async def _at_once(bucket: Any, amount: int = 1, block: bool = True) -> bool:
    return True
