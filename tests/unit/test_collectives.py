"""Shared memory of DeepSpeed's collectives has no name once all ranks have it open, whoever is killed before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from betakd_ray import leftovers
from betakd_ray.engine import collectives
from betakd_ray.engine.collectives import BUFFER, named_shared_memory

RANK = """
import pathlib, runpy, sys
with runpy.run_path(sys.argv[2])["owned"](pathlib.Path(sys.argv[1])) as memory:
    memory.write_bytes(bytes(1000))
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in place of /dev/shm; the ranks of this process meet at port 29500."""
    monkeypatch.setattr(collectives, "MEMORY", tmp_path)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    return tmp_path


def name(port: int, rank: int) -> str:
    return f"{BUFFER}_{os.getuid()}_127.0.0.1_{port}_{rank}"


def rank_of(path: Path) -> "subprocess.Popen[str]":
    """Start a rank that has made its memory, and does not come to remove the name."""
    command = [sys.executable, "-c", RANK, str(path), leftovers.__file__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_what_a_killed_rank_left_is_removed_and_nothing_of_a_living_one_or_of_others(memory: Path) -> None:
    dead, living = rank_of(memory / name(29400, 0)), rank_of(memory / name(29401, 0))
    dead.kill()
    dead.communicate()
    unowned = memory / name(29402, 0)  # another program of DeepSpeed's: nobody can tell whether it lives
    unowned.touch()
    assert (memory / name(29400, 0)).exists()
    with named_shared_memory(rank=1):
        (memory / name(29500, 1)).write_bytes(bytes(1000))  # as DeepSpeed does
    assert {path.name for path in memory.iterdir()} == {
        unowned.name,
        name(29401, 0),
        name(29401, 0) + leftovers.LOCK,
    }
    living.communicate()
    assert list(memory.iterdir()) == [unowned]


def test_the_name_goes_too_when_the_start_fails(memory: Path) -> None:
    def start() -> None:
        with named_shared_memory(rank=0):
            (memory / name(29500, 0)).touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        start()
    assert not list(memory.iterdir())


def test_a_system_without_a_folder_of_shared_memory_has_nothing_to_remove(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "MEMORY", memory / "none")
    with named_shared_memory(rank=0):
        pass
    assert not (memory / "none").exists()
