"""Metrics of a run as they are stored, and how they are read.

Object stores cannot append to a file. So metrics are written in parts, metrics/NUMBER-TOKEN-ATTEMPT.jsonl. Each part
has the records since the part before it. When the job is done, the parts are joined into metrics.jsonl. Every attempt
at a run begins with a line `{"resumed_after": step}`: records of earlier attempts after that step do not count, because
these steps are done again. Read metrics only through `read_metrics` or `stream_metrics`, which apply these rules.
`betakd_ray.tracking` writes.
"""

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Annotated, Any, NamedTuple

from fsspec.spec import AbstractFileSystem
from pydantic import AfterValidator, Field

from betakd_ray.run.files import File, as_written, by_line, in_line, read, whole
from betakd_ray.run.folder import METRICS, METRICS_PARTS
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join, open_store

MetricsRecord = dict[str, Any]
Number = Annotated[int, Field(gt=-(1 << 63), lt=1 << 63)] | float
"""Number of a record. It may be NaN or infinite, as a loss may be."""
RESUMED = "resumed_after"
MAX_LINE_BYTES = 1 << 20
"""Limit in bytes of one record."""
_PART = re.compile(r"(\d{8})-((?:(\d+)-)?[0-9a-f]+)\.jsonl")
_READERS = 16
_BLOCK_BYTES = 1 << 20
_PARTS_REMEDY = "Remove this line, or the file: only its numbers are lost, and the training does not depend on them."
_WHOLE_REMEDY = f"If the run has parts in {METRICS_PARTS}/, remove this file: they are read instead. Else restore it."


def _with_step(record: MetricsRecord) -> MetricsRecord:
    step = record.get(RESUMED if len(record) == 1 else "step", record.get("step"))
    if (RESUMED in record and len(record) > 1) or not isinstance(step, int) or step < 0:
        raise ValueError("step is missing, or is not the number of a step")
    return record


def _parsed_part(content: bytes) -> list[MetricsRecord]:
    records = _LINES(content)
    for number, record in enumerate(records[1:], 2):
        _require_record(number, record)
    return records


def _require_record(number: int, record: MetricsRecord) -> None:
    if "step" not in record:
        raise ValueError(f"line {number}: {RESUMED} is only in the first line of an attempt")


_RECORD = Annotated[dict[str, Number], AfterValidator(_with_step)]
_LINE, _LINES = whole(_RECORD), by_line(_RECORD)
_PART_FILE: File[list[MetricsRecord]] = File("part", _parsed_part, _PARTS_REMEDY)


class Part(NamedTuple):
    """A part of the metrics; parts are sorted by token, then by number and attempt."""

    token: int
    """Token of the driver (`run.lease`); 0 in parts of versions that had none. What a driver writes that was replaced
    comes before what its successor has written, whenever that is.
    """
    number: int
    attempt: str
    path: str


def read_metrics(run: str, storage: StorageSpec | None = None) -> list[MetricsRecord]:
    """Return the records of a run that count, in order; [] if there are none. The run may still be going on.

    Raises OSError if the store fails, and OutputError if a file is damaged.
    """
    return list(stream_metrics(*open_store(run, storage)))


def newest_records(filesystem: AbstractFileSystem, root: str, count: int) -> list[MetricsRecord]:
    """Return the last `count` records of a run that count, in order. While a run goes on, only a few files are read."""
    if filesystem.exists(join(root, METRICS)):
        return list(deque(stream_metrics(filesystem, root), maxlen=count))
    parts = parts_of(filesystem, root)
    limits = _limits(filesystem, parts)
    found: list[MetricsRecord] = []
    for part in reversed([part for part in parts if part in limits]):
        records = _read_part(filesystem, part)
        found = [each for each in records if RESUMED not in each and each["step"] <= limits[part]] + found
        if len(found) >= count:
            break
    return found[-count:]


def stream_metrics(filesystem: AbstractFileSystem, root: str) -> Iterator[MetricsRecord]:
    """Yield what `read_metrics` returns, for the run at `root`. Only a few files are in memory at a time."""
    path = join(root, METRICS)
    try:
        joined = filesystem.open(path, "rb")
    except FileNotFoundError:
        yield from stream_parts(filesystem, root)
        return
    with joined:
        yield from _records_of(joined, path)


def stream_parts(filesystem: AbstractFileSystem, root: str) -> Iterator[MetricsRecord]:
    """Yield the records of the parts that count, also if metrics.jsonl is there."""
    parts = parts_of(filesystem, root)
    limits = _limits(filesystem, parts)
    counted = [part for part in parts if part in limits]
    with ThreadPoolExecutor(_READERS) as pool:
        # Some at a time: `map` starts all of its work at once, and would hold every part that is read.
        for at in range(0, len(counted), _READERS):
            batch = counted[at : at + _READERS]
            for part, records in zip(batch, pool.map(partial(_read_part, filesystem), batch), strict=True):
                yield from (each for each in records if RESUMED not in each and each["step"] <= limits[part])


def _limits(filesystem: AbstractFileSystem, parts: list[Part]) -> dict[Part, float]:
    """Return the last step that counts of each part that counts.

    A part of an earlier attempt that stands behind the start of a later one does not count: it comes from a process
    that was given up and still writes.
    """
    first = {part.attempt: part for part in reversed(parts)}
    resumed: dict[str, float] = {}
    for attempt, part in first.items():
        records = _read_part(filesystem, part)
        if records and RESUMED in records[0]:
            resumed[attempt] = records[0][RESUMED]
    current, counted = "", list[Part]()
    for part in parts:
        if part.attempt in resumed and part == first[part.attempt]:
            current = part.attempt
        if part.attempt == current:
            counted.append(part)
    limits, limit = dict[Part, float](), float("inf")
    for part in reversed(counted):
        limits[part] = limit
        if part == first[part.attempt]:
            limit = min(limit, resumed[part.attempt])
    return limits


def _read_part(filesystem: AbstractFileSystem, part: Part) -> list[MetricsRecord]:
    records = read(filesystem, part.path, part.path, _PART_FILE, nullcontext)
    if records is None:
        raise FileNotFoundError(f"{part.path}: was listed, and is gone")
    return records


def _records_of(file: Any, path: str) -> Iterator[MetricsRecord]:
    """Yield the records of an open metrics.jsonl."""
    for number, line in enumerate(_lines_of(file, path), 1):
        with as_written(path, _WHOLE_REMEDY), in_line(number):
            record = _LINE(line)
            _require_record(number, record)
        yield record


def _lines_of(file: Any, path: str) -> Iterator[bytes]:
    rest = b""
    while block := file.read(_BLOCK_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
        if len(rest) > MAX_LINE_BYTES:
            with as_written(path, _WHOLE_REMEDY):
                raise ValueError(f"a line of more than {MAX_LINE_BYTES} bytes")
    if rest:
        yield rest


def parts_of(filesystem: AbstractFileSystem, root: str) -> list[Part]:
    """Return the parts of the metrics, in order."""
    paths = filesystem.find(join(root, METRICS_PARTS))
    named = [(_PART.fullmatch(path.rpartition("/")[2]), path) for path in paths]
    return sorted(Part(int(match[3] or 0), int(match[1]), match[2], path) for match, path in named if match)


def to_jsonl(records: Iterable[MetricsRecord]) -> str:
    """Return records as JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def from_jsonl(text: str) -> list[MetricsRecord]:
    """Return the records of JSON lines: the inverse of `to_jsonl`."""
    return [json.loads(line) for line in text.splitlines()]
