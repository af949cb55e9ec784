"""Images of questions: read one, and find those that are missing or unreadable before a model is loaded."""

import io
import os
from collections.abc import Iterable, Sequence

from PIL import Image

from betakd_ray.data.files import opened, store_errors
from betakd_ray.errors import DataError
from betakd_ray.evaluation.benchmark import Benchmark, Question
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import open_store


def image_content(question: Question, storage: StorageSpec) -> bytes | None:
    """Return the file of a question's image; None for a question without one. Raises DataError if it is missing."""
    if isinstance(question.image, bytes | None):
        return question.image
    with opened(question.image, storage) as file:
        return file.read()


def check_images(benchmark: Benchmark, questions: Sequence[Question], storage: StorageSpec) -> None:
    """Raise DataError, with count and first path, if images are missing, or are no images.

    Of an image in an object store only the name is looked for: to read thousands of them would take minutes.
    """
    paths = dict.fromkeys(question.image for question in questions if isinstance(question.image, str))
    missing = _missing(paths, storage)
    unreadable = [path for path in paths if "://" not in path and path not in missing and not _is_image(path)]
    unreadable += [
        f"row {question.question_id}" for question in questions
        if isinstance(question.image, bytes) and not _is_image(io.BytesIO(question.image))
    ]  # fmt: skip
    problems = [
        f"{len(found)} {what}, the first {found[0]}"
        for found, what in ((list(missing), "are missing"), (unreadable, "cannot be read"))
        if found
    ]
    if problems:
        raise DataError(
            f"{benchmark.name}: of its images {'; '.join(problems)}. Complete the folder, or ask a part with `limit`."
        )


def _missing(paths: Iterable[str], storage: StorageSpec) -> dict[str, None]:
    local = {path: None for path in paths if "://" not in path and not os.path.isfile(path)}
    remote = [path for path in paths if "://" in path]
    if not remote:
        return local
    # Not commonpath, which would take a slash out of s3://.
    root = os.path.commonprefix(remote).rpartition("/")[0]  # noqa: RUF071
    with store_errors(root, storage):
        filesystem, folder = open_store(root, storage)
        # One listing for all: a question about each of thousands of objects would take minutes.
        there = set(filesystem.find(folder))
        return local | {path: None for path in remote if str(filesystem._strip_protocol(path)) not in there}


def _is_image(file: str | io.BytesIO) -> bool:
    """Return whether the file begins as an image does. It may still break off."""
    try:
        with Image.open(file):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises for broken headers
        return False
