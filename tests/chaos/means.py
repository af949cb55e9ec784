"""What faults are made and seen with: a clock that jumps, and a store whose writes are noted."""

import os
import re
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.chaos.hooks.sitecustomize import FILE
from tests.chaos.tally import DAY_S
from tests.s3_proxy import Fault, FaultyS3

HOOKS = Path(__file__).parent / "hooks"
_NOT_STORED = ("slow_down", "error", "reset", "no_bucket")
"""Faults of a request that do not reach the server."""


class Clock:
    """The clock of all Python processes that are started with `environment`. It jumps by whole days.

    So the real time of a record is known: `tally.real_time`.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        if not file.exists():
            file.write_bytes(struct.pack("d", 0.0))

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables with which a process starts under this clock."""
        path = os.pathsep.join(filter(None, [str(HOOKS), os.environ.get("PYTHONPATH")]))
        return {FILE: str(self._file), "PYTHONPATH": path}

    def jump(self, days: int) -> None:
        """Set the clock forward, or back if `days` is negative."""
        with self._file.open("r+b") as file:  # in place: the processes have mapped this file
            (ahead,) = struct.unpack("d", file.read(8))
            file.seek(0)
            file.write(struct.pack("d", ahead + days * DAY_S))


class Commit(NamedTuple):
    """A checkpoint's manifest that was written."""

    time: float
    run: str
    step: int


@dataclass(frozen=True)
class StoredPart:
    """A part of the metrics that was written."""

    time: float
    run: str
    path: str
    """Its path in the store, with the bucket."""


class WatchedS3(FaultyS3):
    """A FaultyS3 that notes the checkpoints and metrics that pass through it, by this process's clock."""

    _COMMIT = re.compile(r"PUT /[^/]+/runs/([^/]+)/checkpoints/step-(\d+)-[^/]+/manifest\.json(?:\?|$)")
    _PART = re.compile(r"PUT /([^/]+/runs/([^/]+)/metrics/[^/?]+\.jsonl)(?:\?|$)")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.commits: list[Commit] = []
        self.parts: list[StoredPart] = []

    def draw(self, request: str) -> Fault | None:
        """Return the fault that the request gets, or None. Note what the server will store."""
        fault = super().draw(request)
        self.requests.clear()  # there are too many in hours
        if fault is None or fault.kind not in _NOT_STORED:
            if commit := self._COMMIT.match(request):
                self.commits.append(Commit(time.time(), commit[1], int(commit[2])))
            elif part := self._PART.match(request):
                self.parts.append(StoredPart(time.time(), part[2], part[1]))
        return fault
