"""What killed processes leave on a machine is removed at a later start, and nothing that may be in use."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from betakd_ray import leftovers
from betakd_ray.leftovers import owned, remove_abandoned, remove_temporary, remove_unfinished, temporary_folder

OWNER = """
import runpy, sys
from pathlib import Path
owned = runpy.run_path(sys.argv[2])["owned"]  # without the rest of the package, whose import takes seconds
with owned(Path(sys.argv[1])) as path:
    path.mkdir(exist_ok=True)
    (path / "weights").write_text("large")
    print("ready", flush=True)
    sys.stdin.read()
"""


def owner_of(path: Path) -> subprocess.Popen[str]:
    """Start a process that owns the folder `path`, and ends when its stdin is closed."""
    command = [sys.executable, "-c", OWNER, str(path), leftovers.__file__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def killed(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    killed(owner_of(tmp_path / "run-1"))
    assert (tmp_path / "run-1" / "weights").exists()
    remove_abandoned(tmp_path, "run-*")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_a_living_process_stays_until_the_process_removes_it(tmp_path: Path) -> None:
    process = owner_of(tmp_path / "run-1")
    remove_abandoned(tmp_path, "*")
    assert (tmp_path / "run-1" / "weights").exists()
    process.communicate()
    assert not list(tmp_path.iterdir())


def test_the_last_of_several_owners_removes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    first, second = owner_of(path), owner_of(path)
    first.communicate()
    assert path.exists()
    killed(second)
    with owned(path):
        remove_abandoned(tmp_path, "*")
        assert path.exists()
    assert not list(tmp_path.iterdir())


def test_an_owner_that_the_sweep_overtakes_owns_its_folder_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(owner_of(tmp_path / "run"))
    is_locked = leftovers._is_locked

    def overtaken(descriptor: int, operation: int) -> bool:
        monkeypatch.setattr(leftovers, "_is_locked", is_locked)
        remove_abandoned(tmp_path, "*")  # between the owner's open and its lock
        return is_locked(descriptor, operation)

    monkeypatch.setattr(leftovers, "_is_locked", overtaken)
    with owned(tmp_path / "run") as path:
        path.mkdir()
        remove_abandoned(tmp_path, "*")
        assert path.exists()


def test_a_folder_without_an_owners_lock_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run-1").mkdir()
    remove_abandoned(tmp_path, "*")
    assert (tmp_path / "run-1").exists()


def test_a_folder_of_another_machine_or_of_before_a_restart_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(owner_of(tmp_path / "run-1"))
    (tmp_path / "boot_id").write_text("another kernel")
    monkeypatch.setattr(leftovers, "KERNEL", tmp_path / "boot_id")
    remove_abandoned(tmp_path, "*")
    assert (tmp_path / "run-1").exists()
    monkeypatch.setattr(leftovers, "KERNEL", tmp_path / "none")  # a system that names no kernel
    remove_abandoned(tmp_path, "*")
    assert (tmp_path / "run-1").exists()


def test_another_users_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(owner_of(tmp_path / "run-1"))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    remove_abandoned(tmp_path, "*")
    assert (tmp_path / "run-1").exists()


def test_a_link_in_place_of_a_lock_or_a_folder_leads_nowhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    there = tmp_path / "there"
    killed(owner_of(there / "run-1"))
    (there / "run-2.lock").symlink_to(there / "run-1.lock")
    (there / "run-2").mkdir()
    (there / "run-1" / "weights").unlink()
    (there / "run-1").rmdir()
    (there / "run-1").symlink_to(outside)
    remove_abandoned(there, "*")
    assert outside.exists()
    assert [path.name for path in sorted(there.iterdir())] == ["run-2", "run-2.lock"]


def test_where_files_cannot_be_locked_nobody_counts_as_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with owned(tmp_path / "run") as path:
            path.mkdir()
            remove_abandoned(tmp_path, "*")
            patch.undo()  # the lock service answers again
            remove_abandoned(tmp_path, "*")
            assert path.exists()
    assert not list(tmp_path.iterdir())


def test_a_temporary_folder_is_private_and_goes_with_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder("save") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        remove_temporary()
        assert folder.exists()
    assert not list(tmp_path.iterdir())


def test_what_nobody_finishes_is_removed_when_it_is_old(tmp_path: Path) -> None:
    inner = tmp_path / "checkpoints" / "step-1"
    inner.mkdir(parents=True)
    old, young, other = inner / "manifest.json.77.tmp", inner / "manifest.json.78.tmp", inner / "notes.tmp"
    newer = inner / f"manifest.json.{'0f' * 8}.tmp"
    for path in (old, young, other, newer):
        path.touch()
    left, written = tmp_path / f"model.{'1a' * 8}.tmp", tmp_path / f"model.{'2b' * 8}.tmp"
    for path in (left, written):
        path.mkdir()
        (path / "weights").touch()
    for path in (old, other, newer, left / "weights", left, written):
        os.utime(path, (time.time() - 7200,) * 2)
    remove_unfinished(tmp_path)
    assert sorted(inner.iterdir()) == [young, other]
    assert sorted(tmp_path.iterdir()) == [inner.parent, written]
