"""Answers files of the LLaVA tool chain: read, checked, and joined with a benchmark's questions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from betakd_ray.errors import DataError, did_you_mean, shortened
from betakd_ray.evaluation.benchmark import Benchmark, Question
from betakd_ray.evaluation.question_files import DataFolder, json_object, lines
from betakd_ray.spec import StorageSpec


@dataclass(frozen=True)
class AnswerFile:
    """Content of an answers file."""

    url: str
    rows: list[tuple[int, dict[str, Any]]]
    """Number and content of each line."""

    @property
    def label(self) -> str:
        """Return the model that the lines name; the file's own name if they name none or several."""
        models = {str(row.get("model_id") or "") for _, row in self.rows}
        model = models.pop() if len(models) == 1 else ""
        return model or self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Answered:
    """The answers to a benchmark's questions."""

    texts: list[str | None]
    """Answer to each question, in the order of the questions; None if there is none."""
    lines: list[dict[str, Any]]
    """Lines that were scored."""
    missing: int
    """Number of questions that have no line."""
    unanswered: int
    """Number of questions whose line says that they could not be asked."""
    repeated: int
    """Number of lines that a later line of the same question replaces."""


def read_answers(url: str, storage: StorageSpec) -> AnswerFile:
    """Read an answers file. Raises DataError, which names the line, for one that is no answer."""
    text = DataFolder(url, storage).text(url)
    return AnswerFile(url, [(number, _row(line, f"{url}, line {number}")) for number, line in lines(text, url)])


def joined(
    benchmark: Benchmark, questions: Sequence[Question], file: AnswerFile, others: Sequence[Question] = ()
) -> Answered:
    """Join answers with questions by their keys; their order does not matter, and the last line of a key counts.

    Lines that answer one of the `others` are left out. Raises DataError if a line answers no question at all: the file
    may be of other questions.
    """
    known = Counter(question.key.partition("\0")[0] for question in questions)
    left_out = {question.key.partition("\0")[0] for question in others} - known.keys()
    counted: Counter[str] = Counter()
    last: dict[str, dict[str, Any]] = {}
    strangers: list[tuple[int, Any]] = []
    scored = []
    for number, row in file.rows:
        try:
            key = benchmark.key(row)
        except ValueError as error:
            raise DataError(f"{file.url}, line {number}: {error}") from error
        if key is None or key in left_out:
            continue
        if key not in known:
            strangers.append((number, row["question_id"]))
        counted[key] += 1
        last[key] = row
        scored.append(row)
    if strangers:
        raise _unknown(benchmark, file, strangers, [str(question.question_id) for question in questions])
    texts = [_text(last.get(question.key.partition("\0")[0])) for question in questions]
    missing = sum(question.key.partition("\0")[0] not in last for question in questions)
    return Answered(
        texts,
        scored,
        missing=missing,
        unanswered=sum(text is None for text in texts) - missing,
        repeated=sum(max(0, count - known[key]) for key, count in counted.items()),
    )


def _row(line: str, where: str) -> dict[str, Any]:
    row = json_object(line, where)
    for name, kinds in (("question_id", (str, int)), ("text", (str,))):
        if name not in row:
            raise DataError(f"{where}: lacks {name}; expected an answer with question_id and text")
        if not isinstance(row[name], kinds) or isinstance(row[name], bool):
            expected = " or ".join("a number" if kind is int else "a text" for kind in kinds)
            raise DataError(f"{where}: {name} is {shortened(row[name])}; expected {expected}")
    return row


def _text(row: dict[str, Any] | None) -> str | None:
    if row is None:
        return None
    metadata = row.get("metadata")
    could_not_be_asked = isinstance(metadata, dict) and metadata.get("answered") is False
    return None if could_not_be_asked else row["text"]


def _unknown(benchmark: Benchmark, file: AnswerFile, strangers: list[tuple[int, Any]], ids: list[str]) -> DataError:
    number, first = strangers[0]
    hint = did_you_mean(str(first), ids[:5000])
    same = str(first) in ids
    why = "has the id, but not this question in its prompt" if same else f"has the id {first!r}"
    return DataError(
        f"{file.url}, line {number}: no question of {benchmark.name} {why}" + (f"; {hint}" if hint and not same else "")
        + f". {len(strangers)} of {len(file.rows)} lines answer no question of these files. Score them with the "
        "question file that they were made with."
    )  # fmt: skip
