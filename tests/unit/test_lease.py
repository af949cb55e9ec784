"""One driver at a time changes a run, and one that was replaced changes nothing more."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from betakd_ray.errors import Interrupted, OutputError, RunTaken
from betakd_ray.run import lease as module
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.folder import DAMAGED, LEASES
from betakd_ray.run.lease import Holder, Lease, Leases, Permit, held_lease
from betakd_ray.sigterm import StopRequest
from betakd_ray.spec import StorageSpec
from tests.s3 import served

ELSEWHERE = Holder("another", 7, "another machine", "1")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_S", 0.05)
    monkeypatch.setattr(module, "EXPIRE_S", 1.0)


@pytest.fixture(scope="module")
def s3() -> Any:
    with served() as server:
        yield server


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, StorageSpec]:
    if request.param == "local":
        return str(tmp_path / "run"), StorageSpec()
    server = request.getfixturevalue("s3")
    name = f"s3://betakd/{tmp_path.name}"
    return name, StorageSpec(endpoint_url=server.endpoint_url, region="us-east-1")


def stop() -> StopRequest:
    return StopRequest("stopped")


def test_tokens_rise_and_a_released_lease_is_free_at_once(place: Any) -> None:
    for token in (1, 2, 3):
        with held_lease(*place, stop(), waits=False) as permit:
            assert permit.token == token
            permit.check()
    token, last = Leases(*place).newest()
    assert (token, last and last.is_released) == (3, True)


def test_of_many_drivers_that_begin_together_one_gets_each_token(place: Any) -> None:
    leases = Leases(*place)
    everyone = [Lease(ELSEWHERE, str(number)) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        won = list(pool.map(lambda mine: leases.create(1, mine), everyone))
    assert won.count(True) == 1
    assert leases.newest() == (1, everyone[won.index(True)])


def test_a_second_driver_is_told_who_works_on_the_run(place: Any) -> None:
    refused = pytest.raises(OutputError, match=rf"process {os.getpid()} on .*if_running: wait")
    with held_lease(*place, stop(), waits=False), refused, held_lease(*place, stop(), waits=False):
        pass


def test_a_second_driver_that_waits_goes_on_when_the_first_ends(place: Any, caplog: pytest.LogCaptureFixture) -> None:
    begun = threading.Event()

    def second() -> int:
        begun.set()
        with held_lease(*place, stop(), waits=True) as permit:
            return permit.token

    with ThreadPoolExecutor(1) as pool:
        with held_lease(*place, stop(), waits=False):
            waiting = pool.submit(second)
            begun.wait()
            time.sleep(1.5)  # longer than a lease that nobody renews lasts
            assert not waiting.done()
        assert waiting.result(timeout=30) == 2
    assert "waits until another driver ends" in caplog.text


def test_one_that_waits_can_be_stopped(place: Any) -> None:
    request = stop()
    with held_lease(*place, stop(), waits=False), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: held_lease(*place, request, waits=True).__enter__())
        request.make()
        with pytest.raises(Interrupted):
            waiting.result(timeout=30)


@pytest.mark.parametrize("content", ["unreadable", "silent"])
def test_a_lease_that_nobody_renews_is_taken_over(place: Any, content: str) -> None:
    leases = Leases(*place)
    leases.create(4, Lease(ELSEWHERE, "x"))
    if content == "unreadable":
        leases._filesystem.pipe_file(leases._path(4), b'{"holder": ')
    before = time.monotonic()
    with held_lease(*place, stop(), waits=False) as permit:
        assert permit.token == 5
        assert time.monotonic() - before > 1.0
        with pytest.raises(RunTaken, match=r"another driver .* token is 5"):
            Permit(*place, 4).check()


def test_a_process_that_was_killed_is_known_to_be_dead_at_once(place: Any) -> None:
    code = "import sys; from betakd_ray.run.lease import *; import json\n"
    code += "print(json.dumps(asdict(Holder.this_process())), flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        holder = Holder(**json.loads(other.stdout.readline()))
        assert not holder.is_dead()
        other.kill()
        while not holder.is_dead():  # soon a zombie, whose pid is still there
            time.sleep(0.01)
        Leases(*place).create(1, Lease(holder, "x"))
        before = time.monotonic()
        with held_lease(*place, stop(), waits=False):
            assert time.monotonic() - before < 1.0
    assert not replace(holder, machine="another").is_dead()  # there, it may live
    assert replace(Holder.this_process(), started="1").is_dead()  # another process of the same pid


def test_a_driver_that_stood_still_learns_that_it_was_replaced(place: Any) -> None:
    request = stop()
    with held_lease(*place, request, waits=False) as permit:
        request.check()
        Leases(*place).create(2, Lease(ELSEWHERE, "x"))
        deadline = time.monotonic() + 30
        while request.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(RunTaken, match="process 7 on another"):
            request.check()
        with pytest.raises(RunTaken):
            permit.check()
    assert Leases(*place).newest()[0] == 2  # what it did at its end is below


def test_of_two_with_one_token_one_ends(place: Any) -> None:
    """A store that knows no conditional writes gives a token twice."""
    request = stop()
    with held_lease(*place, request, waits=False):
        leases = Leases(*place)
        content = json.dumps(asdict(Lease(ELSEWHERE, "the later one"))).encode()
        deadline = time.monotonic() + 30
        while request.failure is None and time.monotonic() < deadline:
            leases._filesystem.pipe_file(leases._path(1), content)
            time.sleep(0.01)
        assert isinstance(request.failure, RunTaken)


def test_a_driver_that_was_replaced_cannot_commit_and_what_it_committed_too_late_is_not_the_newest(
    place: Any, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "beta.pt").write_bytes(b"beta")

    def commit(store: CheckpointStore, step: int) -> None:
        name = f"step-{step}-a"
        store.commit(store.manifest(name, step, 1, store.upload(tmp_path / "files", name)))

    leases = Leases(*place)
    leases.create(1, Lease(ELSEWHERE, "x"))
    first, second = (CheckpointStore(*place, Permit(*place, token)) for token in (1, 2))
    unchecked = CheckpointStore(*place)  # between its look at the lease and its write
    commit(first, 10)
    leases.create(2, Lease(ELSEWHERE, "y"))
    with pytest.raises(RunTaken):
        commit(first, 30)
    commit(second, 20)
    commit(unchecked, 40)
    newest = second.latest()
    assert newest
    assert (newest.step, newest.token) == (20, 2)


def test_a_store_that_is_away_for_a_while_does_not_cost_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    request, run = stop(), str(tmp_path / "run")
    with held_lease(run, StorageSpec(), request, waits=False) as permit:
        with monkeypatch.context() as patch:
            patch.setattr(Leases, "_tokens", lambda self: (_ for _ in ()).throw(OSError("away")))
            while "could not be renewed" not in caplog.text:
                time.sleep(0.01)
        time.sleep(0.3)
        request.check()
        permit.check()
    assert sorted(os.listdir(f"{run}/{LEASES}")) == ["00000001.json"]
    assert DAMAGED not in os.listdir(run)
