"""A SIGTERM at any time while a driver runs."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from betakd_ray.on_ray.cluster import connected
from betakd_ray.sigterm import kept_sigterm, on_sigterm

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


@pytest.mark.parametrize(("where", "code"), [("at_work", os.EX_TEMPFAIL), ("done", 0)])
def test_a_driver_says_whether_it_is_to_be_run_again(where: str, code: int) -> None:
    """The same holds while no job handles signals: while its modules load, and while the interpreter ends."""
    command = [sys.executable, "-c", ENTRY_POINT, where, "--spec", "job.yaml"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
        assert driver.stdout
        assert driver.stdout.readline() == "here\n"
        driver.terminate()
        if not code:  # it is deaf, and would sleep on
            with pytest.raises(subprocess.TimeoutExpired):
                driver.wait(timeout=1)
            driver.send_signal(signal.SIGINT)
        _, said = driver.communicate(timeout=60)
    assert driver.returncode == code
    assert ("Run it again" in said) == bool(code)


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


def test_one_that_comes_while_we_connect_is_ours_too(heard: list[str], rays_handler: SimpleNamespace) -> None:
    rays_handler.meanwhile = True
    with pytest.raises(SystemExit), kept_sigterm():
        ray.init()
    assert heard == ["before"]
