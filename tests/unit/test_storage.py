"""A failing S3 on loopback (silent, busy, unreachable, interrupted): which requests are repeated, and for how long."""

import errno
import io
import itertools
import os
import random
import re
import socket
import threading
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tenacity import wait_none

from betakd_ray import storage as module
from betakd_ray.data import files
from betakd_ray.data.shards import Shard, read_shard_with_retry
from betakd_ray.errors import DataError, DataUnreachable, OutputError
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import ANSWERS, ATTEMPTS, S3, TIMEOUT_S, StoreSilent, open_store, replace_file
from tests.s3 import SeaweedServer, served
from tests.s3_proxy import FAULTS, SHORT, FaultyS3, client_without_pauses
from tests.tars import good, tar_bytes

URL = "s3://bucket/folder/object"
CONTENT = bytes(range(256)) * 100
HALF = len(CONTENT) // 2


def at(port):
    return StorageSpec(endpoint_url=f"http://127.0.0.1:{port}", region="us-east-1", anonymous=True)


@pytest.fixture
def no_pauses(monkeypatch):
    """Make attempts follow each other without a pause."""
    client_without_pauses(monkeypatch)


# ---- silence -----------------------------------------------------------------------------------------------------


@pytest.fixture
def silent(monkeypatch, no_pauses):
    """Yield the port of a server that accepts every connection and never answers, and its connections so far."""
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
    with pytest.raises(StoreSilent, match=r"0\.05 s in up to 9 attempts"):
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
    with pytest.raises(DataUnreachable, match="StoreSilent: no answer"):
        list(read_shard_with_retry(Shard(URL, 1, 1, ""), at(port)))
    assert len(accepted) == ATTEMPTS


def test_silence_is_given_up_after_two_minutes_on_average():
    pauses = [min(2**number, 20) / 2 for number in range(ATTEMPTS - 1)]
    assert sum(pauses) > 30
    assert ATTEMPTS * TIMEOUT_S + sum(pauses) < 120


# ---- trouble -----------------------------------------------------------------------------------------------------


class Troubled(BaseHTTPRequestHandler):
    """Server that answers GET and HEAD with CONTENT after `server.troubles`: a status, or "cut" for half an answer."""

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


def test_a_download_that_breaks_off_is_begun_again(no_pauses, tmp_path):
    with troubled("cut", 503, "cut") as (server, filesystem, path):
        filesystem.get_file(path, str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == CONTENT
        assert server.troubles == []


@pytest.mark.parametrize("limits", [{"start": 0, "end": len(CONTENT)}, {}])
def test_an_answer_that_always_breaks_off_is_given_up(no_pauses, limits):
    with troubled(*["cut"] * 99) as (server, filesystem, path):
        with pytest.raises(ConnectionError, match=f"{ANSWERS} answers were cut off.*payload"):
            filesystem.cat_file(path, **limits)
        assert server.asked == ANSWERS + (not limits)  # a HEAD for the size


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


# ---- a real server, behind a bad network ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3():
    with served() as server:
        yield server


@pytest.fixture
def proxy(s3, monkeypatch, no_pauses):
    monkeypatch.setattr(module, "TIMEOUT_S", 4.0)  # the server shares the cores with other tests
    with FaultyS3(s3, rate=0.0, pause_s=0.05, silence_s=12.0) as faulty:
        yield faulty


def beyond(proxy):
    return StorageSpec(endpoint_url=proxy.endpoint_url, region="us-east-1")


def every_call(filesystem, folder, path):
    """Make each kind of request once, and return the results."""
    filesystem.pipe_file(path, CONTENT)
    (folder / "file").write_bytes(CONTENT)
    filesystem.put_file(str(folder / "file"), f"{path}.2")
    filesystem.get_file(f"{path}.2", str(folder / "copy"))
    yield (folder / "copy").read_bytes() == CONTENT
    yield filesystem.cat_file(path) == CONTENT
    yield filesystem.cat_file(path, start=100, end=200) == CONTENT[100:200]
    yield filesystem.info(path)["size"] == len(CONTENT)
    yield len(filesystem.find(os.path.dirname(path))) == 2
    filesystem.rm(os.path.dirname(path), recursive=True)
    yield not filesystem.exists(path)


@pytest.mark.parametrize("kind", FAULTS)
def test_every_call_gets_through_every_fault(proxy, tmp_path, kind):
    filesystem, path = open_store("s3://betakd/calls/object", beyond(proxy))
    assert all(every_call(filesystem, tmp_path, path))
    asked = set(proxy.requests)
    assert {request.split(" ")[0] for request in asked} == {"GET", "HEAD", "PUT", "POST"}
    for request, at in zip(sorted(asked), itertools.cycle([None, 0, 1, 50])):
        proxy.inject(kind, at=at, only=f"^{re.escape(request)}$")
    assert all(every_call(filesystem, tmp_path, path))
    assert not proxy.planned


def test_a_bucket_that_is_missing_is_not_made(proxy, s3):
    filesystem, path = open_store("s3://missing/folder", beyond(proxy))
    filesystem.makedirs(path, exist_ok=True)
    assert s3.filesystem().ls("") == [s3.bucket]


def test_a_server_takes_its_own_client_while_anothers_credentials_are_in_the_environment(s3):
    with SeaweedServer() as second:
        second.filesystem().pipe_file(f"{second.bucket}/mine", CONTENT)
        assert not s3.filesystem().exists(f"{s3.bucket}/mine")


def test_a_seed_fixes_which_requests_go_wrong_and_how(s3):
    proxies = [FaultyS3(s3, seed, rate=0.1) for seed in (1, 1, 2)]
    schedules = [[proxy.draw("GET /") for _ in range(1000)] for proxy in proxies]
    assert schedules[0] == schedules[1] != schedules[2]
    assert {fault.kind for fault in schedules[0] if fault} == set(FAULTS)
    assert 50 < sum(fault is not None for fault in schedules[0]) < 150


def test_a_random_half_of_the_requests_may_fail(proxy, tmp_path):
    filesystem, path = open_store("s3://betakd/half/object", beyond(proxy))
    proxy.rate, proxy.faults = 0.5, ("error", "reset", "cut", "truncated")
    for _ in range(5):
        assert all(every_call(filesystem, tmp_path, path))
    assert set(proxy.faults_injected) == set(proxy.faults)


@pytest.mark.parametrize("kind", ["error", "reset", "cut", "truncated"])
def test_each_part_of_a_large_file_gets_through(proxy, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(S3, "default_block_size", 1 << 20)
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 << 20)  # the least S3 takes
    filesystem, path = open_store("s3://betakd/large/object", beyond(proxy))
    content = random.Random(0).randbytes(11 << 20)
    (tmp_path / "file").write_bytes(content)
    for only in ("POST .*uploads", "partNumber=1", "partNumber=3", "POST .*uploadId"):
        proxy.inject(kind, at=1000, only=only)
    filesystem.put_file(str(tmp_path / "file"), path)
    proxy.inject(kind, at=1000, only="GET", times=6)
    filesystem.get_file(path, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == content
    proxy.inject(kind, at=1000, only="GET", times=6)
    assert filesystem.cat_file(path) == content
    assert proxy.faults_injected[kind] == 16


@pytest.fixture
def shard(s3):
    """Write a shard of 30 samples, about 60 kB, into the store."""
    content = tar_bytes([member for number in range(30) for member in good(f"{number:03d}")])
    s3.filesystem().pipe_file("betakd/shards/train-0.tar", content)
    return Shard("s3://betakd/shards/train-0.tar", 30, len(content), f"{zlib.crc32(content):08x}")


def read(shard, proxy):
    return read_shard_with_retry(shard, beyond(proxy), wait=wait_none())


@pytest.mark.parametrize("times", [1, ANSWERS], ids=["once", "until the client gives up"])
@pytest.mark.parametrize("kind", ["cut", "truncated", SHORT])
def test_a_shard_whose_answer_ends_at_any_byte_gives_each_sample_once(proxy, shard, kind, times):
    for at in [0, 1, 511, 512, 513, *range(1000, shard.bytes, 7001), shard.bytes - 1]:
        proxy.inject(kind, at=at, only="GET", times=1 if kind == SHORT else times)
        assert [sample.index for sample in read(shard, proxy)] == list(range(30))
    assert not proxy.planned


@pytest.mark.parametrize("kind", ["error", "reset", "cut"])
def test_a_store_that_fails_after_any_sample_gives_each_sample_once(proxy, shard, kind, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 4096)  # a request for every two samples
    for before in range(0, 29, 4):
        samples = read(shard, proxy)
        indexes = [next(samples).index for _ in range(before)]
        proxy.inject(kind, at=before, only="GET", times=ANSWERS)
        indexes += [sample.index for sample in samples]
        assert indexes == list(range(30))
    assert not proxy.planned


def test_a_shard_is_given_up_when_the_store_stays_away(proxy, shard):
    samples = read(shard, proxy)
    first = next(samples).index
    proxy.rate, proxy.faults = 1.0, ("reset",)
    assert first == 0
    with pytest.raises(DataError, match=r"train-0\.tar.*Check storage\.endpoint_url"):
        list(read(shard, proxy))


# ---- whole files -------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    filesystem, path = open_store(str(tmp_path / "file"))
    replace_file(filesystem, path, b"before")

    def half(self, path, content, **options):
        (tmp_path / os.path.basename(path)).write_bytes(content[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(filesystem), "pipe_file", half)
        with pytest.raises(OutputError, match=rf"disk is full: free some space in {tmp_path}"):
            replace_file(filesystem, path, b"afterwards")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"
    replace_file(filesystem, path, b"afterwards")
    assert (tmp_path / "file").read_bytes() == b"afterwards"


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
