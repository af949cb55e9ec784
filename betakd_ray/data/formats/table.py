"""Tables: CSV and TSV with a header, or without one in the order path, question, answer."""

import csv
import io
import re
from collections.abc import Iterator
from typing import Any

from betakd_ray.data.conversations import ANSWERS, CAPTIONS, QUESTIONS
from betakd_ray.data.files import opened
from betakd_ray.data.media import IMAGE_KEYS, STILL
from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec

_IMAGE_FILE = re.compile(rf".+\.(?:{'|'.join(STILL)})", re.IGNORECASE)
_BARE = {2: ("image", "caption"), 3: ("image", "question", "answer")}
"""Number of columns → their names, for a table without a header."""
_PATHS = ("path", "file", "filepath", "file_path", "image_name")
"""Names of a column that a table has for its image, beside those of `IMAGE_KEYS`."""


def rows(location: str, storage: StorageSpec) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a table as records. Raises DataError if it is no text or has no rows."""
    with opened(location, storage) as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{location}: is not UTF-8 at byte {error.start}. Save it as UTF-8 (in a spreadsheet: CSV UTF-8)."
        ) from error
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(location, text))
    try:
        yield from _records(location, lines)
    except csv.Error as error:
        raise DataError(f"{location}, line {lines.line_num}: is no table: {error}.") from error


def _delimiter(location: str, text: str) -> str:
    header = text.partition("\n")[0]
    if location.lower().endswith(".tsv") or ("\t" in header and "," not in header):
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def _records(location: str, lines: Iterator[list[str]]) -> Iterator[tuple[str, Any]]:
    first = next((line for line in lines if any(line)), None)
    if first is None:
        raise DataError(f"{location}: is empty; expected columns such as image, question and answer.")
    names, number = [_named(cell) for cell in first], 0
    if not _is_header(names):
        names = list(_BARE.get(len(first), ()))
        if not names or not _IMAGE_FILE.fullmatch(first[0].strip()):
            raise DataError(
                f"{location}: its first line {first[:5]} names no column that is known. Expected a header with image, "
                "question and answer, or --map question=COLUMN,answer=COLUMN,image=COLUMN; without a header the "
                "columns are path, question, answer."
            )
        number = 1
        yield f"{location}, row 1", _record(names, first)
    for line in lines:
        if any(line):
            number += 1
            yield f"{location}, row {number}", _record(names, line)


def _is_header(names: list[str]) -> bool:
    return not any(_IMAGE_FILE.fullmatch(name) for name in names) and all(names) and len(set(names)) == len(names)


def _named(cell: str) -> str:
    name = cell.strip()
    lower = name.lower()
    known = {*IMAGE_KEYS, *QUESTIONS, *ANSWERS, *CAPTIONS, "id", "system"}
    return "image" if lower in _PATHS else lower if lower in known else name


def _record(names: list[str], line: list[str]) -> dict[str, Any] | str:
    """Return a row's record; a text that says what is wrong with a row of another length."""
    if len(line) != len(names):
        return f"the row has {len(line)} cells, but the table has {len(names)} columns ({', '.join(names)})"
    return {name: cell for name, cell in zip(names, line, strict=True) if cell}
