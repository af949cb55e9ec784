"""GQA, testdev balanced: questions on scenes with one word or phrase as the answer, compared exactly."""

from dataclasses import dataclass

from pydantic import TypeAdapter

from betakd_ray.evaluation.benchmark import Benchmark, Options, Question, Verdict
from betakd_ray.evaluation.question_files import DataFolder, numbered, with_truth

QUESTIONS = "llava_gqa_testdev_balanced.jsonl"
ANNOTATIONS = "testdev_balanced_questions.json"


@dataclass(frozen=True)
class Row:
    question_id: str
    image: str
    text: str


@dataclass(frozen=True)
class Types:
    structural: str
    semantic: str


@dataclass(frozen=True)
class Annotation:
    answer: str
    types: Types

    @property
    def parts(self) -> tuple[str, ...]:
        kind = "open" if self.types.structural == "query" else "binary"
        return "accuracy", kind, f"structural[{self.types.structural}]", f"semantic[{self.types.semantic}]"


def questions(folder: DataFolder, options: Options) -> list[Question]:
    """Return the questions of the LLaVA file, with the answers of GQA's own file."""
    file = folder.find(QUESTIONS, source="LLaVA's eval.zip")
    annotations = folder.find(ANNOTATIONS, source="GQA's questions1.2.zip")
    rows = folder.json_lines(file, TypeAdapter(Row).validate_json)
    truths = with_truth(
        rows,
        folder.json(annotations, TypeAdapter(dict[str, Annotation]).validate_json),
        lambda row: row.question_id,
        f"{file} and {annotations}",
    )
    images = folder.look_for("images", "data/images") or f"{folder.url}/images"
    return [
        Question(
            key=key, text=row.text, image=f"{images}/{row.image}", question_id=row.question_id, prompt=row.text,
            truth=truth.answer, max_new_tokens=128, parts=truth.parts,
        )
        for key, row, truth in zip(numbered([row.question_id for row in rows]), rows, truths, strict=True)
    ]  # fmt: skip


def judge(question: Question, text: str, rule: str) -> Verdict:
    """Compare in lower case and without final periods; nothing else is stripped."""
    return Verdict(float(text.rstrip(".").lower() == question.truth), parsed=bool(text.strip()))


BENCHMARK = Benchmark(
    "gqa", questions, judge, folders=("gqa", "gqa/data", "data"), lmms={"accuracy": "gqa exact_match"}
)
