"""A tracker is checked before a job, and never ends, restarts or delays one that runs."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from betakd_ray.errors import TrackerError
from betakd_ray.run.folder import TRACKER_FOLDERS
from betakd_ray.run.metrics import MetricsRecord, read_metrics
from betakd_ray.spec import JobSpec, parse_spec
from betakd_ray.trackers import check, services, thread
from betakd_ray.trackers.check import check_trackers
from betakd_ray.trackers.services import TRACKERS, run_id
from betakd_ray.trackers.thread import InRunFolder, TrackerThread
from betakd_ray.tracking import MetricsWriter

NOWHERE = "http://127.0.0.1:9"
"""Address at which nobody listens."""


def spec(folder: Path | str, *trackers: str, **tracking: Any) -> JobSpec:
    return parse_spec(
        {
            "name": "run",
            "data": {"train": "unused.tar"},
            "student": {"init": {"kind": "checkpoint", "path": "unused"}},
            "objective": {"weighting": "equal"},
            "output": {"path": str(folder)},
            "tracking": {"trackers": list(trackers), **tracking},
        }
    )


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    monkeypatch.setattr(thread, "RETRY_S", 0.02)


@pytest.fixture
def server() -> Iterator[str]:
    """Yield the address of a server that answers 404 to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as there:
        threading.Thread(target=there.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{there.server_port}"
        there.shutdown()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every tracker's package be found."""
    monkeypatch.setattr(check, "find_spec", lambda name: SimpleNamespace())


# ---- before a job --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_a_user_s_error_that_names_the_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "find_spec", lambda package: None)
    with pytest.raises(TrackerError, match=rf"{name} needs a package .* pip install 'betakd-ray\[{name}\]'"):
        check_trackers(spec(tmp_path, name))


ADDRESS = {"mlflow": "MLFLOW_TRACKING_URI", "wandb": "WANDB_BASE_URL", "trackio": "TRACKIO_SERVER_URL"}


@pytest.mark.parametrize("name", ADDRESS)
def test_a_server_that_does_not_answer_is_an_error_or_a_warning_as_told(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(ADDRESS[name], NOWHERE)
    with pytest.raises(TrackerError, match=rf"{name}: no server answers at {NOWHERE} .*unreachable: offline"):
        check_trackers(spec(tmp_path, name))
    check_trackers(spec(tmp_path, name, unreachable="offline"))
    assert "its files go into the run's folder" in caplog.text


@pytest.mark.parametrize("name", ADDRESS)
def test_a_server_that_answers_anything_is_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: None, server: str
) -> None:
    monkeypatch.setenv(ADDRESS[name], server)
    monkeypatch.setenv("WANDB_API_KEY", "a-key-of-forty-letters")
    check_trackers(spec(tmp_path, name))


def test_wandb_without_a_key_says_so_and_offline_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: None, server: str
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server)
    with pytest.raises(TrackerError, match=r"no key for 127\.0\.0\.1: set WANDB_API_KEY"):
        check_trackers(spec(tmp_path, "wandb"))
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    check_trackers(spec(tmp_path, "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
    check_trackers(spec(tmp_path, "wandb"))


def test_trackers_that_need_no_server_are_asked_for_none(tmp_path: Path, installed: None) -> None:
    check_trackers(spec(tmp_path, "tensorboard", "mlflow", "trackio"))


def test_a_password_in_an_address_is_not_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: None) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    with pytest.raises(TrackerError) as refused:
        check_trackers(spec(tmp_path, "mlflow"))
    assert "secret" not in str(refused.value)


# ---- during a job --------------------------------------------------------------------------------------------------


class Server:
    """Fake tracker, and what its server does."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.is_away = self.is_closed = False
        self.blocks: threading.Event | None = None

    def log(self, record: MetricsRecord) -> None:
        if self.blocks:
            self.blocks.wait(30)
        if self.is_away:
            raise ConnectionError("no route to host")
        self.seen.append(record["step"])

    def close(self) -> None:
        self.is_closed = True


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_server_that_is_away_for_a_while_misses_nothing_and_is_one_warning() -> None:
    server, said = Server(), list[str]()
    tracker = TrackerThread("mlflow", lambda: server, said.append)
    tracker.log({"step": 1})
    until(lambda: server.seen == [1])
    server.is_away = True
    for step in (2, 3, 4):
        tracker.log({"step": step})
    until(lambda: bool(said))
    time.sleep(0.1)
    server.is_away = False
    until(lambda: server.seen == [1, 2, 3, 4])
    tracker.close()
    assert server.is_closed
    assert len(said) == 1
    assert "mlflow fails, and is tried again every" in said[0]
    assert "the job goes on: ConnectionError: no route to host" in said[0]


def test_what_a_server_has_missed_at_the_end_is_said() -> None:
    server, said = Server(), list[str]()
    tracker = TrackerThread("wandb", lambda: server, said.append)
    tracker.log({"step": 1})
    until(lambda: server.seen == [1])
    server.is_away = True
    for step in (2, 3, 4):
        tracker.log({"step": step})
    tracker.close()
    assert said[-1].startswith("tracking: wandb has missed 3 records of steps 2 to 4.")
    assert len(said) == 2


def test_a_tracker_that_hangs_delays_neither_steps_nor_for_long_the_end() -> None:
    server, said = Server(), list[str]()
    server.blocks = threading.Event()
    tracker = TrackerThread("trackio", lambda: server, said.append)
    begun = time.monotonic()
    for step in range(1000):
        tracker.log({"step": step})
    tracker.close(timeout_s=0.2)
    assert time.monotonic() - begun < 20
    assert "has missed 1000 records" in said[-1]
    server.blocks.set()


def test_one_that_cannot_be_made_is_tried_again() -> None:
    server, said, attempts = Server(), list[str](), []

    def make() -> Server:
        attempts.append(1)
        if len(attempts) < 3:
            raise ModuleNotFoundError("No module named 'mlflow'")
        return server

    tracker = TrackerThread("mlflow", make, said.append)
    tracker.log({"step": 1})
    until(lambda: server.seen == [1])
    tracker.close()
    assert len(said) == 1


def test_a_run_whose_tracker_fails_has_its_own_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Server:
        raise OSError("disk full")

    monkeypatch.setitem(TRACKERS, "tensorboard", broken)
    said: list[str] = []
    metrics = MetricsWriter(spec(tmp_path, "tensorboard"), str(tmp_path / "run"), warn=said.append)
    metrics.restore(None)
    for step in (1, 2, 3):
        metrics.log({"step": step, "loss": 0.5})
    metrics.close()
    assert [record["step"] for record in read_metrics(str(tmp_path / "run"))] == [1, 2, 3]
    assert any("tensorboard fails" in text and "disk full" in text for text in said)
    assert any("tensorboard has missed 3 records of steps 1 to 3" in text for text in said)


# ---- each library, as its stand-in or itself -----------------------------------------------------------------------


def logged(name: str, job: JobSpec, run: Path) -> None:
    tracker = InRunFolder(name, job, str(run))
    for step in (1, 2):
        tracker.log({"step": step, "time": 5.0, "loss": 0.5, "beta/fkl": 1.5})
    tracker.close()


def test_tensorboard_writes_into_the_run_s_folder(tmp_path: Path) -> None:
    logged("tensorboard", spec(tmp_path, "tensorboard"), tmp_path / "run")
    (file,) = (tmp_path / "run" / TRACKER_FOLDERS["tensorboard"]).glob("events.out.*")
    assert file.stat().st_size > 100


def test_files_of_a_run_in_an_object_store_are_copied_there(tmp_path: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    store = MemoryFileSystem()
    store.store.clear()
    logged("tensorboard", spec("memory://runs", "tensorboard"), "memory://runs/run")  # type: ignore[arg-type]
    assert any("events.out" in name for name in store.find("/runs/run/tensorboard"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Put stand-ins of mlflow, wandb and trackio into place; return what is called of them."""
    made: list[tuple[str, Any]] = []

    def note(name: str, answer: Any = None) -> Callable[..., Any]:
        return lambda *given, **named: (made.append((name, given or named)), answer)[1]

    def module(name: str, **members: Any) -> None:
        fake = ModuleType(name)
        fake.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, fake)

    run = SimpleNamespace(log=lambda numbers, step: made.append(("log", (numbers, step))), finish=note("finish"))
    module("wandb", init=note("wandb.init", run), Settings=lambda **options: options)
    module(
        "trackio", init=lambda project, **named: (made.append(("trackio.init", {"project": project, **named})), run)[1]
    )

    class Client:
        runs: list[Any] = []  # noqa: RUF012

        def __init__(self, address: str) -> None:
            made.append(("mlflow", address))

        get_experiment_by_name = staticmethod(lambda name: None)
        create_experiment = staticmethod(note("create_experiment", "7"))
        log_dict = staticmethod(note("log_dict"))
        log_batch = staticmethod(note("log_batch"))
        set_terminated = staticmethod(note("set_terminated"))

        def search_runs(self, experiments: Any, query: str, max_results: int) -> list[Any]:
            return [run for run in self.runs if run.tag in query]

        def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
            made.append(("create_run", (run_name, tags)))
            new = SimpleNamespace(info=SimpleNamespace(run_id="r1"), tag=tags["betakd.run"])
            self.runs.append(new)
            return new

    module("mlflow", MlflowClient=Client)
    module("mlflow.entities", Metric=lambda *given: given)
    return made


NAMED = {"project": "p", "group": "g", "name": "n"}


def test_mlflow_has_one_run_however_often_the_job_begins(tmp_path: Path, calls: list[tuple[str, Any]]) -> None:
    job = spec(tmp_path, "mlflow", **NAMED)
    for _ in range(2):
        logged("mlflow", job, tmp_path / "run")
    names = [name for name, _ in calls]
    assert names.count("create_run") == 1
    assert ("create_run", ("n", {"betakd.run": run_id(str(tmp_path / "run")), "group": "g"})) in calls
    assert ("create_experiment", ("p",)) in calls
    assert calls[0] == ("mlflow", (tmp_path / "run" / "mlflow").as_uri())  # no server is named
    assert ("log_batch", ("r1", [("loss", 0.5, 5000, 1), ("beta/fkl", 1.5, 5000, 1)])) in [
        (name, (given[0], sorted(given[1], key=lambda metric: ("loss", "beta/fkl").index(metric[0]))))
        for name, given in calls
        if name == "log_batch"
    ]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_has_its_project_group_and_name_and_its_files_in_the_run_s_folder(
    name: str, tmp_path: Path, calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", "")
    monkeypatch.delenv("TRACKIO_DIR")
    logged(name, spec(tmp_path, name, **NAMED), tmp_path / "run")
    begun = dict(calls)[f"{name}.init"]
    assert NAMED.items() <= begun.items()
    assert begun["resume"] == "allow"
    json.dumps(begun["config"])
    assert calls[1] == ("log", ({"loss": 0.5, "beta/fkl": 1.5}, 1))
    assert calls[-1][0] == "finish"
    folder = str(tmp_path / "run" / name)
    if name == "wandb":
        assert begun["dir"] == folder
        assert begun["id"] == run_id(str(tmp_path / "run"))
    else:
        assert services.os.environ["TRACKIO_DIR"] == folder


@pytest.mark.parametrize(("unreachable", "mode"), [("offline", "offline"), ("error", None)])
def test_wandb_goes_offline_if_told_so(
    unreachable: str, mode: str | None, tmp_path: Path, calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
    logged("wandb", spec(tmp_path, "wandb", unreachable=unreachable), tmp_path / "run")
    assert dict(calls)["wandb.init"].get("mode") == mode


def test_a_short_form_names_one_tracker(tmp_path: Path) -> None:
    assert parse_spec(
        {**spec(tmp_path).model_dump(exclude={"tracking"}), "tracking": {"trackers": "wandb"}}
    ).tracking.trackers == ("wandb",)


def test_the_run_s_folder_names_a_place_for_each_tracker() -> None:
    assert TRACKER_FOLDERS.keys() == TRACKERS.keys()
