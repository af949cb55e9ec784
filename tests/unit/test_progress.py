"""Progress: one live display a terminal, whoever opens and whoever closes it; lines of text where there is none."""

import io
import time

import pytest
from rich.console import Console

from betakd_ray import progress
from betakd_ray.on_ray.monitor import Report
from betakd_ray.progress import pieces_line, progress_line
from betakd_ray.run.pace import Pace, bar_text, clock_text, progress_text
from betakd_ray.train.view import TrainingView


@pytest.fixture
def screen(monkeypatch):
    """Let progress find a terminal; return what is written to it."""
    written = io.StringIO()
    monkeypatch.setattr(progress, "_console", lambda: Console(file=written, force_terminal=True, width=200))
    return written


def test_lines_share_one_display_and_the_last_one_closes_it(screen):
    first, second = progress_line("first", 3, "starting"), progress_line("second", 2)
    update = first.__enter__()
    display = progress._DISPLAY._progress
    assert display
    second.__enter__()(advance=1, line="is not for a bar")
    assert progress._DISPLAY._progress is display
    first.__exit__(None, None, None)  # not in the order of nested blocks: they are of different threads
    assert [(task.description, task.completed) for task in display.tasks if task.visible] == [("second", 1)]
    update(completed=3, numbers="too late")
    second.__exit__(None, None, None)
    assert progress._DISPLAY._progress is None
    assert "second" in screen.getvalue()
    assert "is not for a bar" not in screen.getvalue()


def test_a_line_that_ends_before_anything_was_done_leaves_no_bar(screen):
    with progress_line("failed", None, "checking"):
        display = progress._DISPLAY._progress
        assert display
    assert not any(task.visible for task in display.tasks)


def test_a_line_that_is_not_wanted_opens_nothing(capsys):
    with progress_line("quiet", 3, is_shown=False) as update:
        update(completed=1)
        assert progress._DISPLAY._progress is None
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_each_change_is_a_line_on_standard_error(capsys):
    with progress_line("job", None, "checking") as update:
        update(total=9, numbers="starting")
        update(numbers="starting")  # says nothing new
        update(completed=3, numbers="for the bar", line="step 3/9")
        update(line="checkpoint at step 3")
    with progress_line("sweep", 2, "cells") as update:
        update(completed=1)
        update(advance=1)
    out, said = capsys.readouterr()
    assert out == ""
    assert said.splitlines() == [
        "job: checking",
        "job: starting",
        "job: step 3/9",
        "job: checkpoint at step 3",
        "sweep: 0 of 2 cells",
        "sweep: 1 of 2 cells",
        "sweep: 2 of 2 cells",
    ]


def test_small_pieces_are_a_line_now_and_then_with_the_time_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with pieces_line("gqa", 1000, "questions", completed=400) as update:
        for _ in range(6):
            now[0] += 4
            update(advance=100)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "gqa: 400 of 1000 questions",
        "gqa: 700 of 1000 questions, ETA 0:00:12",  # 300 of those that were left took 12 s
        "gqa: 1000 of 1000 questions",
    ]


def test_small_pieces_that_were_done_before_make_no_pace_of_the_bar(screen):
    with pieces_line("gqa", 1000, "questions", completed=400) as update:
        update(advance=1)
        assert progress._DISPLAY._progress
        (task,) = progress._DISPLAY._progress.tasks
        assert task.completed == 401
        assert not task.speed, "nothing is known of the pace after one piece"


def test_a_phase_that_lasts_is_said_again_and_a_step_is_not(capsys, monkeypatch):
    monkeypatch.setattr(progress, "REPEAT_S", 0.02)
    with progress_line("job", 9, "steps") as update:
        update(numbers="loading the teacher")
        said = ""
        while "job: loading the teacher, since 0 min" not in said:  # the test's own limit ends it
            said += capsys.readouterr().err
        update(completed=1, line="step 1/9")
        time.sleep(0.1)  # the last repetition may have begun before
        capsys.readouterr()
        time.sleep(0.2)
        assert capsys.readouterr().err == ""


RECORD = {
    "step": 120,
    "time": 1000.0,
    "loss": 1.23456,
    "samples_per_second": 312.4,
    "beta/cosine_probs": 0.931,
    "beta/fd": 1.1,
    "beta_p50/fd": 1.0,
    "data_wait": 0.02,
    "teacher_wait": 0.051,
}


def test_a_record_is_one_line_of_ascii_with_what_one_asks_of_a_run():
    pace = Pace([RECORD | {"step": 100, "time": 900.0}, RECORD])
    text = progress_text(RECORD, 900, pace)
    assert text == (
        "step 120/900 (13%), loss 1.2346, beta cosine_probs 0.931 fd 1.1, 312.4 samples/s, "
        "waits data 2% teacher 5%, ETA 1:05:00"
    )
    assert text.isascii()
    assert bar_text(RECORD) == "loss 1.2346 · β cosine_probs 0.931 fd 1.1 · 312 samples/s"


def test_the_time_left_is_unknown_until_two_records_are_there_and_after_a_restart():
    pace = Pace()
    for step, time_s, left in ((10, 0.0, None), (20, 10.0, 80.0), (15, 40.0, None), (25, 60.0, 150.0)):
        pace.note({"step": step, "time": time_s})
        assert pace.seconds_left(100) == left
    assert clock_text(None) == "unknown"
    assert clock_text(93784.0) == "1 day, 2:03:04"


def test_metrics_without_energies_or_of_an_older_version_have_a_line_too():
    assert "beta" not in progress_text({"step": 1, "loss": float("nan")}, 10, Pace())
    many = {f"beta/e{number}": 1.0 for number in range(9)}
    assert progress_text({"step": 1, "loss": 1.0, **many}, 10, Pace()).count(" 1 ") <= 5


def test_the_driver_says_each_phase_each_record_and_each_checkpoint_once(capsys):
    with progress_line("job", None, "checking") as update:
        view = TrainingView(900, update)
        view.show(Report({}))
        view.show(Report({}, has_begun=True))
        view.show(
            Report(RECORD, has_begun=True, records=(RECORD | {"step": 110, "time": 990.0}, RECORD), committed=100)
        )
        view.show(Report(RECORD, has_begun=True))
        view.show(Report(RECORD, has_begun=False))
        view.show(Report(RECORD, has_begun=True))
        view.stopping()
        view.stopping()
        view.show(Report(RECORD, has_begun=False))
    said = [line.removeprefix("job: ") for line in capsys.readouterr().err.splitlines()]
    assert [line.split(",")[0] for line in said] == [
        "checking",
        "starting the student workers",
        "the student workers load the model",
        "step 110/900 (12%)",
        "step 120/900 (13%)",
        "checkpoint at step 100",
        "the student workers have ended",
        "the student workers load the model",
        "was asked to stop: it saves. Ctrl-C once more ends it at once",
    ]
