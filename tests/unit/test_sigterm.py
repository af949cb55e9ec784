"""A SIGTERM or Ctrl-C at any time while a driver runs."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from betakd_ray.errors import ClusterError, Interrupted, RunTaken
from betakd_ray.on_ray.cluster import connected
from betakd_ray.sigterm import ENDED_AT_ONCE, SIGNALS, StopRequest, kept_sigterm, on_sigterm

ENTRY_POINT = """
import atexit, sys, time
from betakd_ray.cli import job

def wait():
    print("here", flush=True)
    time.sleep(20)

def at_work(spec, overrides):
    wait()

def done(spec, overrides):
    atexit.register(wait)

job(globals()[sys.argv.pop(1)])
"""


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """Yield the list of the SIGTERMs that reach this process's earlier handler."""
    said: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: said.append("before"))
    yield said
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("where", "code"), [("at_work", os.EX_TEMPFAIL), ("done", 0)])
def test_a_driver_says_whether_it_is_to_be_run_again(where: str, code: int, number: signal.Signals) -> None:
    """The same holds while no job handles signals: while its modules load, and while the interpreter ends."""
    command = [sys.executable, "-c", ENTRY_POINT, where, "--spec", "job.yaml"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
        assert driver.stdout
        assert driver.stdout.readline() == "here\n"
        driver.send_signal(number)
        if not code and number == signal.SIGTERM:  # it is deaf, and would sleep on
            with pytest.raises(subprocess.TimeoutExpired):
                driver.wait(timeout=1)
            driver.send_signal(signal.SIGINT)
        _, said = driver.communicate(timeout=60)
    assert driver.returncode == code
    assert ("Run it again" in said) == bool(code)


TWICE = """
import os, signal, sys, time
from betakd_ray.sigterm import answering_sigterm, on_sigterm

with answering_sigterm(), on_sigterm(lambda: print("saving", flush=True)):
    print("here", flush=True)
    while True:
        time.sleep(1)
"""


def test_a_second_ctrl_c_ends_a_job_at_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TWICE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout
        for expected in ("here\n", "saving\n"):
            assert driver.stdout.readline() == expected
            driver.send_signal(signal.SIGINT)
        _, said = driver.communicate(timeout=60)
    assert driver.returncode == ENDED_AT_ONCE
    assert said.startswith("betakd: ended at once.")


def test_ctrl_c_in_a_program_of_one_s_own_saves_first_and_the_second_is_python_s() -> None:
    stop = StopRequest("stopped")
    # Where the tests run in the background of a shell, SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with on_sigterm(stop.make):
            signal.raise_signal(signal.SIGINT)
            assert stop.is_made
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_one_does_what_the_first_would_have_done_without_us(heard: list[str]) -> None:
    with on_sigterm(lambda: heard.append("ours")):
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert heard == ["ours", "before", "before"]


@pytest.fixture
def rays_handler(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a fake `ray.init` that does what Ray does with SIGTERM; a signal may come `meanwhile`."""
    how = SimpleNamespace(meanwhile=False)

    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        if how.meanwhile:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", nullcontext)
    return how


def test_a_connection_to_ray_leaves_sigterm_to_us(heard: list[str], rays_handler: SimpleNamespace) -> None:
    spec = SimpleNamespace(cluster=SimpleNamespace(address="127.0.0.1:6379"))
    with connected(spec):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert heard == ["before", "before"]


def test_a_ray_that_does_not_start_is_a_user_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with (
        pytest.raises(ClusterError, match="no Ray cluster answers at 127"),
        connected(SimpleNamespace(cluster=SimpleNamespace(address="127.0.0.1:6379"))),
    ):
        pass


def test_one_that_comes_while_we_connect_is_ours_too(heard: list[str], rays_handler: SimpleNamespace) -> None:
    rays_handler.meanwhile = True
    with pytest.raises(Interrupted), kept_sigterm():
        ray.init()
    assert heard == ["before"]


def test_one_that_compiled_code_turned_into_another_error_is_still_one(heard: list[str]) -> None:
    def connect() -> None:
        try:
            sys.exit(signal.SIGTERM)
        except SystemExit as ended:
            raise SystemError("returned a result with an exception set") from ended

    with pytest.raises(Interrupted), kept_sigterm():
        connect()
    with pytest.raises(SystemError), kept_sigterm():
        raise SystemError("of its own")
    assert heard == ["before"]


IN_COMPILED_CODE = """
import os, signal
from betakd_ray.sigterm import answering_sigterm

with answering_sigterm():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit as ended:
        {then}
"""


@pytest.mark.parametrize(
    ("then", "code"),
    [
        ("raise SystemError('returned a result with an exception set') from ended", os.EX_TEMPFAIL),
        ("os.kill(os.getpid(), signal.SIGTERM); raise AssertionError('the second one did not end it')", os.EX_TEMPFAIL),
        ("pass", 0),  # the work was done all the same
    ],
)
def test_a_driver_whose_first_signal_got_lost_still_answers(then: str, code: int) -> None:
    driver = subprocess.run([sys.executable, "-c", IN_COMPILED_CODE.format(then=then)], check=False, timeout=60)
    assert driver.returncode == code


# ------------------------------------------------------------------------------------------- a request to stop


def test_a_handler_only_sets_a_flag_and_every_wait_finds_it() -> None:
    request = StopRequest("stopped")
    waits: dict[str, Any] = {
        "check": request.check,
        "pause": lambda: request.pause(3600.0),
        "wait_until": lambda: request.wait_until(lambda timeout_s: time.sleep(timeout_s) or False),
    }
    request.pause(0.0)
    request.wait_until(lambda timeout_s: True)
    for number, wait in product(SIGNALS, waits.values()):
        request.withdraw()
        request.check()
        with on_sigterm(request.make):
            timer = threading.Timer(0.1, os.kill, (os.getpid(), number))
            timer.start()
            timer.join()
            with pytest.raises(Interrupted, match="stopped"):
                wait()


def test_a_failure_is_raised_before_a_request_to_stop() -> None:
    request = StopRequest("stopped")
    request.make()
    request.fail(RunTaken("another driver"))
    with pytest.raises(RunTaken):
        request.pause(3600.0)
