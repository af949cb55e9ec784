"""The easy-VQA package's questions as samples to pack, with wrong answers on request."""

import importlib
import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from betakd_ray.errors import DataError

SHAPES = ("circle", "rectangle", "triangle")


def easy_vqa_samples(
    split: Literal["train", "test"],
    *,
    limit: int | None = None,
    wrong_answers: float = 0.0,
    instead: Literal["kind", "any"] = "kind",
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yield the questions of the easy-VQA package on 64×64 images of one shape, with one-word answers.

    `limit` takes a random subset. `wrong_answers` is the fraction of the samples whose answer is replaced by another
    one, all equally likely: of its kind (yes/no, shapes, colours), so that half of them tell nothing of a yes/no
    question, or `any` (symmetric label noise). All follow `seed`. Raises DataError without the package.
    """
    package = _easy_vqa()
    questions, answers, image_ids = getattr(package, f"get_{split}_questions")()
    paths = getattr(package, f"get_{split}_image_paths")()
    chosen = list(range(len(questions)))
    if limit is not None:
        chosen = sorted(random.Random(f"subset {seed}").sample(chosen, min(limit, len(chosen))))
    noise = random.Random(f"noise {seed}")
    wrong = set(noise.sample(chosen, round(wrong_answers * len(chosen))))
    for number in chosen:
        answer = answers[number]
        given = noise.choice(_other_answers(answer, package.get_answers(), instead)) if number in wrong else answer
        yield {
            "id": f"{split}-{number:05d}",
            "conversations": [
                {"from": "human", "value": f"<image>\n{questions[number]}"},
                {"from": "gpt", "value": given},
            ],
            "type": "yes/no" if _kind(answer) == "yes/no" else "open",
            "images": [paths[image_ids[number]]],
        }


def _easy_vqa() -> Any:
    try:
        return importlib.import_module("easy_vqa")
    except ImportError as error:
        raise DataError("the package easy_vqa is not here: pip install --no-deps easy-vqa==1.0") from error


def _other_answers(answer: str, answers: Sequence[str], instead: Literal["kind", "any"]) -> list[str]:
    """Return all other answers, or the other ones of the same kind, in a fixed order."""
    return sorted(each for each in answers if each != answer and (instead == "any" or _kind(each) == _kind(answer)))


def _kind(answer: str) -> str:
    return "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "colour"
