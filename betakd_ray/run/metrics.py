"""Metrics of a run as they are stored, and how they are read.

Object stores cannot append to a file. So metrics are written in parts, metrics/NUMBER-ATTEMPT.jsonl. Each part has the
records since the part before it. When the job is done, the parts are joined into metrics.jsonl. Every attempt at a run
begins with a line `{"resumed_after": step}`: records of earlier attempts after that step do not count, because these
steps are done again. Read metrics only through `read_metrics`, which applies these rules. `betakd_ray.tracking` writes.
"""

import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from fsspec.spec import AbstractFileSystem

from betakd_ray.run.folder import METRICS, METRICS_PARTS
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join, open_store

MetricsRecord = dict[str, Any]
RESUMED = "resumed_after"
_PART = re.compile(r"(\d{8})-([0-9a-f]+)\.jsonl")
_READERS = 16
_WHOLE = ""
"""Attempt name of metrics.jsonl, which has the records of all attempts that count."""


def read_metrics(run: str, storage: StorageSpec | None = None) -> list[MetricsRecord]:
    """Return the records of a run that count, in order; [] if there are none. The run may still be going on.

    Raises OSError if the store fails, and ValueError or LookupError if a file is damaged.
    """
    return parse_metrics(fetch_metrics(run, storage))


def fetch_metrics(run: str, storage: StorageSpec | None = None) -> list[tuple[str, str]]:
    """Return a run's stored metrics as (attempt, lines), for `parse_metrics`: the first half of `read_metrics`."""
    return fetch(*open_store(run, storage))


def parse_metrics(stored: Iterable[tuple[str, str]]) -> list[MetricsRecord]:
    """Return the records of stored (attempt, lines) whose steps no later attempt did again."""
    counted: list[MetricsRecord] = []
    current = _WHOLE
    for attempt, text in stored:
        records = from_jsonl(text)
        if records and RESUMED in records[0]:
            current, after = attempt, records.pop(0)[RESUMED]
            counted = [record for record in counted if record["step"] <= after]
        if attempt == current:  # a part of another attempt comes from a process that was given up and still writes
            counted += records
    return counted


def fetch(filesystem: AbstractFileSystem, root: str) -> list[tuple[str, str]]:
    """Return the stored metrics of a run at `root`, as `fetch_metrics` does."""
    try:
        return [(_WHOLE, cast(bytes, filesystem.cat_file(join(root, METRICS))).decode())]
    except FileNotFoundError:
        return fetch_parts(filesystem, root)


def fetch_parts(filesystem: AbstractFileSystem, root: str) -> list[tuple[str, str]]:
    """Return the metrics in parts as (attempt, lines), in order, also if metrics.jsonl is there."""

    def content(part: tuple[int, str, str]) -> tuple[str, str]:
        _, attempt, path = part
        return attempt, cast(bytes, filesystem.cat_file(path)).decode()

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(content, parts_of(filesystem, root)))


def parts_of(filesystem: AbstractFileSystem, root: str) -> list[tuple[int, str, str]]:
    """Return (number, attempt, path) of each part, in order."""
    paths = filesystem.find(join(root, METRICS_PARTS))
    named = [(_PART.fullmatch(path.rpartition("/")[2]), path) for path in paths]
    return sorted((int(match[1]), match[2], path) for match, path in named if match)


def to_jsonl(records: Iterable[MetricsRecord]) -> str:
    """Return records as JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def from_jsonl(text: str) -> list[MetricsRecord]:
    """Return the records of JSON lines: the inverse of `to_jsonl`."""
    return [json.loads(line) for line in text.splitlines()]
