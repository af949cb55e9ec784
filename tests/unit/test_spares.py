"""When a worker asks for a spare process, and what the new process imports."""

import logging
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import ray

from betakd_ray.on_ray import spares
from betakd_ray.on_ray.spares import HOOK, MODULES, importing, keep_spare


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Yield the list of the requests that this process has sent to its node."""
    requests: list[str] = []
    monkeypatch.setenv(MODULES, "torch")
    monkeypatch.setattr(spares, "_has_asked", threading.Lock())
    monkeypatch.setattr(spares, "_first_call", lambda: -spares.SETTLED_S)
    monkeypatch.setattr(spares, "_ask_for_one", lambda: requests.append("one"))
    return requests


@pytest.mark.parametrize(("at_work", "spare", "asks"), [(1, 0, 1), (1, 1, 0), (2, 1, 1), (2, 2, 0), (1, 3, 0)])
def test_a_node_has_as_many_spare_processes_as_it_has_at_work(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, at_work: int, spare: int, asks: int
) -> None:
    monkeypatch.setattr(spares, "processes_like_this", lambda: ([0] * at_work, [0] * spare))
    for _ in range(3):
        keep_spare()
    assert len(asked) == asks


def test_a_process_that_has_just_begun_asks_for_none(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "processes_like_this", lambda: ([0], []))
    begun = time.monotonic()
    monkeypatch.setattr(spares, "_first_call", lambda: begun)
    keep_spare()
    assert not asked
    monkeypatch.setattr(spares, "_first_call", lambda: begun - spares.SETTLED_S)
    keep_spare()
    assert asked


def test_a_process_without_modules_asks_for_none(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MODULES)
    keep_spare()
    assert not asked


def test_a_node_that_does_not_answer_is_no_reason_to_end(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone() -> None:
        raise ConnectionError("no raylet")

    monkeypatch.setattr(spares, "processes_like_this", gone)
    with caplog.at_level(logging.WARNING):
        keep_spare()
    assert "no raylet" in caplog.text


def test_a_setup_hook_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    own: dict[str, str] = {}
    context = SimpleNamespace(runtime_env=SimpleNamespace(env_vars=lambda: own))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    assert importing("torch", "numpy")[MODULES] == "torch,numpy"
    own[HOOK] = "their.hook"
    assert importing("torch") == {}


def test_the_imports_open_no_gpu() -> None:
    """A spare process starts before Ray has chosen its GPUs: once CUDA is open, the choice would be ignored."""
    code = """
import os, torch
def opened(*_):
    raise SystemExit("CUDA was opened")
torch.cuda._lazy_init = torch.cuda.init = opened
from betakd_ray.on_ray.spares import import_modules
import_modules()
import sys
assert all(module in sys.modules for module in os.environ["BETAKD_MODULES"].split(","))
"""
    modules = "betakd_ray.train.loop,betakd_ray.teacher.scorer"
    environment = spares.os.environ | {MODULES: modules, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
