"""SIGTERM handling. `ray job stop`, the eviction of a pod and the draining of a node send SIGTERM to the driver.

A signal handler runs in the middle of whatever the main thread does. An exception that it raises there may come up
inside of compiled code, such as Ray's, which turns it into a SystemError or loses it. So while a job is connected to
Ray, the handler only sets a flag (`StopRequest`), and every wait that may be long looks at the flag.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from betakd_ray.errors import BetaKDError, Interrupted

POLL_S = 0.5
"""Seconds after which a wait looks again whether it is to stop."""


class StopRequest:
    """A request to stop. It is made by a signal handler or another thread, and found by waits.

    A plain attribute, and not a threading.Event: the code that a handler interrupts may hold the lock of an Event.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        self.is_made = False
        self.failure: BetaKDError | None = None
        """Error that ends the job at once: there is nothing to save, or no right to."""

    def make(self) -> None:
        """Ask to stop. Safe in a signal handler."""
        self.is_made = True

    def fail(self, error: BetaKDError) -> None:
        """Ask to end with this error."""
        self.failure = error

    def withdraw(self) -> None:
        """Ask no more."""
        self.is_made, self.failure = False, None

    def check(self) -> None:
        """Raise the failure, or Interrupted if the request is made."""
        if self.failure:
            raise self.failure
        if self.is_made:
            raise Interrupted(self._message)

    def pause(self, seconds: float) -> None:
        """Sleep. Raises Interrupted soon after the request is made."""
        deadline = time.monotonic() + seconds
        self.check()
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, POLL_S))
            self.check()

    def wait_until(self, is_done: Callable[[float], bool]) -> None:
        """Wait until `is_done(timeout_s)`, which waits for up to `timeout_s`, returns true. Raises as `pause`."""
        self.check()
        while not is_done(POLL_S):
            self.check()


@contextmanager
def on_sigterm(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on the first SIGTERM in the block; a second SIGTERM goes to the previous handler.

    `stop` should do no more than `StopRequest.make`.
    """
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
        except BaseException as ended:
            # A SIGTERM during the block ran Ray's handler: send it again, to the handler that was set before.
            if before is None or not _is_exit(ended, signal.SIGTERM):
                raise
            signal.signal(signal.SIGTERM, before)
            signal.raise_signal(signal.SIGTERM)
            # For a handler that returns: Ray is not connected, so nothing after the block could go on.
            raise Interrupted("was asked to stop while it connected to Ray. Run it again to go on.") from ended


@contextmanager
def answering_sigterm() -> Iterator[None]:
    """End the process with exit code 75 (EX_TEMPFAIL, "run it again") on a SIGTERM that no other handler takes.

    After the block SIGTERM is ignored, so that it cannot change the exit code while Ray and Python shut down.
    """
    is_asked = False

    def end(*_: Any) -> None:
        nonlocal is_asked
        if is_asked:  # the exception of the first one did not get through
            os._exit(os.EX_TEMPFAIL)
        is_asked = True
        print("betakd: was asked to stop. Run it again to go on.", file=sys.stderr)
        raise SystemExit(os.EX_TEMPFAIL)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException as error:
        # Compiled code may have made another exception of it.
        if is_asked and _is_exit(error, os.EX_TEMPFAIL):
            raise SystemExit(os.EX_TEMPFAIL) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _is_exit(error: BaseException | None, code: int) -> bool:
    """Return whether an exception is, or was caused by, a SystemExit with this code."""
    while error is not None:
        if isinstance(error, SystemExit) and error.code == code:
            return True
        error = error.__cause__ or error.__context__
    return False


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
