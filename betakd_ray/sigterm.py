"""Requests to stop by a signal: SIGTERM, and SIGINT, which Ctrl-C sends.

`ray job stop`, the eviction of a pod and the draining of a node send SIGTERM to the driver. A second Ctrl-C ends a
command at once.

A signal handler runs in the middle of whatever the main thread does. An exception that it raises there may come up
inside of compiled code, such as Ray's, which turns it into a SystemError or loses it. So while a job is connected to
Ray, the handler only sets a flag (`StopRequest`), and every wait that may be long looks at the flag.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from betakd_ray.errors import BetaKDError, Interrupted

STDERR = 2
"""File descriptor of standard error."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask to stop."""
ENDED_AT_ONCE = 128 + signal.SIGINT
"""Exit code after a second Ctrl-C, as of any program that SIGINT ends."""
POLL_S = 0.5
"""Seconds after which a wait looks again whether it is to stop."""


class StopRequest:
    """A request to stop. It is made by a signal handler or another thread, and found by waits.

    A plain attribute, and not a threading.Event: the code that a handler interrupts may hold the lock of an Event.
    """

    def __init__(self, message: str) -> None:
        self.message = message
        """Text of the Interrupted that is raised."""
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
            raise Interrupted(self.message)

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
    """Call `stop` on the first SIGTERM or SIGINT in the block; a second one goes to the previous handler.

    `stop` should do no more than `StopRequest.make`.
    """
    with _restored(*SIGNALS) as before:

        def handle(*_: Any) -> None:
            for number, handler in before.items():
                signal.signal(number, handler)
                if isinstance(handler, _CtrlC):
                    handler.is_asked = True  # the next Ctrl-C is the second one
            stop()

        for number in before:
            signal.signal(number, handle)
        yield


@contextmanager
def kept_sigterm() -> Iterator[None]:
    """Keep the SIGTERM handler that was set before the block.

    `ray.init` replaces it for good by one that exits with code 15.
    """
    with _restored(signal.SIGTERM) as before:
        try:
            yield
        except BaseException as ended:
            # A SIGTERM during the block ran Ray's handler: send it again, to the handler that was set before.
            if not before or not _is_exit(ended, signal.SIGTERM):
                raise
            signal.signal(signal.SIGTERM, before[signal.SIGTERM])
            signal.raise_signal(signal.SIGTERM)
            # For a handler that returns: Ray is not connected, so nothing after the block could go on.
            raise Interrupted("was asked to stop while it connected to Ray. Run it again to go on.") from ended


@contextmanager
def answering_sigterm() -> Iterator[None]:
    """End the process with exit code 75 (EX_TEMPFAIL) on a SIGTERM or SIGINT that no other handler takes.

    After the block SIGTERM is ignored, and SIGINT ends the process at once with the exit code that it would have had:
    neither can change the exit code while Ray and Python shut down.
    """
    is_asked = False

    def end(*_: Any) -> None:
        nonlocal is_asked
        if is_asked:  # the exception of the first one did not get through
            os._exit(os.EX_TEMPFAIL)
        is_asked = True
        _say("was asked to stop, with nothing to save. Run it again to go on.")
        raise SystemExit(os.EX_TEMPFAIL)

    code = 1
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, _CtrlC(end))
    try:
        yield
        code = 0
    except BaseException as error:
        # Compiled code may have made another exception of it.
        if is_asked and _is_exit(error, os.EX_TEMPFAIL):
            code = os.EX_TEMPFAIL
            raise SystemExit(code) from error
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else code
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, lambda *_: os._exit(code))


class _CtrlC:
    """Handler of SIGINT of a command: the first one asks it to stop, the second one ends it at once."""

    def __init__(self, stop: Callable[..., None]) -> None:
        self._stop = stop
        self.is_asked = False
        """True if a job has taken the first one."""

    def __call__(self, *_: Any) -> None:
        if not self.is_asked:
            self.is_asked = True
            self._stop()
            return
        _say("ended at once. What was committed before is whole: the same command goes on from the last checkpoint.")
        os._exit(ENDED_AT_ONCE)


def _say(text: str) -> None:
    """Write a line to standard error in a signal handler, in which `print` could find the stream in use.

    A live display may have hidden the cursor: it is shown again.
    """
    cursor = "\x1b[?25h" if os.isatty(STDERR) else ""
    os.write(STDERR, f"{cursor}betakd: {text}\n".encode())


def _is_exit(error: BaseException | None, code: int) -> bool:
    """Return whether an exception is, or was caused by, a SystemExit with this code."""
    while error is not None:
        if isinstance(error, SystemExit) and error.code == code:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _restored(*numbers: signal.Signals) -> Iterator[dict[signal.Signals, Any]]:
    """Yield the present handlers by signal, and set them again after the block.

    A handler that cannot be set again is left out: it was not set from Python, or this is not the main thread.
    """
    is_main = threading.current_thread() is threading.main_thread()
    present = {number: signal.getsignal(number) for number in numbers} if is_main else {}
    before = {number: handler for number, handler in present.items() if handler is not None}
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
