"""Files of a store: their bytes are counted and checksummed, and their errors get a clear message.

An error of a store or its client library becomes DataUnreachable if another attempt may help, OutputError if the disk
is full, and DataError otherwise.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from betakd_ray.errors import BetaKDError, DataError, DataUnreachable
from betakd_ray.output import disk_full, is_full
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import is_http, open_store, whole_file

BLOCK_BYTES = 8 << 20  # one request to the store, and what a reader holds besides the sample at hand
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


class ChecksumStream:
    """File object that counts and checksums the bytes that are read or written. `url` is absolute."""

    def __init__(self, raw: Any, url: str, errors: Callable[[], AbstractContextManager[None]]) -> None:
        self.url = url
        self.size = 0
        self._crc = 0
        self._raw = raw
        self._errors = errors

    @property
    def checksum(self) -> str:
        """Return the crc32 of all bytes so far, as 8 hex digits."""
        return f"{self._crc:08x}"

    def read(self, size: int = -1) -> bytes:
        with self._errors():
            data = self._raw.read(size)
        self._count(data)
        return data

    def write(self, data: bytes) -> int:
        with self._errors():
            self._raw.write(data)
        self._count(data)
        return len(data)

    def _count(self, data: bytes) -> None:
        self.size += len(data)
        self._crc = zlib.crc32(data, self._crc)


@contextmanager
def opened(url: str, storage: StorageSpec) -> Iterator[ChecksumStream]:
    """Open a file of the store to read it. Its errors become DataUnreachable or DataError."""
    errors = partial(store_errors, url, storage)
    with errors():
        filesystem, path = open_store(url, storage)
        raw = filesystem.open(path, "rb", block_size=0 if is_http(url) else BLOCK_BYTES)
    try:
        yield ChecksumStream(raw, url_like(url, filesystem, path), errors)
    finally:
        with errors():
            raw.close()


@contextmanager
def new_file(url: str, storage: StorageSpec) -> Iterator[ChecksumStream]:
    """Yield a stream to a new file of the store. After an error in the block the store has no such file.

    The store's errors become DataUnreachable or DataError, and those of a full disk OutputError.
    """
    errors = partial(store_errors, url, storage)
    with errors(), ExitStack() as opening:
        filesystem, path = open_store(url, storage)
        writing = opening.enter_context(whole_file(filesystem, path))
        raw = filesystem.open(writing, "wb", block_size=BLOCK_BYTES)
        whole = opening.pop_all()
    try:
        yield ChecksumStream(raw, url_like(url, filesystem, path), errors)
    except BaseException:
        with whole:
            _discard(raw)
            raise
    # Closing sends the last part to the store, so it can fail as a write can.
    with errors(), whole:
        raw.close()


def _discard(raw: Any) -> None:
    """Close a file whose writing failed. An object store must not make an object of what was sent so far."""
    with suppress(OSError):  # the error that led here is the one to report
        if isinstance(raw, AbstractBufferedFile):
            raw.closed = True  # first: closing it would send the rest
            raw.discard()
        else:
            raw.close()


@contextmanager
def store_errors(url: str, storage: StorageSpec) -> Iterator[None]:
    """Turn errors of a store into DataUnreachable, or into DataError if waiting would not help.

    A full disk becomes an OutputError. Catches Exception, because fsspec passes on OSError and classes of botocore and
    aiohttp, which have no other common base class.
    """
    try:
        yield
    except BetaKDError:
        raise  # says what to do already
    except Exception as error:
        if is_full(error):
            raise disk_full(url, error) from error
        # ValueError: e.g. a protocol that fsspec does not know. ImportError: a protocol whose package is not installed.
        permanent = (FileNotFoundError, ValueError, ImportError)
        kind = DataError if isinstance(error, permanent) or _is_refusal(error) else DataUnreachable
        raise kind(_explain(url, storage, error)) from error


def url_like(given: str, filesystem: AbstractFileSystem, path: str) -> str:
    """Return the one spelling of a file: a URL if a URL was given, otherwise an absolute path."""
    return filesystem.unstrip_protocol(path) if "://" in given else path


def _is_refusal(error: Exception) -> bool:
    # By name: botocore has several such classes (NoCredentialsError, PartialCredentialsError, …), without a common base
    # class of their own.
    return isinstance(error, PermissionError) or "Credential" in type(error).__name__


def _explain(url: str, storage: StorageSpec, error: Exception) -> str:
    """Return what the store said and what to do."""
    said = f"{type(error).__name__}: {error}"
    if not url.startswith(("s3://", "s3a://")):
        return f"{url}: cannot be opened ({said}). Check the path and its permissions."
    if _is_refusal(error):
        return (
            f"{url}: the store at {_endpoint(storage)} refuses access ({said}). Credentials are read from "
            f"{', '.join(CREDENTIALS)}, AWS_PROFILE or the machine's role: set them where the job runs. For a public "
            f"bucket, set storage.anonymous."
        )
    return (
        f"{url}: the store at {_endpoint(storage)} gives no valid answer ({said}). Check storage.endpoint_url (or "
        f"AWS_ENDPOINT_URL), storage.region, the bucket's name and the network."
    )


def _endpoint(storage: StorageSpec) -> str:
    """Return the store's URL without user and password, or "AWS"."""
    parts = urlsplit(storage.endpoint_url or os.environ.get("AWS_ENDPOINT_URL", ""))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.hostname else "AWS"
