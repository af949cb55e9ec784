"""Files of a store: their bytes are counted and checksummed, and their errors get a clear message.

An error of a store or its client library becomes DataUnreachable if another attempt may help, and DataError otherwise.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from betakd_ray.errors import DataError, DataUnreachable
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import open_store

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
def opened(url: str, mode: str, storage: StorageSpec) -> Iterator[ChecksumStream]:
    """Open a file of the store. Its errors become DataUnreachable or DataError."""
    errors = partial(store_errors, url, storage)
    with errors():
        filesystem, path = open_store(url, storage)
        if "w" in mode and isinstance(filesystem, LocalFileSystem):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        raw = filesystem.open(path, mode, block_size=BLOCK_BYTES)
    try:
        yield ChecksumStream(raw, url_like(url, filesystem, path), errors)
    finally:
        # Closing a written file sends its last part to the store, so it can fail as a write can.
        with errors():
            raw.close()


@contextmanager
def store_errors(url: str, storage: StorageSpec) -> Iterator[None]:
    """Turn errors of a store into DataUnreachable, or into DataError if waiting would not help.

    Catches Exception, because fsspec passes on OSError and classes of botocore and aiohttp, which have no other
    common base class.
    """
    try:
        yield
    except Exception as error:
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
