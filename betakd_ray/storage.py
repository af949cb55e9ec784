"""Local paths and object stores through one interface: fsspec, with timeouts and retries.

`open_store(url, storage)` returns a filesystem and the path in it. Credentials come from the usual places in the
environment (for S3: AWS_ACCESS_KEY_ID …, a profile, or the instance's role). A spec never holds credentials.
"""

import errno
import io
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
from aiobotocore.response import AioReadTimeoutError
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.handlers import add_expect_header
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem
from s3fs import S3FileSystem
from s3fs.errors import translate_boto_error
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from betakd_ray.output import full_disk
from betakd_ray.spec import StorageSpec

# Between attempts botocore waits for a random part of 1, 2, 4, 8, 16, 20, 20 … seconds: 45 s on average with nine
# attempts. So a request survives half a minute of 5xx answers, and a silent store is given up after two minutes.
ATTEMPTS = 9
TIMEOUT_S = 8.0
ANSWERS = 4
"""Number of times that a request is made whose answer begins and then breaks off."""
ASIDE = ".tmp"
"""Ending of the name of a file or folder that is not whole yet."""

_EXISTS = (409, 412)
"""HTTP status of a store that refuses to make an object, because there is one, or another is being made."""
_BROKEN_OFF = (
    aiohttp.ClientError,
    AioReadTimeoutError,
    FlexibleChecksumError,
    IncompleteReadError,
    ResponseStreamingError,
)


class StoreSilent(OSError):
    """A store did not answer any attempt. The caller should not retry: the attempts took about two minutes already."""


def open_store(
    url: str, storage: StorageSpec | None = None, *, attempts: int = ATTEMPTS
) -> tuple[AbstractFileSystem, str]:
    """Return the filesystem of `url` and the path in it. Raises ValueError for a protocol that fsspec does not know.

    A request to S3 is made up to `attempts` times. Then it raises an OSError; StoreSilent if there was no answer, which
    takes about two minutes with the default `attempts`.
    """
    if is_http(url):
        # Without a limit for a whole file, which may be read over hours, beside others.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30.0, sock_read=60.0)
        # block_size 0: one request from begin to end, because many web servers ignore a range.
        return fsspec.core.url_to_fs(url, client_kwargs={"timeout": timeout}, block_size=0)
    if not url.startswith(("s3://", "s3a://")):
        return fsspec.core.url_to_fs(url)
    filesystem = S3(**_s3_options(storage or StorageSpec(), attempts))
    return filesystem, str(S3._strip_protocol(url))


def is_http(url: str) -> bool:
    """Return whether a URL is one of a web server."""
    return url.startswith(("http://", "https://"))


def join(url: str, *parts: str) -> str:
    """Return a URL or path with `parts` appended, each after a slash."""
    return "/".join([url.rstrip("/"), *parts])


def replace_file(filesystem: AbstractFileSystem, path: str, content: bytes) -> None:
    """Write a whole file, as `whole_file` does."""
    with whole_file(filesystem, path) as writing:
        filesystem.pipe_file(writing, content)


def create_file(filesystem: AbstractFileSystem, path: str, content: bytes) -> bool:
    """Make a file if there is none of that name; return whether this call made it.

    Of two processes that call this at the same time, one makes it. A store that does not know conditional writes
    (If-None-Match) overwrites: read the file again.
    """
    try:
        if not isinstance(filesystem, LocalFileSystem):
            filesystem.pipe_file(path, content, mode="create")
            return True
        aside = f"{path}.{secrets.token_hex(8)}{ASIDE}"
        replace_file(filesystem, aside, content)
        try:
            os.link(aside, path)  # unlike a rename, it fails if there is such a file
            _sync_folder(os.path.dirname(path))
        finally:
            os.unlink(aside)
    except FileExistsError:
        return False
    return True


def put_file(filesystem: AbstractFileSystem, source: str | Path, path: str) -> None:
    """Copy a local file to a store, as `whole_file` does; create the folder of `path` if it is missing."""
    make_folder(filesystem, os.path.dirname(path))
    with whole_file(filesystem, path) as writing:
        filesystem.put_file(str(source), writing)


@contextmanager
def whole_file(filesystem: AbstractFileSystem, path: str) -> Iterator[str]:
    """Yield the path to write a file to. After the block the whole file is at `path`; after an error, the former one.

    A PUT replaces an object at once. A local file is written under a name that nobody else uses, and renamed. It is on
    the disk before it is renamed: after a loss of power, a renamed file could otherwise be empty or cut. Its folder is
    created if it is missing. Raises OutputError if the disk is full.
    """
    with full_disk(path):
        if not isinstance(filesystem, LocalFileSystem):
            yield path
            return
        make_folder(filesystem, os.path.dirname(path))
        # In the same folder, because a rename works only within one file system.
        aside = f"{path}.{secrets.token_hex(8)}{ASIDE}"
        try:
            yield aside
            _sync(aside)
            os.replace(aside, path)
            _sync_folder(os.path.dirname(path))
        except BaseException:
            with suppress(OSError):  # the error that led here is the one to report
                os.unlink(aside)
            raise


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a new local folder to write to. After the block it has the name `folder`; after an error it is gone.

    All that is in it is on the disk before it gets its name. `folder` must not exist, or be empty. Raises OutputError
    if the disk is full.
    """
    with full_disk(folder):
        make_folder(LocalFileSystem(), str(folder.parent))
        aside = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}{ASIDE}")
        aside.mkdir()
        try:
            yield aside
            for path in (aside, *aside.rglob("*")):
                _sync_folder(path) if path.is_dir() else _sync(path)
            aside.rename(folder)
            _sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def make_folder(filesystem: AbstractFileSystem, path: str) -> None:
    """Create a folder, and its parents, if it is missing. On a local disk it remains after a loss of power."""
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.makedirs(path, exist_ok=True)
        return
    missing = list(takewhile(lambda folder: not folder.exists(), (Path(path), *Path(path).parents)))
    os.makedirs(path, exist_ok=True)
    for folder in missing:
        _sync_folder(folder.parent)


def _sync(path: str | Path) -> None:
    """Block until the content of a local file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _sync_folder(path: str | Path) -> None:
    try:
        _sync(path)
    except OSError as error:
        # Some network file systems have no such call for a folder. They store its names by themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


class S3(S3FileSystem):
    """s3fs, changed so that one layer retries each kind of failure, and that a failed request raises an OSError.

    By default, s3fs retries five times what botocore has given up, and requests for a range five times five: a silent
    store then blocks for an hour. But it retries an answer that breaks off only for some requests: not for a listing,
    and not for a part of a large file. Here botocore retries a request until it is answered, and `_whole_answer`
    retries until an answer is complete.
    """

    retries = ANSWERS  # s3fs's own retries, for answers too large for `_whole_answer`

    async def set_session(self, *arguments: Any, **options: Any) -> Any:
        client = await super().set_session(*arguments, **options)
        # Without this, aiohttp would wait for "100 Continue" before each PUT, without a timeout.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        return client

    async def _makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: an object store has no folders, and creating a missing bucket would hide a wrong name."""

    makedirs = sync_wrapper(_makedirs)

    async def _call_s3(self, method: str, *arguments: Any, **options: Any) -> Any:
        await self.set_session()
        client = await self.get_s3(options.get("Bucket"))
        operation = getattr(client, method)
        try:
            return await self._whole_answer(operation, self._get_s3_method_kwargs(operation, *arguments, **options))
        except ClientError as error:
            if "IfNoneMatch" in options and error.response["ResponseMetadata"]["HTTPStatusCode"] in _EXISTS:
                raise FileExistsError(str(error)) from error
            raise translate_boto_error(error) from error
        except NoCredentialsError as error:
            raise PermissionError(str(error)) from error
        # The errors raised below are of classes that s3fs does not retry.
        except _BROKEN_OFF as error:
            raise ConnectionError(f"{ANSWERS} answers were cut off, the last with {error}") from error
        except (ReadTimeoutError, ConnectTimeoutError) as error:
            attempts = self.config_kwargs["retries"]["total_max_attempts"]
            raise StoreSilent(f"no answer within {TIMEOUT_S:g} s in up to {attempts} attempts") from error
        except (HTTPClientError, BotoConnectionError, ResponseParserError) as error:
            raise ConnectionError(str(error)) from error

    @retry(
        retry=retry_if_exception_type(_BROKEN_OFF),
        stop=stop_after_attempt(ANSWERS),
        wait=wait_random_exponential(),
        reraise=True,
    )
    async def _whole_answer(self, operation: Any, arguments: dict[str, Any]) -> Any:
        """Return an answer, with its body read if that is not larger than one block of s3fs."""
        answer = await operation(**arguments)
        size = answer.get("ContentLength")
        if "Body" in answer and size is not None and size <= self.default_block_size:
            try:
                content = await answer["Body"].read()
            finally:
                answer["Body"].close()
            answer["Body"] = _Body(content)
        return answer

    call_s3 = sync_wrapper(_call_s3)


class _Body:
    """Body of an answer whose bytes are read already, with the methods that s3fs uses."""

    def __init__(self, content: bytes) -> None:
        self._rest = io.BytesIO(content)

    async def read(self, size: int = -1) -> bytes:
        return self._rest.read(size)

    def close(self) -> None:
        self._rest.close()


def _s3_options(storage: StorageSpec, attempts: int) -> dict[str, Any]:
    client: dict[str, Any] = {"region_name": storage.region} if storage.region else {}
    if storage.endpoint_url:
        client["endpoint_url"] = storage.endpoint_url
    return {
        "anon": storage.anonymous,
        "client_kwargs": client,
        "config_kwargs": {
            "connect_timeout": TIMEOUT_S,
            "read_timeout": TIMEOUT_S,
            "connector_args": {"socket_factory": _socket},
            # In adaptive mode botocore itself backs off, with jitter, on throttling and 5xx.
            "retries": {"mode": "adaptive", "total_max_attempts": attempts},
        },
        "default_cache_type": "readahead",
        # A cached listing would hide what another process has just written.
        "use_listings_cache": False,
    }


def _socket(address: Any) -> socket.socket:
    """Return a TCP socket that fails if the peer acknowledges nothing for `TIMEOUT_S`.

    The read timeout does not cover this: it begins only after the last byte is sent.
    """
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * TIMEOUT_S))
    return made
