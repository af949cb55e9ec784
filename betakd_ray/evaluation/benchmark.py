"""What a benchmark is: its questions, how an answer is judged, and which numbers it gives. Nothing here needs torch."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from betakd_ray.evaluation.question_files import DataFolder

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."

Processing = Literal["pad", "crop"]
"""Preparation of an image: padding to a square with the mean colour, or shorter side to size and centre crop."""
Sums = Mapping[str, Any]
"""Name of a count → its sum over the units: a number, or one number for each resample."""


@dataclass(frozen=True)
class Question:
    """One question of a benchmark: what the model is asked, what the answers file says of it, and its truth."""

    key: str
    """Text that no other question of the benchmark has."""
    text: str
    """Prompt after the image placeholder; the placeholder itself is there only if there is an image."""
    image: str | bytes | None
    """Path or URL of the image, its file's content, or None for a question without an image."""
    question_id: str | int
    """Identifier in the answers file; some benchmarks share it between questions."""
    prompt: str
    """Prompt in the answers file, as the public tools write it."""
    truth: Any
    """Ground truth, in the form that the benchmark's `judge` reads."""
    max_new_tokens: int
    processing: Processing = "pad"
    unit: str = ""
    """Name of the group that is right or wrong as a whole, and resampled as a whole; the key if it is empty."""
    stratum: str = ""
    """Name of the part of the benchmark whose size is fixed, such as a category of MME."""
    parts: tuple[str, ...] = ("accuracy",)
    """Names of the metrics to which this question belongs."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the line in the answers file."""

    @property
    def group(self) -> str:
        return self.unit or self.key


@dataclass(frozen=True)
class Verdict:
    """What an answer is worth."""

    value: float
    """Share of the full score, from 0 to 1."""
    parsed: bool = True
    """False if the rule found no answer in the text."""
    answered: bool = True
    """False if there is no answer to this question."""


@dataclass(frozen=True)
class Options:
    """What can be chosen in how a benchmark is asked."""

    ocr: bool | None = None
    """Whether TextVQA's questions have their line of OCR tokens; None leaves them as they are in the file."""


AS_IN_THE_FILE = Options()
"""Options with which every question is asked as its file has it."""


def of_parts(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return the counts of one unit for metrics that are means over units: 1, and its worst value, for each part."""
    worst = min(verdict.value for verdict in verdicts)
    parts = questions[0].parts
    return dict.fromkeys(parts, 1.0) | {f"{part} right": worst for part in parts}


def per_cent_right(sums: Sums) -> dict[str, Any]:
    """Return the mean of each part that `of_parts` counted, in per cent."""
    parts = [name for name in sums if not name.endswith(" right")]
    return {part: 100 * ratio(sums[f"{part} right"], sums[part]) for part in parts}


def ratio(part: Any, whole: Any, *, undefined: float = float("nan")) -> Any:
    """Return part / whole, element by element, and `undefined` where `whole` is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.where(whole == 0, undefined, part / np.where(whole == 0, 1.0, whole))


def by_id(line: Mapping[str, Any]) -> str:
    """Return the key of the question that a line of an answers file answers, where the id is enough."""
    return str(line["question_id"])


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as functions. The object is called BENCHMARK in a module of its own; the module has its name."""

    name: str
    questions: Callable[[DataFolder, Options], list[Question]]
    """Return the questions in the order of their file. Raises DataError for a file that is missing or damaged."""
    judge: Callable[[Question, str, str], Verdict]
    """Judge a text by a rule, which is one of `rules`."""
    key: Callable[[Mapping[str, Any]], str | None] = by_id
    """Return the key of the question that a line of an answers file answers; None for a line that is not scored.

    Raises ValueError if the line does not say it.
    """
    count: Callable[[Sequence[Question], Sequence[Verdict]], dict[str, float]] = of_parts
    """Count what the metrics need, for one unit of questions."""
    metrics: Callable[[Sums], dict[str, Any]] = per_cent_right
    """Compute every metric from the sums of the counts."""
    describe: Callable[[Sequence[Mapping[str, Any]], Options], Iterable[str]] = lambda lines, options: ()
    """Say of the lines of an answers file what a reader of the scores has to know.

    Raises DataError if the options say otherwise.
    """
    remarks: Callable[[Sequence[Question]], Iterable[str]] = lambda questions: ()
    """Say of the questions what a reader of the scores has to know."""
    rules: tuple[str, ...] = ("",)
    """Names of the rules that find the answer in a text; the first is the default."""
    primary: str = "accuracy"
    """Metric that stands for the benchmark in comparisons and in the average."""
    share: float = 1.0
    """Factor that turns the primary metric into per cent, for the average."""
    lmms: Mapping[str, str] = field(default_factory=dict)
    """Metric → its name in lmms-eval."""
    folders: tuple[str, ...] = ()
    """Names of the benchmark's folder in the public layouts, where `data` is the folder of several benchmarks."""


def answer_line(question: Question, text: str | None, model_id: str, *, reason: str | None = None) -> dict[str, Any]:
    """Return a line of an answers file, with the keys and the order of the public tools.

    `text` is None if the question could not be asked; then `reason` says why. Such a line has an empty text, and a mark
    in its metadata with which it counts as unanswered.
    """
    record = dict(question.record)
    first = {"question_id": question.question_id}
    if "round_id" in record:
        first["round_id"] = record.pop("round_id")
    metadata = {} if text is not None else {"answered": False} | ({"reason": reason} if reason else {})
    answer_id = hashlib.blake2b(f"{model_id}\0{question.key}".encode(), digest_size=11).hexdigest()
    said = {"prompt": question.prompt, "text": "" if text is None else text}
    return first | said | record | {"answer_id": answer_id, "model_id": model_id, "metadata": metadata}


def first_of(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Return at least `limit` of the first questions, in order, with their groups complete; all if it is None."""
    if limit is None:
        return list(questions)
    sizes: dict[str, int] = {}
    for question in questions:
        sizes[question.group] = sizes.get(question.group, 0) + 1
    chosen, total = set(), 0
    for group, size in sizes.items():
        if total >= limit:
            break
        chosen.add(group)
        total += size
    return [question for question in questions if question.group in chosen]
