"""The application that the commands belong to, what they share, and their exit codes."""

import codecs
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from betakd_ray import __version__
from betakd_ray.errors import Interrupted, TrainingError, UserError, without_secrets
from betakd_ray.sigterm import answering_sigterm
from betakd_ray.spec import StorageSpec
from betakd_ray.spec.loading import parse_options

# Commands import what they need themselves: torch and Ray take seconds, and `betakd validate` needs neither.
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SpecPath = Annotated[str, typer.Argument(help="YAML spec: a path, a URL, or - for standard input", metavar="SPEC")]
Overrides = Annotated[list[str], typer.Option("--set", help="change a field: section.field=value; may be repeated")]
Endpoint = Annotated[str | None, typer.Option(help="S3 endpoint, for stores other than AWS")]
Region = Annotated[str | None, typer.Option(help="S3 region")]
Anonymous = Annotated[bool, typer.Option("--anonymous", help="read public buckets without credentials")]


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"betakd {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Distil a large vision-language model into a small one, on Ray.

    Begin with `betakd init`, which prints a spec to start from, or with `betakd distill --teacher … --student …
    --data …`. Every command has `-h`.
    """


def storage_of(endpoint_url: str | None, region: str | None = None, anonymous: bool = False) -> StorageSpec:
    """Return the store that --endpoint-url, --region and --anonymous name. Raises SpecError."""
    typed = {
        "endpoint_url": ("--endpoint-url", endpoint_url),
        "region": ("--region", region),
        "anonymous": ("--anonymous", anonymous),
    }
    return parse_options(StorageSpec, typed)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn an error into one message and an exit code.

    The code is 2 for a user's error, 1 for a failed run, and 75 for an interrupted run that can be resumed.
    """
    try:
        yield
    except UserError as error:
        _say(str(error))
        raise SystemExit(2) from None
    except TrainingError as error:
        _say(str(error))
        raise SystemExit(1) from None
    except Interrupted as error:
        _say(f"{error}\nTo go on: {command_line()}")
        raise SystemExit(os.EX_TEMPFAIL) from None


def _say(text: str) -> None:
    for line in text.splitlines():
        print(f"betakd: {line}", file=sys.stderr)


def command_line() -> str:
    """Return the command with which this process was started, without secrets."""
    program = Path(sys.argv[0])
    begin = {"__main__.py": ["python", "-m", "betakd_ray"], "betakd": ["betakd"]}.get(
        program.name, ["python", str(program)]
    )
    return without_secrets(shlex.join([*begin, *sys.argv[1:]]))


def job(call: Callable[..., Any]) -> None:
    """Run a `--spec PATH --set key=value` entry point of jobs/."""

    def run(
        spec: Annotated[str, typer.Option("--spec", help="YAML spec: a path, a URL, or - for standard input")],
        overrides: Overrides = [],  # noqa: B006 (typer's way)
    ) -> None:
        with exit_codes():
            call(spec, overrides)

    _prepare()
    with answering_sigterm():
        typer.run(run)


def main() -> None:
    """Run the `betakd` command."""
    _prepare()
    with answering_sigterm():
        app()


def _prepare() -> None:
    _make_working_folder_importable()
    codecs.register_error("betakd", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Without this, one β is a traceback where the encoding has none, as ASCII or Latin-1.
            stream.reconfigure(errors="betakd")


_ASCII = {"β": "beta", "–": "-", "—": "-", "−": "-", "·": "-", "…": "...", "×": "x", "→": "->", "±": "+-", "≥": ">=",
          "’": "'", "“": '"', "”": '"'}  # fmt: skip
"""Characters of messages → how a narrow encoding writes them."""


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    unknown = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, "?") for character in unknown), error.end


def _make_working_folder_importable() -> None:
    """Let a spec name modules in the folder where the command is typed.

    Last on the path: a file there that has the name of an installed package, such as torch.py, must not be run for it.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
