"""The workers of an evaluation: how many there are, what they get, and what happens when one dies."""

from collections import Counter
from typing import Any

import pytest

from betakd_ray.errors import ModelError, TrainingError
from betakd_ray.evaluation import crew
from betakd_ray.evaluation.benchmark import Question
from betakd_ray.evaluation.crew import MAX_DEATHS, Chunk, Crew
from betakd_ray.evaluation.pieces import Reply
from betakd_ray.evaluation.suite import chunked
from tests.asked import Died, Local


class TaskError(Exception):
    """Stands for Ray's error of a call that raised."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class Echo:
    """Worker that answers with its label and the question's key."""

    def __init__(self, label: str) -> None:
        self.label = label

    def load(self) -> None:
        if self.label == "broken":
            raise TaskError(ModelError("cannot be loaded"))

    def answer(self, questions: Any) -> list[Reply]:
        return [Reply(f"{self.label} {each.key}") for each in questions]


def question(number: int, image: str | None = "a.png") -> Question:
    return Question(f"{number}", "What?" * number, image, number, "", None, 8)


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Local:
    made = Local()
    monkeypatch.setattr(crew, "ray", made)
    monkeypatch.setattr(crew, "RayActorError", Died)
    monkeypatch.setattr(crew, "RayTaskError", TaskError)
    return made


def answered(local: Local, places: int, chunks: dict[str, int]) -> tuple[Counter[str], Counter[str]]:
    """Return how often each answer came, and how many workers each model had."""
    started: Counter[str] = Counter()
    replies: Counter[str] = Counter()

    def start(label: str) -> Any:
        started[label] += 1
        return local.actor(Echo(label))

    given = {label: [Chunk(label, [f"{at}"], [question(at)]) for at in range(count)] for label, count in chunks.items()}
    Crew(start, places, given).run(lambda _, said: replies.update(str(each.text) for each in said), lambda: None)
    assert not local.alive, "every worker is ended"
    return replies, started


@pytest.mark.parametrize("places", [1, 2, 3, 8])
def test_every_question_is_answered_once_by_its_own_model(local: Local, places: int) -> None:
    replies, started = answered(local, places, {"a": 5, "b": 1, "c": 9})
    assert replies == Counter(
        f"{label} {at}" for label, count in {"a": 5, "b": 1, "c": 9}.items() for at in range(count)
    )
    assert local.most_alive <= places
    assert started["b"] == 1


def test_a_model_is_loaded_once_if_there_is_one_place(local: Local) -> None:
    assert answered(local, 1, {"a": 20, "b": 20})[1] == {"a": 1, "b": 1}


def test_the_chunks_of_a_dead_worker_are_answered_by_another(local: Local) -> None:
    calls = Counter[str]()

    def dies(name: str) -> bool:
        calls[name] += 1
        return name == "answer" and calls[name] in (1, 4)

    local.dies = dies
    local.kill = lambda actor: local.alive.remove(actor)  # type: ignore[method-assign]
    replies, _ = _with_dead(local, {"a": 6})
    assert replies == Counter(f"a {at}" for at in range(6))


def _with_dead(local: Local, chunks: dict[str, int]) -> tuple[Counter[str], int]:
    replies: Counter[str] = Counter()
    given = {label: [Chunk(label, [f"{at}"], [question(at)]) for at in range(count)] for label, count in chunks.items()}
    Crew(lambda label: local.actor(Echo(label)), 2, given).run(
        lambda _, said: replies.update(str(each.text) for each in said), lambda: None
    )
    return replies, len(local.alive)


def test_workers_that_die_again_and_again_end_the_evaluation(local: Local) -> None:
    local.dies = lambda name: name == "answer"
    with pytest.raises(TrainingError, match=rf"models.a: {MAX_DEATHS + 1} processes died .* run it again"):
        _with_dead(local, {"a": 6})


def test_an_error_of_a_worker_is_raised_as_it_is_and_the_others_are_ended(local: Local) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        answered(local, 2, {"a": 1, "broken": 4})
    assert not local.alive


def test_a_chunk_has_questions_of_similar_length_and_one_kind() -> None:
    questions = [question(at, "a.png" if at % 2 else None) for at in range(10)]
    chunks = chunked("a", {each.key: each for each in questions}, 5)
    assert [{each.image for each in chunk.questions} for chunk in chunks] == [{"a.png"}, {None}]
    assert all([len(each.text) for each in chunk.questions] == sorted(len(each.text) for each in chunk.questions)[::-1]
               for chunk in chunks)  # fmt: skip
    assert sorted(int(each.key) for chunk in chunks for each in chunk.questions) == list(range(10))
