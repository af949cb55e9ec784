"""Paths and object stores behind one interface: fsspec, with the patience that storage needs.

`open_store(url, storage)` gives a filesystem and the path inside it. Credentials come from the environment's usual
chain (for S3: AWS_ACCESS_KEY_ID …, a profile, or the instance's role); a spec never holds them.
"""

import io
import os
import socket
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

from betakd_ray.spec import StorageSpec

# Between attempts botocore pauses for a random part of 1, 2, 4, 8, 16, 20, 20 … seconds, with nine of them for 45 s on
# average. That outlasts half a minute of 5xx, and with the timeout a silent store is given up after two minutes.
ATTEMPTS = 9
TIMEOUT_S = 8.0
ANSWERS = 4
"""How often a request is made whose answer begins, and then breaks off."""

_BROKEN_OFF = (
    aiohttp.ClientError,
    AioReadTimeoutError,
    FlexibleChecksumError,
    IncompleteReadError,
    ResponseStreamingError,
)


class StoreSilent(OSError):
    """A store did not answer, however often it was asked: whoever waited so long need not ask again."""


def open_store(
    url: str, storage: StorageSpec | None = None, *, attempts: int = ATTEMPTS
) -> tuple[AbstractFileSystem, str]:
    """The filesystem of `url` and the path within it. Raises ValueError for a protocol fsspec does not know.

    A request to S3 is made up to `attempts` times, then raises an OSError: StoreSilent where there was no answer, after
    about two minutes unless `attempts` are fewer.
    """
    if not url.startswith(("s3://", "s3a://")):
        return fsspec.core.url_to_fs(url)
    filesystem = S3(**_s3_options(storage or StorageSpec(), attempts))
    return filesystem, str(S3._strip_protocol(url))


def join(url: str, *parts: str) -> str:
    """URL or path, one level deeper for each part."""
    return "/".join([url.rstrip("/"), *parts])


def replace_file(filesystem: AbstractFileSystem, path: str, content: bytes) -> None:
    """Write a file that is whole or as it was: a PUT replaces at once, a local file is written aside and renamed."""
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(path, content)
        return
    aside = f"{path}.{os.getpid()}.tmp"
    filesystem.pipe_file(aside, content)
    os.replace(aside, path)


class S3(S3FileSystem):
    """s3fs where each failure is repeated by one layer, and a request that failed is an OSError.

    As it comes, s3fs repeats five times the requests that botocore has given up, and those for a range five times five:
    an hour of silence. An answer that breaks off, on the other hand, it repeats for some requests only: not for a
    listing, nor for a part of a large file. Here botocore repeats requests until they are answered, and `_whole_answer`
    answers until one is whole.
    """

    retries = ANSWERS  # of answers too large for that

    async def set_session(self, *arguments: Any, **options: Any) -> Any:
        client = await super().set_session(*arguments, **options)
        # aiohttp would wait for "100 Continue" before each PUT, and for ever.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        return client

    async def _makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: an object store has no folders, and to make a bucket that is missing would hide that it is."""

    makedirs = sync_wrapper(_makedirs)

    async def _call_s3(self, method: str, *arguments: Any, **options: Any) -> Any:
        await self.set_session()
        client = await self.get_s3(options.get("Bucket"))
        operation = getattr(client, method)
        try:
            return await self._whole_answer(operation, self._get_s3_method_kwargs(operation, *arguments, **options))
        except ClientError as error:
            raise translate_boto_error(error) from error
        except NoCredentialsError as error:
            raise PermissionError(str(error)) from error
        # All below are classes that s3fs does not take for a reason to begin again.
        except _BROKEN_OFF as error:
            raise ConnectionError(f"{ANSWERS} answers broke off, the last with {error}") from error
        except (ReadTimeoutError, ConnectTimeoutError) as error:
            attempts = self.config_kwargs["retries"]["total_max_attempts"]
            raise StoreSilent(f"no answer within {TIMEOUT_S:g} s at up to {attempts} attempts") from error
        except (HTTPClientError, BotoConnectionError, ResponseParserError) as error:
            raise ConnectionError(str(error)) from error

    @retry(
        retry=retry_if_exception_type(_BROKEN_OFF),
        stop=stop_after_attempt(ANSWERS),
        wait=wait_random_exponential(),
        reraise=True,
    )
    async def _whole_answer(self, operation: Any, arguments: dict[str, Any]) -> Any:
        """An answer with its body read, if that is not larger than what s3fs reads at a time."""
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
    """What s3fs asks of an answer's body, of bytes at hand."""

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
            # Adaptive mode backs off with jitter on throttling and 5xx, inside botocore.
            "retries": {"mode": "adaptive", "total_max_attempts": attempts},
        },
        "default_cache_type": "readahead",
        # A listing cached by one process hides what another just wrote.
        "use_listings_cache": False,
    }


def _socket(address: Any) -> socket.socket:
    """A TCP socket that breaks when nobody takes what it sends; a read timeout begins only after the last byte."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * TIMEOUT_S))
    return made
