"""The pictures of questions: read from a disk or a store, and checked before a model is loaded."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from betakd_ray.data.files import opened
from betakd_ray.data.render import FORMATS
from betakd_ray.errors import DataError, DataUnreachable, OutputError
from betakd_ray.evaluation.benchmark import Question
from betakd_ray.spec import StorageSpec

READING_THREADS = 16
"""Number of pictures that are read at the same time; a store takes long to answer each."""
SMALL = (64, 64)
"""Size in pixels to which JPEG's decoder may scale while it reads the whole file, which takes a quarter of the time."""


def read_picture(question: Question, storage: StorageSpec) -> bytes | None:
    """Return the file's content; None for a question without a picture. Raises DataError."""
    if not isinstance(question.image, str):
        return question.image
    with opened(question.image, storage) as file:
        return file.read()


def require_pictures(
    questions: Sequence[Question], storage: StorageSpec, on_read: Callable[[], None] = lambda: None
) -> None:
    """Read and decode every picture once. Raises DataError with the number of bad ones and the first of them.

    Raises DataUnreachable if the store does not answer. `on_read` is called after each picture.
    """
    shown: dict[str | bytes, Question] = {}
    for question in questions:
        if question.image is not None:
            shown.setdefault(question.image, question)
    with ThreadPoolExecutor(READING_THREADS, thread_name_prefix="pictures") as threads:
        faults = []
        try:
            for fault in threads.map(lambda question: _fault(question, storage), shown.values()):
                on_read()
                if fault:
                    faults.append(fault)
        except BaseException:  # otherwise all other pictures would be read before it is raised
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    if faults:
        raise DataError(
            f"{len(faults)} of {len(shown)} pictures are missing or cannot be read. The first: {faults[0]} Get them "
            "from where the questions come from; without them no model is asked."
        )


def _fault(question: Question, storage: StorageSpec) -> str | None:
    """Return what is wrong with a question's picture; None if nothing is."""
    name = question.image if isinstance(question.image, str) else f"the picture of question {question.question_id}"
    try:
        content = read_picture(question, storage)
    except (DataUnreachable, OutputError):  # not the picture's fault
        raise
    except DataError as error:
        return str(error)
    assert content is not None
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.draft("RGB", SMALL)
            image.load()
    except Exception as error:  # Pillow's decoders raise almost any class of error for damaged bytes
        return f"{name}: cannot be decoded ({error or type(error).__name__})."
    return None
