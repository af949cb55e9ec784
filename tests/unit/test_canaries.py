"""A canary while the job runs: when it is asked, that nothing waits for it, and what a wrong answer says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fakes import Behaviour, FakeTeacher
from betakd_ray.errors import OutputUnreachable, TeacherError
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.spec import StorageSpec, parse_spec
from betakd_ray.teacher.canary import Replica
from betakd_ray.teacher.ports import Roster, Unanswered
from betakd_ray.train import students
from betakd_ray.train.canaries import CanaryWatch
from betakd_ray.train.config import WorkerConfig
from tests.unit.test_replicas import CANARY

HERE = Replica("node-of-the-second", "cpu")
WRONG = {"hidden": 2 * CANARY.signal["hidden"]}


class Answer:
    """Pending with its answer, or that has none yet or never."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def result(self, timeout_s: float) -> Any:
        assert timeout_s == 0.0
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Asked(FakeTeacher):
    """One teacher that is a member, and the answers that it gives."""

    def __init__(self, answers: Callable[[int], Any]) -> None:
        super().__init__(4, Behaviour())
        self.questions, self._answers = 0, answers

    def apply(self, function: Any, *inputs: Any) -> Any:
        assert inputs == (CANARY.inputs,)
        self.questions += 1
        answer = self._answers(self.questions)
        return Answer(answer if isinstance(answer, Exception) else (answer, HERE))


def store_of(folder: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(str(folder / "run"), StorageSpec())
    files = folder / "files"
    files.mkdir(exist_ok=True)
    (files / "state").write_text("")
    for step in steps:
        name = f"step-{step:08d}-a"
        store.commit(store.manifest(name, step, 1, store.upload(files, name)))
    return store


def watch_of(teacher: Asked, store: CheckpointStore, every: int = 10) -> CanaryWatch:
    members: Any = {teacher.number: teacher}
    return CanaryWatch(CANARY, every, lambda: Answer(Roster(1, members, False)), store)


def poll(watch: CanaryWatch, steps: range) -> None:
    for step in steps:
        for _ in range(3):  # the roster, the question, the answer
            watch.poll(step)


def test_a_question_is_asked_once_every_so_many_steps(tmp_path: Path) -> None:
    teacher = Asked(lambda _: CANARY.signal)
    watch = watch_of(teacher, store_of(tmp_path))
    poll(watch, range(1, 10))
    assert teacher.questions == 1
    poll(watch, range(10, 60, 7))  # only some steps are seen
    assert teacher.questions == 1 + 5
    poll(watch, range(30, 40))  # the workers began again at an earlier checkpoint
    assert teacher.questions == 1 + 5 + 1


def test_nothing_waits_for_an_answer_and_one_question_is_open_at_a_time(tmp_path: Path) -> None:
    teacher = Asked(lambda _: TimeoutError())
    watch = watch_of(teacher, store_of(tmp_path))
    poll(watch, range(1, 1000))
    assert teacher.questions == 1


@pytest.mark.parametrize("signal", [WRONG, None], ids=["another answer", "not finite"])
def test_drift_stops_the_job_and_names_the_last_good_checkpoint(tmp_path: Path, signal: Any) -> None:
    teacher = Asked(lambda question: CANARY.signal if question < 4 else signal)
    watch = watch_of(teacher, store_of(tmp_path, 15, 25, 35), every=10)
    poll(watch, range(1, 30))
    with pytest.raises(TeacherError) as raised:
        poll(watch, range(30, 40))
    said = str(raised.value)
    assert "at step 30 the teacher on node-of-the-second" in said
    assert "last right answer was at step 20. Last good checkpoint: step-00000015-a." in said
    assert "remove the later ones" in said
    assert "step-00000025-a" in said
    assert "step-00000035-a" in said


def test_drift_before_the_first_checkpoint_says_that_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="Last good checkpoint: none"):
        poll(watch_of(Asked(lambda _: WRONG), store_of(tmp_path)), range(1, 3))


def test_drift_is_told_although_the_store_is_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path)

    def out() -> Any:
        raise OutputUnreachable("the store is out")

    monkeypatch.setattr(store, "committed", out)
    with pytest.raises(TeacherError, match=r"answered a checked sample differently.*the store is out"):
        poll(watch_of(Asked(lambda _: WRONG), store), range(1, 3))


def test_a_teacher_that_dies_of_the_question_is_left_to_the_pool(tmp_path: Path) -> None:
    teacher = Asked(lambda question: Unanswered("it died") if question == 1 else CANARY.signal)
    watch = watch_of(teacher, store_of(tmp_path))
    poll(watch, range(1, 12))
    assert teacher.questions == 2


def test_a_pool_without_members_is_asked_again_in_the_next_round(tmp_path: Path) -> None:
    asked: list[int] = []

    def roster() -> Answer:
        asked.append(1)
        return Answer(Roster(1, {}, True))

    poll(CanaryWatch(CANARY, 10, roster, store_of(tmp_path)), range(1, 25))
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("check", "is_watched"), [({}, True), ({"canary_every": 0}, False), ("off", False)], ids=["default", "none", "off"]
)
def test_the_spec_decides_whether_canaries_are_asked(tmp_path: Path, check: Any, is_watched: bool) -> None:
    spec = parse_spec(
        {
            "name": "job",
            "data": {"train": "/data/*.tar"},
            "teacher": {"path": "org/teacher", "check": check},
            "student": {"init": {"kind": "checkpoint", "path": "org/student"}},
            "objective": {"energies": "fkl"},
            "output": str(tmp_path),
        }
    )
    config = object.__new__(WorkerConfig)
    for name, value in {"spec": spec, "canary": CANARY, "pool": object(), "permit": PermitOf(str(tmp_path))}.items():
        object.__setattr__(config, name, value)
    assert (students._canaries(config) is not None) == is_watched


class PermitOf:
    def __init__(self, run: str) -> None:
        self.run = run
