"""ChartQA, test: questions on charts; a number may be five per cent off, other answers must be equal."""

from dataclasses import dataclass

from pydantic import TypeAdapter

from betakd_ray.evaluation.benchmark import Benchmark, Options, Question, Verdict
from betakd_ray.evaluation.question_files import DataFolder

SPLITS = {"human": "test_human.json", "augmented": "test_augmented.json"}
PROMPT = "\nAnswer the question with a single word."
_TOLERANCE = 0.05


@dataclass(frozen=True)
class Row:
    imgname: str
    query: str
    label: str


def questions(folder: DataFolder, options: Options) -> list[Question]:
    """Return the questions of both files, those of people first; the id is split and position."""
    source = "the ChartQA repository, ChartQA Dataset/test"
    files = {split: folder.find(name, source=source) for split, name in SPLITS.items()}
    images = folder.look_for("png") or f"{folder.url}/png"
    return [
        Question(
            key=f"{split}_{position}", text=row.query + PROMPT, image=f"{images}/{row.imgname}",
            question_id=f"{split}_{position}", prompt=row.query + PROMPT, truth=row.label, max_new_tokens=16,
            parts=("relaxed_overall", f"relaxed_{split}_split"),
        )
        for split, file in files.items()
        for position, row in enumerate(folder.json(file, TypeAdapter(list[Row]).validate_json))
    ]  # fmt: skip


def judge(question: Question, text: str, rule: str) -> Verdict:
    """Compare by `agrees`."""
    return Verdict(float(agrees(text, question.truth)), parsed=bool(text.strip()))


def agrees(text: str, label: str) -> bool:
    """Return whether both are numbers, at most five per cent apart, or otherwise equal in lower case."""
    number, true = _number(text), _number(label)
    if number is not None and true:  # nothing is five per cent off zero
        return abs(number - true) / abs(true) <= _TOLERANCE
    return text.lower() == label.lower()


def _number(text: str) -> float | None:
    """Return the number that the whole text is; None for any other text, also for one with thousands separators."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


BENCHMARK = Benchmark(
    "chartqa", questions, judge, primary="relaxed_overall",
    folders=("chartqa", "ChartQA", "ChartQA Dataset/test", "test"),
    lmms={name: f"chartqa {name}" for name in ("relaxed_overall", "relaxed_human_split", "relaxed_augmented_split")},
)  # fmt: skip
