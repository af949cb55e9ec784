"""Evaluation on benchmarks: every question is asked once, a kill costs nothing, and bad input is refused early."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from betakd_ray.errors import DataError, Interrupted, ModelError, SpecError
from betakd_ray.evaluation import crew, suite, worker
from betakd_ray.evaluation.pieces import REPLIES
from betakd_ray.evaluation.suite import ANSWERS, Suite
from betakd_ray.spec import BenchmarksSpec, parse_spec
from tests.asked import NAME, QUESTIONS, Died, Local, scores_of, write_questions
from tests.families import FAMILIES, build
from tests.tiny import tiny_config, tiny_processor

COUNT = 11


def save_model(folder: Path, seed: int) -> None:
    """Write a LLaVA with large weights; with the usual ones, every question would have the same answer."""
    build(tiny_config().to_dict(), seed=seed).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_model(tmp_path / "one", seed=1)
    save_model(tmp_path / "two", seed=2)
    write_questions(tmp_path / "data", COUNT)
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace Ray by calls in this process; return the keys of the questions that are asked."""
    keys: list[str] = []

    class Watched(worker.AnsweringWorker):
        def answer(self, questions: Any) -> Any:
            keys.extend(each.key for each in questions)
            return super().answer(questions)

    local = Local()
    monkeypatch.setattr(crew, "ray", local)
    monkeypatch.setattr(crew, "RayActorError", Died)
    monkeypatch.setattr(suite, "connected", lambda spec: nullcontext())
    monkeypatch.setattr(Suite, "_places", lambda self, chunks: 2)
    monkeypatch.setattr(Suite, "_worker", lambda self: lambda label: local.actor(Watched(self.spec, label)))
    return keys


def made(home: Path, **changed: Any) -> Suite:
    tree = {"models": {"one": {"path": str(home / "one")}}, "benchmarks": NAME, "data": str(home / "data")}
    tree |= {"output": str(home / "out"), "batch_size": 3, "template": "vicuna_v1"}
    return Suite(parse_spec(tree | changed, BenchmarksSpec))


def lines(home: Path, label: str = "one") -> list[dict[str, Any]]:
    file = home / "out" / "evaluation" / ANSWERS / label / "colours.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_answers_are_in_the_order_of_the_questions_and_those_of_batch_size_1(home: Path, asked: list[str]) -> None:
    (scored,) = made(home, batch_size=1, output=str(home / "alone")).run()
    alone = [json.loads(line)["text"] for line in (home / "alone/evaluation/answers/one/colours.jsonl").open()]
    assert made(home).run()[0].metrics == scored.metrics
    assert [line["text"] for line in lines(home)] == alone
    assert [line["question_id"] for line in lines(home)] == [f"q{number}" for number in range(COUNT)]
    assert len(set(alone)) > 1
    assert sorted(asked) == sorted(2 * [f"q{number}" for number in range(COUNT)])


def test_an_evaluation_that_was_stopped_goes_on_with_the_questions_that_are_left(
    home: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(home)
    answer = worker.AnsweringWorker.answer

    def stopping(self: Any, questions: Any) -> Any:
        if len(asked) > 6:
            first.stop()
        return answer(self, questions)

    with monkeypatch.context() as patch:
        patch.setattr(worker.AnsweringWorker, "answer", stopping)
        with pytest.raises(Interrupted, match="run it again to go on"):
            first.run()
    before = len(asked)
    assert 0 < before < COUNT
    made(home).run()
    assert len(asked) < 2 * COUNT
    assert len({line["answer_id"] for line in lines(home)}) == COUNT
    asked.clear()
    made(home).run()
    assert not asked, "all replies are kept"


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_killed_in_the_middle_answers_as_without_a_kill_and_as_one_question_at_a_time(
    home: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    family = FAMILIES[name]
    for module in (suite, worker):
        monkeypatch.setattr(module, "load_processor", lambda _: family.processor())
    monkeypatch.setattr(worker, "load_model", lambda *_, **__: build(family.config()))
    monkeypatch.setattr(suite, "require_images", lambda *_: None)
    options = {"template": None, "max_new_tokens": 20}
    made(home, batch_size=1, output=str(home / "alone"), **options).run()
    alone = (home / "alone/evaluation/answers/one/colours.jsonl").read_text()
    asked.clear()
    killed = made(home, batch_size=4, **options)
    killed._stop.check = _killing(lambda: len(asked) > 4, killed._stop.check)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    assert 0 < len(asked) < COUNT
    made(home, batch_size=5, **options).run()
    assert (home / "out/evaluation/answers/one/colours.jsonl").read_text() == alone
    assert len({json.loads(line)["text"] for line in alone.splitlines()}) > 1


def _killing(is_due: Callable[[], bool], check: Callable[[], None]) -> Callable[[], None]:
    def killed() -> None:
        if is_due():
            raise KeyboardInterrupt
        check()

    return killed


def test_only_what_another_evaluation_has_not_asked_is_asked(home: Path, asked: list[str]) -> None:
    made(home, limit=4).run()
    assert len(lines(home)) == len(asked) == 4
    asked.clear()
    made(home).run()
    assert sorted(asked) == sorted(f"q{number}" for number in range(4, COUNT))
    asked.clear()
    made(home, max_new_tokens=2).run()
    assert len(asked) == COUNT, "another limit is another question"


def test_replies_of_another_model_or_template_are_not_taken(home: Path, asked: list[str]) -> None:
    made(home).run()
    for changed in ({"template": "chat"}, {"system_prompt": "Be brief."}):
        asked.clear()
        made(home, **changed).run()
        assert len(asked) == COUNT
    save_model(home / "one", seed=3)
    asked.clear()
    made(home).run()
    assert len(asked) == COUNT


def test_several_models_have_a_file_each_and_are_compared(home: Path, asked: list[str]) -> None:
    models = {label: {"path": str(home / label)} for label in ("one", "two")}
    made(home, models=models).run()
    assert [line["model_id"] for line in lines(home, "two")] == ["two"] * COUNT
    found = scores_of(home / "out" / "evaluation")
    assert found["scores"].keys() == found["subject"]["models"].keys() == {"one", "two"}
    assert "colours/accuracy" in found["scores"]["two"]
    assert "compared with" in (home / "out/evaluation/evaluation.md").read_text()


@pytest.mark.parametrize("damage", ["missing", "cut", "text"])
def test_pictures_that_cannot_be_read_are_refused_before_a_model_is_loaded(
    home: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(worker, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    for number in (3, 4):
        file = home / "data" / f"{number}.png"
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:60] if damage == "cut" else b"no picture")
    with pytest.raises(DataError, match=rf"2 of 8 pictures .*{home}/data/3.png"):
        made(home).run()
    Image.new("RGB", (4, 4)).save(home / "data" / "3.png")
    with pytest.raises(DataError, match="1 of 8 pictures"):
        made(home).run()


def test_a_question_that_cannot_be_asked_has_an_empty_answer_and_the_reason(home: Path, asked: list[str]) -> None:
    rows = [json.loads(line) for line in (home / "data" / QUESTIONS).read_text().splitlines()]
    rows[2]["text"] = "What is <image>?"
    (home / "data" / QUESTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (scored,) = made(home).run()
    assert scored.counts["unanswered"] == 1
    assert lines(home)[2]["text"] == ""
    assert "placeholder" in lines(home)[2]["metadata"]["reason"]


def test_what_is_wrong_is_named_before_anything_is_asked(home: Path, asked: list[str]) -> None:
    with pytest.raises(SpecError, match="no 'gqu'; did you mean 'gqa'"):
        made(home, benchmarks="gqu")
    with pytest.raises(SpecError, match="rule"):
        made(home, rule="strict")
    with pytest.raises(ModelError):
        made(home, models={"none": {"path": str(home / "nowhere")}}).run()
    (home / "data" / QUESTIONS).unlink()
    with pytest.raises(DataError, match=QUESTIONS):
        made(home).run()
    assert not asked


def test_a_damaged_piece_costs_its_own_questions_alone(home: Path, asked: list[str]) -> None:
    killed = made(home)
    killed._stop.check = _killing(lambda: len(asked) > 6, killed._stop.check)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    pieces = list((home / "out" / "evaluation" / REPLIES).rglob("*.json"))
    assert pieces
    pieces[0].write_text(pieces[0].read_text()[:-4])
    asked.clear()
    made(home).run()
    assert 0 < len(asked) <= COUNT
    assert len(lines(home)) == COUNT
