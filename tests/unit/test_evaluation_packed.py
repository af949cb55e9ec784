"""Scores of packed question sets: intervals, comparisons of models, and the tables and files that have them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from betakd_ray.cli import print_result
from betakd_ray.data.pack import pack
from betakd_ray.evaluation.exact_match import ModelAnswer, score
from betakd_ray.evaluation.packed import comparisons_of, intervals_of, shares, tables_of, tally_of
from betakd_ray.evaluation.result import RESULT, TABLE, Result, Subject
from betakd_ray.evaluation.run import Answered, Evaluation
from betakd_ray.spec import EvaluationSpec, parse_spec

COUNT = 400


def answers(share: float, *, seed: int = 0, kind: str | None = None) -> list[ModelAnswer]:
    """Return answers of which about this share is right; the same questions are hard for every model of a seed."""
    luck = np.random.default_rng(seed).random(COUNT)
    return [ModelAnswer("yes" if each < share else "no", "yes", kind) for each in luck]


def test_the_shares_are_those_of_exact_match() -> None:
    asked = [*answers(0.7, kind="yes/no"), *answers(0.4, seed=1, kind="open"), ModelAnswer(None, None)]
    found = {name: float(value) for name, value in tally_of(asked).metrics(shares).items()}
    assert found == pytest.approx({name: value for name, value in score(asked).items() if name != "unanswerable"})


def test_an_interval_is_as_wide_as_the_binomial_one() -> None:
    low, high = intervals_of({"one": answers(0.8)}, None)["one"]["accuracy"]
    share = score(answers(0.8))["accuracy"]
    assert low < share < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / COUNT), rel=0.1)


def test_the_agreement_has_an_interval_except_for_the_model_itself() -> None:
    found = intervals_of({"teacher": answers(0.9), "student": answers(0.8)}, "teacher")
    assert "agreement" not in found["teacher"]
    low, high = found["student"]["agreement"]
    assert low < 0.9 < high


def test_models_are_compared_two_by_two_on_the_same_questions() -> None:
    found = comparisons_of({"teacher": answers(0.9), "alone": answers(0.8), "distilled": answers(0.85)})
    assert [(each.model, each.compared_with) for each in found] == [
        ("alone", "teacher"), ("distilled", "teacher"), ("distilled", "alone")
    ]  # fmt: skip
    better = found[-1]
    assert better.low < better.difference < better.high
    assert better.difference == pytest.approx(score(answers(0.85))["accuracy"] - score(answers(0.8))["accuracy"])
    assert better.p < 0.001, "the same questions are right, and some more"
    assert comparisons_of({"a": answers(0.5), "b": answers(0.5)})[0].p == 1


def _evaluation(home: Path, **changed: Any) -> Evaluation:
    """Return an evaluation whose models need not exist, on shards that do."""
    turns = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes"}]
    pack([{"id": str(at), "conversations": turns} for at in range(8)], str(home / "shards"), prefix="val", total=8)
    tree = {"name": "e", "data": {"train": str(home / "shards" / "val-*.tar")}, "output": str(home)}
    tree |= {"models": {label: {"path": f"/{label}"} for label in ("alone", "distilled")}, "agreement_with": "alone"}
    return Evaluation(parse_spec(tree | changed, EvaluationSpec))


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> Evaluation:
    made = _evaluation(tmp_path, **changed)
    both = {"alone": answers(0.6), "distilled": answers(0.8)}
    said = {label: [Answered(str(at), "Is it?", each) for at, each in enumerate(own)] for label, own in both.items()}
    monkeypatch.setattr(Evaluation, "_answer", lambda self, shards: said)
    monkeypatch.setattr(Subject, "of", lambda *_: Subject(dict.fromkeys(both, "0"), "0"))
    return made


def test_the_result_has_intervals_and_comparisons_in_its_files(evaluated: Evaluation) -> None:
    result = evaluated.result()
    stored = json.loads(Path(evaluated.folder, RESULT).read_text())
    assert stored["intervals"]["distilled"].keys() == {"accuracy", "agreement"}
    assert stored["comparisons"][0]["difference"] == pytest.approx(0.2, abs=0.05)
    table = Path(evaluated.folder, TABLE).read_text()
    assert "| model | accuracy | agreement |" in table
    assert "compared with" in table
    assert evaluated.stored() == result.scores


def test_the_tables_are_printed_for_people_and_as_markdown(
    evaluated: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluated.result()
    print_result(result, markdown=True)
    print_result(result)
    printed = capsys.readouterr().out
    assert printed.count("95% interval") == 2
    low, high = result.intervals["distilled"]["accuracy"]
    assert f"({low:.3f} to {high:.3f})" in printed


def test_a_benchmark_of_ones_own_has_its_numbers_alone(
    tmp_path: Path, evaluated: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_scoring.py").write_text("def count(answers):\n    return {'answers': float(len(answers))}\n")
    result = _evaluation(tmp_path / "own", benchmark="own_scoring:count").result()
    assert result.scores["alone"] == {"answers": COUNT}
    assert not result.intervals
    ((header, first, second),) = tables_of(result)
    assert header == ["model", "answers", "agreement"]
    assert first == ["alone", "400", ""]
    assert second[:2] == ["distilled", "400"]


def test_a_result_of_a_former_version_is_read(evaluated: Evaluation) -> None:
    subject = Subject({"alone": "0", "distilled": "0"}, "0")
    scores = {label: {"accuracy": 0.5} for label in subject.models}
    content = json.loads(Result(scores, subject).to_json())
    Path(evaluated.folder).mkdir(exist_ok=True)
    Path(evaluated.folder, RESULT).write_text(json.dumps({name: content[name] for name in ("scores", "subject")}))
    assert evaluated.stored() == scores
