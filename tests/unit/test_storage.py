"""S3 at its worst, on loopback: silent, busy, gone, or breaking off. Who repeats what, and for how long."""

import io
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from betakd_ray import storage as module
from betakd_ray.data.shards import Shard, read_shard_with_retry
from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import ATTEMPTS, S3, TIMEOUT_S, StoreSilent, open_store

URL = "s3://bucket/folder/object"
CONTENT = bytes(range(256)) * 100
HALF = len(CONTENT) // 2


def at(port):
    return StorageSpec(endpoint_url=f"http://127.0.0.1:{port}", region="us-east-1", anonymous=True)


@pytest.fixture
def no_pauses(monkeypatch):
    """Attempts follow each other at once."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.0)


# ---- silence -----------------------------------------------------------------------------------------------------


@pytest.fixture
def silent(monkeypatch, no_pauses):
    """A server that accepts every connection and says nothing: its port, and the connections so far."""
    monkeypatch.setattr(module, "TIMEOUT_S", 0.05)
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            while True:
                try:
                    accepted.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        yield server.getsockname()[1], accepted
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in accepted:
        connection.close()


def write_all(filesystem, path, folder):
    with filesystem.open(path, "wb") as file:
        file.write(b"content")


CALLS = {
    "info": lambda filesystem, path, folder: filesystem.info(path),
    "read": lambda filesystem, path, folder: filesystem.cat_file(path, start=1, end=9),
    "get": lambda filesystem, path, folder: filesystem.get_file(path, str(folder / "copy")),
    "put": lambda filesystem, path, folder: filesystem.pipe_file(path, b"content"),
    "write": write_all,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_silent_store_is_asked_so_many_times_and_given_up(silent, tmp_path, call):
    port, accepted = silent
    filesystem, path = open_store(URL, at(port))
    with pytest.raises(StoreSilent, match=r"0\.05 s at up to 9 attempts"):
        CALLS[call](filesystem, path, tmp_path)
    assert len(accepted) == ATTEMPTS


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux times what is sent")
def test_a_store_that_takes_no_more_bytes_is_given_up(silent):
    port, accepted = silent
    filesystem, path = open_store(URL, at(port), attempts=2)
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        filesystem.pipe_file(path, bytes(20 << 20))
    assert len(accepted) <= 4  # aiohttp sends each once more


def test_fewer_attempts_may_be_asked_for(silent):
    port, accepted = silent
    filesystem, path = open_store(URL, at(port), attempts=2)
    with pytest.raises(OSError, match="2 attempts"):
        filesystem.info(path)
    assert len(accepted) == 2


def test_a_reader_does_not_wait_for_a_silent_store_again(silent):
    port, accepted = silent
    with pytest.raises(DataError, match="StoreSilent: no answer"):
        list(read_shard_with_retry(Shard(URL, 1, 1, ""), at(port)))
    assert len(accepted) == ATTEMPTS


def test_silence_is_given_up_after_two_minutes_on_average():
    pauses = [min(2**number, 20) / 2 for number in range(ATTEMPTS - 1)]
    assert sum(pauses) > 30
    assert ATTEMPTS * TIMEOUT_S + sum(pauses) < 120


# ---- trouble -----------------------------------------------------------------------------------------------------


class Troubled(BaseHTTPRequestHandler):
    """Gives CONTENT to GET and HEAD, once `server.troubles` are used up: a status, or "cut" for half of an answer."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked += 1
        trouble = self.server.troubles.pop(0) if self.server.troubles else None
        if isinstance(trouble, int):
            self.answer(trouble, b"")
        else:
            self.answer(*self.asked_range(), cut=trouble == "cut")

    def do_HEAD(self):
        self.do_GET()

    def asked_range(self):
        if "Range" not in self.headers:
            return 200, CONTENT
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        return 206, CONTENT[int(first) : int(last or len(CONTENT)) + 1]

    def answer(self, status, body, cut=False):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def log_message(self, *args):
        pass


@contextmanager
def troubled(*troubles):
    with ThreadingHTTPServer(("127.0.0.1", 0), Troubled) as server:
        server.troubles, server.asked = list(troubles), 0
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server, *open_store(URL, at(server.server_port))
        finally:
            server.shutdown()
            thread.join()


def test_a_store_that_is_busy_twice_gives_the_object(no_pauses):
    with troubled(503, 503) as (server, filesystem, path):
        assert filesystem.cat_file(path, start=0, end=len(CONTENT)) == CONTENT
        assert server.asked == 3


def test_a_file_is_read_through_trouble(no_pauses):
    with troubled(500, None, 503, "cut", 502, "cut", 503) as (server, filesystem, path), filesystem.open(path) as file:
        assert file.read() == CONTENT
        assert server.troubles == []


def test_a_download_goes_on_where_it_broke_off(no_pauses, tmp_path):
    with troubled("cut", 503, "cut") as (server, filesystem, path):
        filesystem.get_file(path, str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == CONTENT
        assert server.troubles == []


def test_an_answer_that_always_breaks_off_is_given_up(no_pauses):
    with troubled(*["cut"] * 99) as (server, filesystem, path):
        with pytest.raises(Exception, match="payload"):
            filesystem.cat_file(path, start=0, end=len(CONTENT))
        assert server.asked == S3.retries


def test_a_store_that_stays_busy_is_given_up(no_pauses):
    with troubled(*[503] * 99) as (server, filesystem, path):
        with pytest.raises(OSError, match="Service Unavailable"):
            filesystem.info(path)
        assert server.asked == ATTEMPTS


@pytest.mark.parametrize(("status", "error"), [(404, FileNotFoundError), (403, PermissionError)])
def test_a_plain_no_is_taken_at_once(status, error):
    with troubled(status) as (server, filesystem, path):
        with pytest.raises(error):
            filesystem.cat_file(path, start=0, end=9)
        assert server.asked == 1


def test_a_closed_port_is_an_os_error(no_pauses):
    filesystem, path = open_store(URL, at(1))
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1"):
        filesystem.info(path)


def test_missing_credentials_are_a_refusal(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    filesystem, path = open_store(URL, at(1).model_copy(update={"anonymous": False}))
    with pytest.raises(PermissionError, match="credentials"):
        filesystem.info(path)


# ---- other stores ------------------------------------------------------------------------------------------------


def test_a_path_and_a_url_open_their_own_filesystems(tmp_path):
    filesystem, path = open_store(str(tmp_path / "file"))
    with filesystem.open(path, "wb") as file:
        file.write(CONTENT)
    assert (tmp_path / "file").read_bytes() == CONTENT
    filesystem, path = open_store("memory://folder/file")
    filesystem.pipe_file(path, CONTENT)
    with io.BytesIO(filesystem.cat_file(path)) as file:
        assert file.read() == CONTENT


def test_a_protocol_nobody_knows_is_an_error():
    with pytest.raises(ValueError, match="nope"):
        open_store("nope://bucket/object")
