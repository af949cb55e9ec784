"""MME: two yes/no questions on each image, in fourteen categories; points for each answer and for both right."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from betakd_ray.errors import DataError
from betakd_ray.evaluation.benchmark import SHORT_ANSWER, Benchmark, Options, Question, Sums, Verdict, ratio
from betakd_ray.evaluation.question_files import DataFolder, numbered, with_truth

QUESTIONS, TRUTH = "llava_mme.jsonl", "MME_Benchmark_release_version"
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_YES_OR_NO = "Please answer yes or no."


@dataclass(frozen=True)
class Row:
    question_id: str
    image: str
    text: str
    category: str


def questions(folder: DataFolder, options: Options) -> list[Question]:
    """Return the questions of the LLaVA file, with the answers of MME's own text files."""
    file = folder.find(QUESTIONS, source="LLaVA's eval.zip")
    rows = folder.json_lines(file, TypeAdapter(Row).validate_json)
    if unknown := {row.category for row in rows} - {*PERCEPTION, *COGNITION}:
        raise DataError(f"{file}: category {min(unknown)!r} is none of {', '.join((*PERCEPTION, *COGNITION))}")
    images = folder.find(TRUTH, "images", source="MME's authors, on request: MME_Benchmark_release_version.zip")
    keys = [_key(row.question_id, row.text) for row in rows]
    truths = with_truth(
        [(row.category, _stem(row.image), question_of(row.text)) for row in rows], _truth(folder, images),
        lambda asked: asked, f"{file} and the .txt files of {images}",
    )  # fmt: skip
    return [
        Question(
            key=key, text=row.text, image=f"{images}/{row.image}", question_id=row.question_id, prompt=row.text,
            truth=truth, max_new_tokens=128, unit=row.question_id, stratum=row.category,
        )
        for key, row, truth in zip(numbered(keys), rows, truths, strict=True)
    ]  # fmt: skip


def judge(question: Question, text: str, rule: str) -> Verdict:
    """Compare yes or no; an answer with neither is wrong."""
    found = said(text)
    return Verdict(float(found == question.truth), parsed=found is not None)


def said(text: str) -> str | None:
    """Return yes or no if the text is that, or has it in its first four characters; otherwise None."""
    begin = text.replace("\n", "").replace("\t", "").lower()[:4]
    return "yes" if "yes" in begin else "no" if "no" in begin else None


def key(line: Mapping[str, Any]) -> str:
    """Return image and question, because the two questions on an image share its id."""
    if not isinstance(line.get("prompt"), str):
        raise ValueError("lacks prompt, a text; two questions share a question_id, and the prompt tells them apart")
    return _key(str(line["question_id"]), line["prompt"])


def question_of(prompt: str) -> str:
    """Return the question without what tells the model how to answer: the public files differ in that."""
    text = prompt.removeprefix("<image>\n").split(SHORT_ANSWER.strip())[0]
    return text.strip().removesuffix(_YES_OR_NO).strip()


def count(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Count questions and right answers of an image, and the image if all its answers are right."""
    values = [verdict.value for verdict in verdicts]
    category = questions[0].stratum
    return {
        f"{category} questions": float(len(values)), f"{category} right": sum(values),
        f"{category} images": 1.0, f"{category} both": min(values),
    }  # fmt: skip


def metrics(sums: Sums) -> dict[str, Any]:
    """Return the points of each category, at most 200, and their sums."""
    present = {name.rpartition(" ")[0] for name in sums}
    scores = {}
    for category in (name for name in (*PERCEPTION, *COGNITION) if name in present):
        right, both = (
            ratio(sums[f"{category} {part}"], sums[f"{category} {whole}"])
            for part, whole in (("right", "questions"), ("both", "images"))
        )
        scores[category] = 100 * right + 100 * both
    totals = {
        name: sum(scores[category] for category in group if category in scores)
        for name, group in (("perception", PERCEPTION), ("cognition", COGNITION))
        if present & set(group)
    }
    return totals | {f"score[{category}]": value for category, value in scores.items()}


def remarks(questions: Sequence[Question]) -> Iterable[str]:
    """Name the categories that lack in the questions, and images with another number of questions than two."""
    present = {question.stratum for question in questions}
    if lacking := [name for name in (*PERCEPTION, *COGNITION) if name not in present]:
        yield f"without the categories {', '.join(lacking)}: sums are smaller by up to 200 points for each"
    odd = sum(size != 2 for size in Counter(question.unit for question in questions).values())
    if odd:
        yield f"{odd} images have another number of questions than two"


def _truth(folder: DataFolder, root: str) -> dict[tuple[str, str, str], str]:
    """Return category, name of the image and question → yes or no."""
    found = {}
    for path, text in folder.texts(root, ".txt").items():
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            question, _, answer = line.strip().rpartition("\t")
            label = answer.strip().lower().rstrip(".")
            if label not in ("yes", "no"):
                raise DataError(f"{root}/{path}, line {number}: is {line!r}; expected a question, a tab, and Yes or No")
            found[path.split("/")[0], _stem(path), question_of(question)] = label
    return found


def _stem(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[0]


def _key(image: str, prompt: str) -> str:
    return f"{image} {question_of(prompt)}"


BENCHMARK = Benchmark(
    "mme", questions, judge, key=key, count=count, metrics=metrics, remarks=remarks, primary="perception", share=1 / 20,
    folders=("mme", "MME"), lmms={"perception": "mme_perception_score", "cognition": "mme_cognition_score"},
)  # fmt: skip
