"""The application that the commands belong to, what they share, and their exit codes."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from betakd_ray.errors import Interrupted, TrainingError, UserError
from betakd_ray.sigterm import answering_sigterm

# Commands import what they need themselves: torch and Ray take seconds, and `betakd validate` needs neither.
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil a large vision-language model into a small one, on Ray.",
)

SpecPath = Annotated[str, typer.Argument(help="YAML spec: a path, a URL, or - for standard input")]
Overrides = Annotated[list[str], typer.Option("--set", help="section.field=value")]
Endpoint = Annotated[str | None, typer.Option(help="S3 endpoint, for stores other than AWS")]


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn an error into one message and an exit code.

    The code is 2 for a user's error, 1 for a failed run, and 75 for an interrupted run that can be resumed.
    """
    try:
        yield
    except UserError as error:
        print(f"betakd: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except TrainingError as error:
        print(f"betakd: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Interrupted as error:
        print(f"betakd: {error}", file=sys.stderr)
        raise SystemExit(os.EX_TEMPFAIL) from None


def job(call: Callable[..., Any]) -> None:
    """Run a `--spec PATH --set key=value` entry point of jobs/."""

    def run(
        spec: Annotated[str, typer.Option("--spec", help="YAML spec: a path, a URL, or - for standard input")],
        overrides: Overrides = [],  # noqa: B006 (typer's way)
    ) -> None:
        with exit_codes():
            call(spec, overrides)

    _make_working_folder_importable()
    with answering_sigterm():
        typer.run(run)


def main() -> None:
    """Run the `betakd` command."""
    _make_working_folder_importable()
    with answering_sigterm():
        app()


def _make_working_folder_importable() -> None:
    """Let a spec name modules in the folder where the command is typed.

    Last on the path: a file there that has the name of an installed package, such as torch.py, must not be run for it.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
