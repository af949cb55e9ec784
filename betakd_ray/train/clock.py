"""Time that a rank spends in each phase of a step, in seconds. On a GPU it is measured without blocking the host."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("forward_backward", "optimizer", "evaluate", "save", "log")
"""Phases of the training itself. In the rest of its time it waits for the feed (`STALLS`)."""
STALLS = ("data_wait", "teacher_wait", "collate", "agree", "copy")
"""Activities of the feed while the training waits for it."""


class StepClock:
    """Seconds of each phase and stall since the last `read`.

    On a GPU, forward, backward and optimizer are measured with CUDA events on the training's stream. The host runs
    ahead of the device, so its clock would show only the time to launch the kernels. `read` waits for the events, but
    only when a record is made, long after they have happened.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._stalls: dict[str, float] = dict.fromkeys(STALLS, 0.0)
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to a phase; `name` is one of `PHASES`."""
        on_device = self._is_cuda and name in ("forward_backward", "optimizer")
        begun = time.perf_counter()
        start = _event() if on_device else None
        try:
            yield
        finally:
            if start is not None:
                self._events.append((name, start, _event()))
            else:
                self._seconds[name] += time.perf_counter() - begun

    def stalled(self, seconds: dict[str, float], *, within: str = "") -> None:
        """Add the seconds that the training waited for its feed, by cause (`STALLS`).

        `within` names the phase in which it waited, if any; on a CPU those seconds are taken off that phase.
        """
        for cause, duration in seconds.items():
            self._stalls[cause] += duration
            # On a GPU the phase is measured on the device, so the host's waiting is not part of it.
            if within and not self._is_cuda:
                self._seconds[within] -= duration

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase and stall, and in all ("elapsed"), since the last call; reset them."""
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1e3  # from milliseconds
        now = time.perf_counter()
        seconds = {**self._seconds, **self._stalls, "elapsed": now - self._since}
        self._seconds, self._stalls = dict.fromkeys(PHASES, 0.0), dict.fromkeys(STALLS, 0.0)
        self._events, self._since = [], now
        return seconds


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
