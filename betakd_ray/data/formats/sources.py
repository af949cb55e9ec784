"""The one table of formats, and the format of a file or folder by its name."""

from collections.abc import Callable, Iterator
from typing import Any

from betakd_ray.data.files import store_errors
from betakd_ray.data.formats import arrow, json_text, parquet, table, tars
from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join, open_store

Rows = Iterator[tuple[str, Any]]
"""Records, each with the place where it stands, for messages."""
FORMATS: dict[str, Callable[[str, StorageSpec], Rows]] = {
    "json": json_text.rows,
    "parquet": parquet.rows,
    "arrow": arrow.rows,
    "table": table.rows,
    "shards": tars.rows,
}
"""Format → its function of (location, storage). `spec.tasks.SOURCE_FORMATS` has the same names."""
_TEXT = ("json", "table")
_ENDINGS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "table",
    ".tsv": "table", ".tar": "shards", ".tar.gz": "shards", ".tgz": "shards",
}  # fmt: skip
_INSIDE = (
    ("dataset_dict.json", "arrow"),
    ("state.json", "arrow"),
    (".arrow", "arrow"),
    (".parquet", "parquet"),
    (".tar", "shards"),
    (".tar.gz", "shards"),
    (".tgz", "shards"),
)
"""Ending of a name within a folder → the format of the folder."""
_METADATA = ("metadata.jsonl", "metadata.csv")
"""Names of the list of an image folder, as `datasets` of Hugging Face has it."""


def open_source(location: str, storage: StorageSpec, form: str | None = None) -> Rows | list[tuple[str, Any]]:
    """Return the records of a file or folder; a list if they are in memory anyway, without the images that they name.

    Raises DataError if the format is not known.
    """
    if form is None:
        form, location = _recognised(location, storage)
    rows = FORMATS[form](location, storage)
    return list(rows) if form in _TEXT else rows


def _recognised(location: str, storage: StorageSpec) -> tuple[str, str]:
    """Return format and location of the data at a location, which may be a list within the folder."""
    if found := _by_ending(location):
        return found, location
    with store_errors(location, storage):
        filesystem, path = open_store(location, storage)
        names = [name.rstrip("/") for name in filesystem.ls(path, detail=False)] if filesystem.isdir(path) else []
        names += [inner for name in names if name.endswith("/data") for inner in filesystem.ls(name, detail=False)]
    for ending, form in _INSIDE:
        if any(name.endswith(ending) for name in names):
            return form, location
    for listed in _METADATA:
        if any(name.endswith(f"/{listed}") for name in names):
            return _ENDINGS[listed[len("metadata") :]], join(location, listed)
    raise DataError(
        f"{location}: its format is not known by its name. Known are {', '.join(_ENDINGS)} and folders of such files; "
        f"or name it with --format {'|'.join(FORMATS)}."
    )


def _by_ending(location: str) -> str | None:
    return next((form for ending, form in _ENDINGS.items() if location.lower().endswith(ending)), None)
