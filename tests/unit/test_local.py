"""A Ray that a job starts on its machine is closed to others, and what a killed driver leaves of it is ended."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray._private import services

from betakd_ray import leftovers
from betakd_ray.errors import ClusterError
from betakd_ray.on_ray.local import DRIVER, LOOPBACK, TOKEN_VARIABLES, closed, driven, keep_token_private

AGENT = str(Path(ray.__file__).parent / "dashboard" / "agent.py")
OPENS = "import sys; log = open(sys.argv[1], 'a'); print('ready', flush=True); sys.stdin.read()"
DRIVES = """
import pathlib, runpy, sys
with runpy.run_path(sys.argv[2])["owned"](pathlib.Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where Ray keeps the token of a user who has named none."""
    for name in (*TOKEN_VARIABLES, "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".ray" / "auth_token"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_token_is_made_for_this_user_alone(token: Path) -> None:
    keep_token_private()
    made = token.read_text()
    assert len(made) == 64
    assert (mode(token), mode(token.parent)) == (0o600, 0o700)
    keep_token_private()
    assert token.read_text() == made
    assert list(token.parent.iterdir()) == [token]


def test_a_token_that_others_can_read_is_closed_to_them(token: Path) -> None:
    token.parent.mkdir()
    token.write_text("made by Ray")
    token.chmod(0o644)
    keep_token_private()
    assert (token.read_text(), mode(token)) == ("made by Ray", 0o600)


@pytest.mark.parametrize(
    ("name", "value"), [("RAY_AUTH_TOKEN", "abc"), ("RAY_AUTH_TOKEN_PATH", "/token"), ("RAY_AUTH_MODE", "disabled")]
)
def test_a_user_who_chose_is_left_alone(name: str, value: str, token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    keep_token_private()
    assert not token.exists()


def test_a_home_that_cannot_be_written_is_named(token: Path) -> None:
    token.parent.write_text("a file")
    with pytest.raises(ClusterError, match=r"~/\.ray/auth_token, which cannot be written .*RAY_AUTH_TOKEN"), closed():
        pass


def test_ray_takes_its_node_to_be_on_loopback_only_while_a_local_one_starts(
    token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda _: "192.0.2.7")
    with closed():
        assert services.get_node_ip_address() == LOOPBACK
    assert services.get_node_ip_address() == "192.0.2.7"


def started(code: str, *arguments: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_agents_of_a_killed_driver_are_ended_and_nobody_else(tmp_path: Path) -> None:
    processes = {}
    for session in ("session_dead", "session_alive", "session_unmarked"):
        (tmp_path / session / "logs").mkdir(parents=True)
        log = str(tmp_path / session / "logs" / "agent.log")
        processes[session, "agent"] = started(OPENS, log, AGENT)
        processes[session, "reader of its log"] = started(OPENS, log)
        if session != "session_unmarked":
            processes[session, "driver"] = started(DRIVES, str(tmp_path / session / DRIVER), leftovers.__file__)
    (tmp_path / "session_latest").symlink_to(tmp_path / "session_dead")
    processes["session_dead", "driver"].kill()
    processes["session_dead", "driver"].wait()
    (tmp_path / "session_ours").mkdir()
    try:
        with driven(tmp_path / "session_ours"):
            assert processes["session_dead", "agent"].wait(timeout=10) == -signal.SIGKILL
            ended = {who for who, process in processes.items() if process.poll() is not None}
            assert ended == {("session_dead", "agent"), ("session_dead", "driver")}
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    assert (tmp_path / "session_dead" / "logs" / "agent.log").exists()  # what it said is kept
