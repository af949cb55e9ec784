"""How every file of a run is read: whole, typed, within limits, and with a remedy if it is damaged.

A file may be cut, edited or written by another program. Whatever it holds, a reader gets either a value of the right
types and bounds, or OutputError, which names the file and what to do. So no file of a run is read elsewhere, or parsed
by `json`: its values would have any type, and deep nesting or a huge number would raise errors of other classes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, cast

from fsspec.spec import AbstractFileSystem
from pydantic import TypeAdapter, ValidationError

from betakd_ray.data.files import store_errors
from betakd_ray.errors import OutputError
from betakd_ray.run.folder import SPEC
from betakd_ray.spec import JobSpec, StorageSpec
from betakd_ray.storage import join, open_store, replace_file

T = TypeVar("T")
Errors = Callable[[], AbstractContextManager[None]]
"""Maker of a context in which errors of the store become errors of this package."""
ANOTHER_NAME = "Restore it, or start a new run under another `name`."
MAX_BYTES = 64 << 20
"""Limit in bytes of a file whose length does not depend on the data."""
MAX_LARGE_BYTES = 1 << 30
"""Limit in bytes of a file with an entry for each shard or sample: a plan of five million passes has less."""


@dataclass(frozen=True)
class File(Generic[T]):
    """A file of a run: its name, how its content is parsed, and what to do if it is damaged."""

    name: str
    parse: Callable[[bytes], T]
    """Function that returns the content, or raises ValueError with the reason."""
    remedy: str = ""
    limit: int = MAX_BYTES


def whole(of: Any) -> Callable[[bytes], Any]:
    """Return a parser of a JSON file that holds `of`, a type.

    No value is converted to another type, and no unknown name is accepted.
    """
    return partial(TypeAdapter(of).validate_json, strict=True, extra="forbid")


def by_line(of: Any) -> Callable[[bytes], list[Any]]:
    """Return a parser of a JSON Lines file with one `of`, a type, per line. It names the line that is damaged."""
    parse = whole(of)

    def lines(content: bytes) -> list[Any]:
        found = []
        for number, line in enumerate(content.splitlines(), 1):
            with in_line(number):
                found.append(parse(line))
        return found

    return lines


@contextmanager
def in_line(number: int) -> Iterator[None]:
    """Add the number of the line to a ValueError of the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"line {number}: {reason(error)}") from error


def read(filesystem: AbstractFileSystem, path: str, url: str, file: File[T], errors: Errors) -> T | None:
    """Return what a file holds; None if there is none. Raises OutputError, which names `url`, if it is damaged."""
    with errors():
        try:
            # The size first, so that a file that is far too large is never in memory.
            size = cast(int, filesystem.size(path))
            content = cast(bytes, filesystem.cat_file(path)) if size <= file.limit else None
        except FileNotFoundError:
            return None
    with as_written(url, file.remedy):
        if content is None:
            raise ValueError(f"{size} bytes, more than the {file.limit} that are read")
        return file.parse(content)


def stored(run: str, storage: StorageSpec, file: File[T], errors: Errors | None = None) -> T | None:
    """Return what a file in a run's folder holds; None if there is none.

    Raises OutputError if it is damaged. If the store fails, raises what `errors` makes of that, by default DataError.
    """
    url = join(run, file.name)
    errors = errors or partial(store_errors, url, storage)
    with errors():
        filesystem, path = open_store(url, storage)
    return read(filesystem, path, url, file, errors)


def required(run: str, storage: StorageSpec, file: File[T]) -> T:
    """Return what a file in a run's folder holds. Raises as `stored`, and OutputError if there is no such file."""
    found = stored(run, storage, file)
    if found is None:
        raise OutputError(
            f"{join(run, file.name)}: no such file. Give the folder of a run, which is output.path/name of its spec."
        )
    return found


SPEC_FILE = File(SPEC, JobSpec.model_validate_json, ANOTHER_NAME)


def stored_spec(run: str, storage: StorageSpec) -> JobSpec:
    """Return the spec of a run. Raises OutputError if there is none, or if it is damaged."""
    return required(run, storage, SPEC_FILE)


@contextmanager
def as_written(url: str, remedy: str) -> Iterator[None]:
    """Raise a ValueError of the block as OutputError: the file is not as a job writes it."""
    try:
        yield
    except ValueError as error:
        raise OutputError(f"{url}: is not what a job of this version writes ({reason(error)}). {remedy}") from error


def reason(error: ValueError) -> str:
    """Return in a few words why a content is refused: of several faults the first, with its place."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    place = beginning(".".join(map(str, first["loc"])))
    return f"{place}: {first['msg']}" if place else first["msg"]


def beginning(text: str) -> str:
    """Return at most 80 characters: a name in a damaged file may have a megabyte."""
    return text if len(text) <= 80 else f"{text[:77]}..."


def write_text(url: str, storage: StorageSpec, text: str) -> None:
    """Write a file whole. Raises DataError if the store fails."""
    with store_errors(url, storage):
        filesystem, path = open_store(url, storage)
        replace_file(filesystem, path, text.encode())
