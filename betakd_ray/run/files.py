"""Text files in a run's folder, and what is said when one is missing or damaged."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from betakd_ray.data.files import store_errors
from betakd_ray.errors import OutputError
from betakd_ray.run.folder import SPEC
from betakd_ray.spec import JobSpec, StorageSpec
from betakd_ray.storage import join, open_store, replace_file


def stored_spec(run: str, storage: StorageSpec) -> JobSpec:
    """Return the spec of a run. Raises OutputError if there is none, or if it is damaged."""
    url = join(run, SPEC)
    with as_written(url):
        return JobSpec.model_validate_json(read_required(url, storage))


@contextmanager
def as_written(url: str) -> Iterator[None]:
    """Turn errors of the block into OutputError: the file is not as a job writes it."""
    try:
        yield
    except (OSError, LookupError, TypeError, ValueError, zlib.error) as error:
        raise OutputError(
            f"{url}: is not what a job of this version writes ({type(error).__name__}: {error}). If the job is "
            "running, try again in a moment; otherwise restore the file."
        ) from error


def read_required(url: str, storage: StorageSpec) -> str:
    """Return the text of a file. Raises OutputError if there is no such file, and DataError if the store fails."""
    text = read_text(url, storage)
    if text is None:
        raise OutputError(f"{url}: no such file. Give the folder of a run, which is output.path/name of its spec.")
    return text


def read_text(url: str, storage: StorageSpec) -> str | None:
    """Return the text of a file; None if there is no such file. Raises DataError if the store fails."""
    with store_errors(url, storage):
        filesystem, path = open_store(url, storage)
        try:
            return cast(bytes, filesystem.cat_file(path)).decode()
        except FileNotFoundError:
            return None


def write_text(url: str, storage: StorageSpec, text: str) -> None:
    """Write a file whole. Raises DataError if the store fails."""
    with store_errors(url, storage):
        filesystem, path = open_store(url, storage)
        replace_file(filesystem, path, text.encode())
