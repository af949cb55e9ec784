"""Progress lines: one live display a terminal, whoever opens and whoever closes it."""

from betakd_ray import progress
from betakd_ray.progress import progress_line


def test_lines_share_one_display_and_the_last_one_closes_it(capsys):
    first, second = progress_line("first", 3, "starting"), progress_line("second", 2)
    update = first.__enter__()
    display = progress._DISPLAY._progress
    assert display
    second.__enter__()(advance=1)
    assert progress._DISPLAY._progress is display
    first.__exit__(None, None, None)  # not in the order of nested blocks: they are of different threads
    assert [(task.description, task.completed) for task in display.tasks if task.visible] == [("second", 1)]
    update(completed=3, numbers="too late")
    second.__exit__(None, None, None)
    assert progress._DISPLAY._progress is None
    assert "second" in capsys.readouterr().out


def test_a_line_that_is_not_wanted_opens_nothing():
    with progress_line("quiet", 3, is_shown=False) as update:
        update(completed=1)
        assert progress._DISPLAY._progress is None
