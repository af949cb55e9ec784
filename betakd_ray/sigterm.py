"""SIGTERM handling. `ray job stop`, the eviction of a pod and the draining of a node send SIGTERM to the driver."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def on_sigterm(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on the first SIGTERM in the block; a second SIGTERM goes to the previous handler."""
    with _restored() as before:
        if before is not None:

            def handle(*_: Any) -> None:
                signal.signal(signal.SIGTERM, before)
                stop()

            signal.signal(signal.SIGTERM, handle)
        yield


@contextmanager
def kept_sigterm() -> Iterator[None]:
    """Keep the SIGTERM handler that was set before the block.

    `ray.init` replaces it for good by one that exits with code 15.
    """
    with _restored() as before:
        try:
            yield
        except SystemExit as ended:
            # A SIGTERM during the block ran Ray's handler: send it again, to the handler that was set before.
            if before is None or ended.code != signal.SIGTERM:
                raise
            signal.signal(signal.SIGTERM, before)
            # The `raise` after it is for a handler that returns, or ignores the signal.
            signal.raise_signal(signal.SIGTERM)
            raise


@contextmanager
def answering_sigterm() -> Iterator[None]:
    """End the process with exit code 75 (EX_TEMPFAIL, "run it again") on a SIGTERM that no other handler takes.

    After the block SIGTERM is ignored, so that it cannot change the exit code while Ray and Python shut down.
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
    """Yield the present handler, and set it again after the block.

    Yields None if it cannot be set again: it was not set from Python, or this is not the main thread.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if is_main else None
    try:
        yield before
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
