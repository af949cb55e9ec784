"""Parquet: a file, or a folder of them as a data set of the Hugging Face Hub has it."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.spec import AbstractFileSystem

from betakd_ray.data.files import store_errors, url_like
from betakd_ray.data.formats.columns import plain_rows
from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join, open_store

BATCH_ROWS = 64
"""Number of rows that are in memory at a time, with their images."""


def rows(location: str, storage: StorageSpec) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file, or of the files of a folder. Raises DataError for a folder with several splits."""
    with store_errors(location, storage):
        filesystem, path = open_store(location, storage)
        files = _files(filesystem, path, location) if filesystem.isdir(path) else [path]
    for file in files:
        url = url_like(location, filesystem, file)
        with store_errors(url, storage):
            yield from _of_file(filesystem, file, url)


def _files(filesystem: AbstractFileSystem, path: str, location: str) -> list[str]:
    files = [name for folder in (path, join(path, "data")) for name in _parquet_in(filesystem, folder)]
    splits = {name.rpartition("/")[2].partition("-")[0] for name in files}
    if len(splits) > 1 and splits & {"train", "test", "validation", "val", "dev"}:
        raise DataError(
            f"{location}: has files of several splits ({', '.join(sorted(splits))}). Put those of one split into a "
            "folder of their own, or name one file."
        )
    return sorted(files)


def _parquet_in(filesystem: AbstractFileSystem, folder: str) -> list[str]:
    if not filesystem.isdir(folder):
        return []
    return [name for name in filesystem.ls(folder, detail=False) if name.endswith(".parquet")]


def _of_file(filesystem: AbstractFileSystem, file: str, url: str) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with filesystem.open(file, "rb") as stream:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=BATCH_ROWS):
                for record in plain_rows(batch):
                    number += 1
                    yield f"{url}, row {number}", record
    except pa.ArrowInvalid as error:
        raise DataError(f"{url}: is no whole Parquet file: {str(error).splitlines()[0]}. Copy it again.") from error
