"""Data sets that `datasets` of Hugging Face has saved to a disk: Arrow files beside a state.json."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from betakd_ray.data.files import store_errors, url_like
from betakd_ray.data.formats.columns import plain_rows
from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join, open_store


def rows(location: str, storage: StorageSpec) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a saved data set, or of one Arrow file. Raises DataError for several splits, or no Arrow."""
    with store_errors(location, storage):
        filesystem, path = open_store(location, storage)
        files = [path] if path.endswith(".arrow") else _files(filesystem, path, location)
    for file in files:
        with store_errors(url_like(location, filesystem, file), storage):
            yield from _of_file(filesystem, file, url_like(location, filesystem, file))


def _files(filesystem: AbstractFileSystem, path: str, location: str) -> list[str]:
    names = {name.rstrip("/").rpartition("/")[2] for name in filesystem.ls(path, detail=False)}
    if "dataset_dict.json" in names:
        splits = json.loads(filesystem.cat_file(join(path, "dataset_dict.json")))["splits"]
        if len(splits) != 1:
            raise DataError(f"{location}: has the splits {', '.join(splits)}. Name one: {join(location, splits[0])}.")
        return _files(filesystem, join(path, splits[0]), location)
    if "state.json" in names:
        state = json.loads(filesystem.cat_file(join(path, "state.json")))
        return [join(path, each["filename"]) for each in state["_data_files"]]
    return [join(path, name) for name in sorted(names) if name.endswith(".arrow")]


def _of_file(filesystem: AbstractFileSystem, file: str, url: str) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with filesystem.open(file, "rb") as stream:
            try:
                batches = iter(pa.ipc.open_stream(stream))
            except pa.ArrowInvalid:  # the other of Arrow's two formats
                stream.seek(0)
                reader = pa.ipc.open_file(stream)
                batches = (reader.get_batch(at) for at in range(reader.num_record_batches))
            for batch in batches:
                for record in plain_rows(batch):
                    number += 1
                    yield f"{url}, row {number}", record
    except pa.ArrowInvalid as error:
        raise DataError(f"{url}: is no whole Arrow file: {str(error).splitlines()[0]}. Copy it again.") from error
