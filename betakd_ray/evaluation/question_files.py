"""Files of benchmarks, in a folder on disk or in object storage: found under their public names, read and checked."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import ValidationError

from betakd_ray.data.files import opened, store_errors
from betakd_ray.errors import DataError, shortened
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join, open_store

T = TypeVar("T")


@dataclass(frozen=True)
class DataFolder:
    """A folder with a benchmark's files, or one with the folders of several benchmarks."""

    url: str
    storage: StorageSpec = StorageSpec()
    inside: tuple[str, ...] = ()
    """Folders in it where the files may be, besides itself."""

    def of(self, inside: Sequence[str]) -> "DataFolder":
        """Return the same folder, whose files may also be in the folders `inside` it."""
        return replace(self, inside=tuple(inside))

    def find(self, *names: str, source: str) -> str:
        """Return path or URL of the first of `names` that is there, a file or a folder.

        Raises DataError, which names `source` as the place to get it from, if none is there.
        """
        found = self.look_for(*names)
        if found is None:
            places = ", ".join(self.inside)
            raise DataError(
                f"{self.url}: has no {' or '.join(names)}" + (f", also not in {places}" if places else "")
                + f". It comes from {source}."
            )  # fmt: skip
        return found

    def look_for(self, *names: str) -> str | None:
        """Return path or URL of the first of `names` that is there; None if none is."""
        for name in names:
            for folder in ("", *self.inside):
                url = join(self.url, *filter(None, (folder, name)))
                with store_errors(url, self.storage):
                    filesystem, path = open_store(url, self.storage)
                    if filesystem.exists(path):
                        return url
        return None

    def read(self, url: str) -> bytes:
        with opened(url, self.storage) as file:
            return file.read()

    def text(self, url: str) -> str:
        """Return the content of a UTF-8 file. Raises DataError if it is in another encoding."""
        return decoded(self.read(url), url)

    def texts(self, url: str, ending: str) -> dict[str, str]:
        """Return the content of each file under a folder whose name has this ending, by its path in the folder."""
        with store_errors(url, self.storage):
            filesystem, root = open_store(url, self.storage)
            paths = [path for path in filesystem.find(root) if path.endswith(ending)]
            # All at once, because a store takes long to answer each of a thousand requests.
            contents = filesystem.cat_ranges(paths, None, None, on_error="raise")
        names = [path[len(root.rstrip("/")) + 1 :] for path in paths]
        return {name: decoded(content, join(url, name)) for name, content in zip(names, contents, strict=True)}

    def json(self, url: str, read: Callable[[bytes], T]) -> T:
        """Return what `read`, e.g. a TypeAdapter's validate_json, makes of a file. Raises DataError if it refuses."""
        return parsed(self.text(url).encode(), read, url)

    def json_lines(self, url: str, read: Callable[[bytes], T]) -> list[T]:
        """Return what `read` makes of each line. Raises DataError, which names the line, if it refuses one."""
        return [parsed(line.encode(), read, f"{url}, line {number}") for number, line in lines(self.text(url), url)]


def decoded(content: bytes, url: str) -> str:
    """Return UTF-8 text, without a byte order mark. Raises DataError if it is in another encoding."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{url}: is not UTF-8 text ({error}). Get the file again.") from error


def lines(text: str, url: str) -> Iterator[tuple[int, str]]:
    """Yield number and content of each line. Empty lines at the end do not count; DataError for one between others.

    Only a newline ends a line: JSON may hold other line separators inside its strings.
    """
    for number, line in enumerate(text.rstrip("\r\n \t").split("\n"), start=1):
        if line.strip():
            yield number, line
        elif number > 1 or text.strip():
            raise DataError(f"{url}, line {number}: is empty; expected one JSON object in each line")


def parsed(content: bytes, read: Callable[[bytes], T], where: str) -> T:
    """Return what `read` makes of JSON. Raises DataError, which says `where`, if it is no JSON or lacks a key."""
    try:
        return read(content)
    except ValidationError as error:
        first, count = error.errors(include_url=False)[0], error.error_count()
        at = ".".join(map(str, first["loc"]))
        more = f" (and {count - 1} more)" if count > 1 else ""
        # A key that is missing is not the input at fault.
        seen = "" if first["type"] in ("missing", "json_invalid") else f", found {shortened(first['input'])}"
        raise DataError(
            f"{where}: {at + ': ' if at else ''}{first['msg']}{seen}{more}. Compare the file with the public one."
        ) from error


def with_truth(questions: Sequence[T], truths: Mapping[Any, Any], key: Any, files: str) -> list[Any]:
    """Return the truth of each question. Raises DataError, with count and first question, if some have none."""
    missing = [key(question) for question in questions if key(question) not in truths]
    if missing:
        raise DataError(
            f"{files}: {len(missing)} of {len(questions)} questions have no ground truth, the first "
            f"{shortened(missing[0])}. Take question file and annotations of the same release."
        )
    return [truths[key(question)] for question in questions]


def numbered(keys: Sequence[str]) -> list[str]:
    """Return the keys with a number behind those that came before, so that each is unique."""
    seen: dict[str, int] = {}
    unique = []
    for key in keys:
        seen[key] = seen.get(key, 0) + 1
        unique.append(key if seen[key] == 1 else f"{key}\0{seen[key]}")
    return unique


def json_object(line: str, where: str) -> dict[str, Any]:
    """Return a line as a JSON object. Raises DataError, which says `where`, if it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({error}); expected one JSON object in each line") from error
    if not isinstance(found, dict):
        raise DataError(f"{where}: is {shortened(found)}; expected a JSON object")
    return found
