"""The command that asks a model."""

import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from betakd_ray.cli.app import Endpoint, app, exit_codes, storage_of
from betakd_ray.errors import DataError, UserError
from betakd_ray.spec import StorageSpec

if TYPE_CHECKING:
    from betakd_ray.evaluation.ask import Conversation

HELP = "Ask a question. /image FILE shows another image, /new begins again, /quit ends."
_IMAGE_NAME = re.compile(r"\S+\.(jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)


@app.command()
def ask(
    model: Annotated[str, typer.Argument(help="folder of a run or of a model, URL, or hub id")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE]... [QUESTION]",
            help="images (files or URLs), then the question; without a question, questions are read line by line",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="longest answer, in tokens; default: the model's own setting")
    ] = None,
    system: Annotated[str | None, typer.Option(help="system prompt, instead of the model's own")] = None,
    template: Annotated[
        str | None, typer.Option(help="vicuna_v1, plain, chat or module:name; default: that of training")
    ] = None,
    endpoint_url: Endpoint = None,
) -> None:
    """Ask a model about images, or by text alone; the answer is what an evaluation would get."""
    with exit_codes():
        images, question = parted(words or [])
        storage = storage_of(endpoint_url)
        shown = [read_image(image, storage) for image in images]  # before the model, which takes longer
        conversation = _opened(model, storage, max_new_tokens, system, template)
        for image in shown:
            conversation.show(image)
        try:
            if question is None:
                converse(conversation, storage)
            else:
                answer(conversation, question)
        except KeyboardInterrupt:
            print()
            raise SystemExit(130) from None


def parted(words: list[str]) -> tuple[list[str], str | None]:
    """Return the images and the question, which comes last; None if there is no question. Raises DataError."""
    question = None if not words or is_image(words[-1]) else words[-1]
    images = words if question is None else words[:-1]
    for image in images:
        if not is_image(image):
            raise DataError(f"{image!r}: is no image file. Write images first, then the question in quotes.")
    return images, question


def is_image(word: str) -> bool:
    """Return whether an argument names an image, and is not a question."""
    return os.path.isfile(word) or bool(_IMAGE_NAME.fullmatch(word)) or bool(re.fullmatch(r"\w+://\S+", word))


def read_image(place: str, storage: StorageSpec) -> bytes:
    """Return the bytes of an image file or URL. Raises DataError."""
    from betakd_ray.data.files import store_errors
    from betakd_ray.storage import open_store

    with store_errors(place, storage):
        filesystem, path = open_store(os.path.expanduser(place), storage)
        return bytes(filesystem.cat_file(path))  # pyright: ignore[reportArgumentType]


def answer(conversation: "Conversation", question: str) -> None:
    """Ask, and print the answer while it is generated."""
    conversation.ask(question, lambda piece: print(piece, end="", flush=True))
    print(flush=True)


def converse(conversation: "Conversation", storage: StorageSpec) -> None:
    """Answer each line of the standard input, until it ends. A line that cannot be answered is told and left out."""
    for line in _lines():
        try:
            if line == "/new":
                conversation.restart()
            elif line.startswith("/image "):
                conversation.show(read_image(line.removeprefix("/image ").strip(), storage))
            elif line.startswith("/"):
                print(HELP, file=sys.stderr)
            else:
                answer(conversation, line)
        except UserError as error:
            print(f"betakd: {error}", file=sys.stderr)


def _lines() -> Iterator[str]:
    """Yield the lines that are not empty, until `/quit` or the end of the input."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 (lets `input` edit a line and recall earlier ones)

        print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            yield line


def _opened(
    model: str, storage: StorageSpec, max_new_tokens: int | None, system: str | None, template: str | None
) -> "Conversation":
    from betakd_ray.evaluation.ask import open_conversation

    return open_conversation(
        model, storage=storage, max_new_tokens=max_new_tokens, system_prompt=system, template=template
    )
