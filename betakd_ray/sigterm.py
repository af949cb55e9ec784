"""SIGTERM: what `ray job stop`, an evicted pod and a node that is drained send to a driver."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def on_sigterm(stop: Callable[[], None]) -> Iterator[None]:
    """A SIGTERM calls `stop`; a second one does what it did before."""
    with _restored() as before:
        if before is not None:

            def handle(*_: Any) -> None:
                signal.signal(signal.SIGTERM, before)
                stop()

            signal.signal(signal.SIGTERM, handle)
        yield


@contextmanager
def kept_sigterm() -> Iterator[None]:
    """`ray.init` has a SIGTERM exit with code 15, from then on for good. Here it goes to whom it went to before."""
    with _restored() as before:
        try:
            yield
        except SystemExit as ended:
            if before is None or ended.code != signal.SIGTERM:
                raise
            signal.signal(signal.SIGTERM, before)
            signal.raise_signal(signal.SIGTERM)
            raise


@contextmanager
def answering_sigterm() -> Iterator[None]:
    """Let a SIGTERM end the process with exit code 75 (run me again), unless another handler takes it.

    After the block, SIGTERM is ignored, so that it cannot change the exit code while Ray and Python shut down.
    """

    def end(*_: Any) -> None:
        print("betakd: was asked to stop. Run it again to go on.", file=sys.stderr)
        raise SystemExit(os.EX_TEMPFAIL)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _restored() -> Iterator[Any]:
    """The present handler; None where it cannot be set again: not Python's own, or this is not the main thread."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if is_main else None
    try:
        yield before
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
