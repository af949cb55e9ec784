"""Exact match: an answer is correct if it equals the reference, apart from case and a full stop at the end."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelAnswer:
    """Answer of one model to one question."""

    text: str | None
    """Prediction of the model; None if the question could not be asked."""
    reference: str | None
    """Last gpt turn of the sample; None if the sample could not be read."""
    type: str | None = None
    """Kind of question; None if the data do not give it."""

    @property
    def correct(self) -> bool:
        return agree(self.text, self.reference)


def normalized(text: str) -> str:
    return text.strip().lower().removesuffix(".").rstrip()


def agree(one: str | None, other: str | None) -> bool:
    """Return whether two answers are the same. A missing answer (None) agrees with nothing."""
    return one is not None and other is not None and normalized(one) == normalized(other)


def score(answers: Sequence[ModelAnswer]) -> dict[str, float]:
    """Return the overall `accuracy`, the `accuracy[type]` of each type, and the number of `unanswerable` samples.

    Accuracies are between 0 and 1. Unanswerable samples count as wrong. Raises ValueError if there are none.
    """
    if not answers:
        raise ValueError("accuracy of no answers: give at least one")
    by_type: dict[str, list[ModelAnswer]] = defaultdict(list)
    for answer in answers:
        if answer.type is not None:
            by_type[answer.type].append(answer)
    metrics = {"accuracy": _accuracy(answers)}
    metrics |= {f"accuracy[{kind}]": _accuracy(by_type[kind]) for kind in sorted(by_type)}
    return metrics | {"unanswerable": float(sum(answer.text is None for answer in answers))}


def agreement(texts: Sequence[str | None], others: Sequence[str | None]) -> float:
    """Return the share of the questions to which two models give the same answer, from 0 to 1."""
    return sum(agree(one, other) for one, other in zip(texts, others, strict=True)) / len(texts)


def _accuracy(answers: Sequence[ModelAnswer]) -> float:
    return sum(answer.correct for answer in answers) / len(answers)
