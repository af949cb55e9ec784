"""Paths and object stores behind one interface: fsspec, with the retries that storage needs.

`open_store(url, storage)` gives a filesystem and the path inside it. Credentials come from the environment's usual
chain (for S3: AWS_ACCESS_KEY_ID …, a profile, or the instance's role); a spec never holds them.
"""

from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from betakd_ray.spec import StorageSpec

RETRIES = 8


def open_store(url: str, storage: StorageSpec | None = None) -> tuple[AbstractFileSystem, str]:
    """The filesystem of `url` and the path within it. Raises ValueError for a protocol fsspec does not know."""
    protocol, _, _ = url.partition("://") if "://" in url else ("file", "", "")
    options = _s3_options(storage or StorageSpec()) if protocol in ("s3", "s3a") else {}
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    return filesystem, path


def _s3_options(storage: StorageSpec) -> dict[str, Any]:
    client: dict[str, Any] = {"region_name": storage.region} if storage.region else {}
    if storage.endpoint_url:
        client["endpoint_url"] = storage.endpoint_url
    return {
        "anon": storage.anonymous,
        "client_kwargs": client,
        # Adaptive mode backs off with jitter on throttling and 5xx, inside botocore.
        "config_kwargs": {"retries": {"mode": "adaptive", "max_attempts": RETRIES}},
        "default_cache_type": "readahead",
        # A listing cached by one process hides what another just wrote.
        "use_listings_cache": False,
    }


def join(url: str, *parts: str) -> str:
    """URL or path, one level deeper for each part."""
    return "/".join([url.rstrip("/"), *parts])
