"""Exact match: an answer is right when it is the reference, but for case and a full stop at the end."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One question as one model answered it."""

    text: str | None
    """The prediction; None where the sample could not be asked."""
    reference: str | None
    """The last gpt turn; None where the sample could not be read."""
    type: str | None = None
    """The kind of question, for data that says it."""

    @property
    def correct(self) -> bool:
        return agree(self.text, self.reference)


def normalized(text: str) -> str:
    return text.strip().lower().removesuffix(".").rstrip()


def agree(one: str | None, other: str | None) -> bool:
    """Whether two answers are the same; what was not answered agrees with nothing."""
    return one is not None and other is not None and normalized(one) == normalized(other)


def score(records: Sequence[Record]) -> dict[str, float]:
    """Accuracy overall and, as `accuracy[type]`, of each type; and how many samples were `unanswerable`.

    Unanswerable samples count as wrong. Raises ValueError when there are no records.
    """
    if not records:
        raise ValueError("accuracy of no answers: give at least one record")
    by_type: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.type is not None:
            by_type[record.type].append(record)
    metrics = {"accuracy": _accuracy(records)}
    metrics |= {f"accuracy[{kind}]": _accuracy(by_type[kind]) for kind in sorted(by_type)}
    return metrics | {"unanswerable": float(sum(record.text is None for record in records))}


def agreement(texts: Sequence[str | None], others: Sequence[str | None]) -> float:
    """Share of the questions to which two models give the same answer."""
    return sum(agree(one, other) for one, other in zip(texts, others, strict=True)) / len(texts)


def _accuracy(records: Sequence[Record]) -> float:
    return sum(record.correct for record in records) / len(records)
