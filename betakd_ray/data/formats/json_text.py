"""JSON: a list of records, JSON lines, or an object that holds one list of records."""

import json
from collections.abc import Iterator
from typing import Any

from betakd_ray.data.files import opened
from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec


def rows(location: str, storage: StorageSpec) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file. Raises DataError if it is neither a JSON list nor JSON lines."""
    with opened(location, storage) as stream:
        content = stream.read()
    try:
        # utf-8-sig: some editors write a byte order mark, and json refuses it.
        entries = _values(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: is neither a JSON list nor JSON lines: {error}.") from error
    for number, entry in enumerate(entries, 1):
        yield f"{location}, entry {number}", entry


def _values(text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        return json.loads(text)
    # Not splitlines(): it also splits at characters such as U+2028, which a text in JSON may contain.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) > 1 and lines[0][1].strip() == "{":
        return _listed(json.loads(text))
    values = [_line(number, line) for number, line in lines]
    return _listed(values[0]) if len(values) == 1 else values


def _line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _listed(value: Any) -> list[Any]:
    """Return the records of an object that holds one list of them, e.g. {"data": […]}; otherwise it is a record."""
    if isinstance(value, dict):
        lists = [each for each in value.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
        if len(lists) == 1 and not {"from", "role"} & lists[0][0].keys():
            return lists[0]
    return [value]
