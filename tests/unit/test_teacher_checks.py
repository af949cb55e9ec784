"""The checks of a job's models as the driver makes them: what is stored, printed and refused. Without Ray."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError
from typer.testing import CliRunner

from betakd_ray import job as job_module
from betakd_ray.check.canary import Canary
from betakd_ray.check.finding import Finding
from betakd_ray.cli import app
from betakd_ray.data.mixture import find_passes
from betakd_ray.data.pack import pack
from betakd_ray.data.plan import Plan
from betakd_ray.data.shards import Shard
from betakd_ray.errors import ModelUnfit, OutputError, TeacherError
from betakd_ray.models.load import load_processor
from betakd_ray.models.student import build_student
from betakd_ray.run.folder import CANARY as CANARY_NAME
from betakd_ray.run.folder import CHECKS
from betakd_ray.run.lease import Permit
from betakd_ray.run.records import CheckRecord, Checks
from betakd_ray.sigterm import StopRequest
from betakd_ray.spec import CheckSpec, JobSpec, StorageSpec, parse_spec
from betakd_ray.teacher.canary import KnownAnswer, Replica
from betakd_ray.teacher.parts import Needs
from betakd_ray.teacher.ports import Roster
from betakd_ray.teacher.remote import RemoteTeacher
from betakd_ray.teacher.scorer import TeacherScorer
from betakd_ray.teacher.sharing import Teachers
from betakd_ray.train import teacher_checks as module
from betakd_ray.train.check_files import first_answer, keep_first_answer, read_checks
from betakd_ray.train.config import WorkerConfig
from betakd_ray.train.export import model_card
from betakd_ray.train.teacher_checks import Examined, TeacherCheck, ask_teacher, check_new_student, examine, portions
from tests.actors import Local
from tests.tiny import numbered_samples, raw_sample, save_tiny
from tests.unit.test_replicas import CANARY

OK = Finding("parity", "0", "0", "ok")
DOUBT = Finding("sight", "it moves nothing", "it moves something", "doubt", "no tower", "Fetch it.")
FAIL = Finding("weights", "zeros | everywhere", "numbers", "fail", "a cut file", "Copy it again.")
HERE = Replica("node-a", "cpu", {"torch": "2"})
PLAN = Plan((Shard("/data/a.tar", 4, 100, "0a"),), 1, 0, True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_tiny(folder / "teacher", seed=1)
    save_tiny(folder / "student", seed=2)
    pack(numbered_samples(24), str(folder / "shards"), samples_per_shard=5)
    return folder


def spec_of(home: Path, output: Path, check: Any = None) -> JobSpec:
    return parse_spec(
        {
            "name": "job",
            "data": {"train": str(home / "shards" / "train-*.tar")},
            "teacher": {
                "path": str(home / "teacher"),
                "check": {"samples": 4, "answers": 8} if check is None else check,
            },
            "student": {"init": {"kind": "checkpoint", "path": str(home / "student")}},
            "objective": {"energies": "fkl"},
            "training": {"global_batch_size": 4, "micro_batch_size": 4},
            "output": str(output),
        }
    )


def plan_of(spec: JobSpec) -> Plan:
    return Plan.of(find_passes(spec.data), 1, 0, True)


@pytest.fixture
def permit(tmp_path: Path) -> Permit:
    (tmp_path / "run").mkdir()
    return Permit(str(tmp_path / "run"), StorageSpec(), 5)


@pytest.fixture(autouse=True)
def _holds_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Permit, "check", lambda self: None)


@pytest.fixture
def checked(
    home: Path, tmp_path: Path, permit: Permit, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[KnownAnswer | None, list[Any]]]:
    """Return a function that makes the check of a job whose teacher has these findings and this canary."""
    monkeypatch.setattr(module, "unwrapped", lambda answer: answer)

    def check(findings: list[Finding], canary: KnownAnswer | None = CANARY, **spec: Any) -> Any:
        required: list[Any] = []
        pool = Local(SimpleNamespace(require_answer=lambda *asked: required.append(asked)))
        monkeypatch.setattr(module, "ask_teacher", lambda *_: Examined(findings, HERE, canary, 3))
        made = TeacherCheck(spec_of(home, tmp_path, **spec), PLAN, permit, {"teacher": "0a"})
        return made.run(pool, Local(None), StopRequest("")), required

    return check


def test_a_fit_teacher_is_noted_and_its_canary_is_asked_of_the_pool(checked: Any, permit: Permit, capfd: Any) -> None:
    canary, required = checked([OK, DOUBT])
    assert canary is CANARY
    ((known, number, _),) = required
    assert (known, number) == (CANARY, 3)
    noted = read_checks(permit)
    assert noted is not None
    assert noted.findings == [CheckRecord(**vars(each)) for each in (OK, DOUBT)]
    assert (noted.token, noted.teacher, noted.origins) == (5, str(HERE), {"teacher": "0a"})
    assert "it moves nothing" in capfd.readouterr().err


def test_jobs_that_share_a_teacher_check_it_once(
    home: Path, tmp_path: Path, permit: Permit, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module, "unwrapped", lambda answer: answer)
    monkeypatch.setattr(module, "ask_teacher", lambda *args: asked.append(args) or Examined([DOUBT], HERE, CANARY, 3))
    teachers, spec = Teachers(), spec_of(home, tmp_path)
    pools = [Local(SimpleNamespace(require_answer=lambda *_: None)) for _ in range(2)]
    other_data = spec.model_copy(update={"data": spec.data.model_copy(update={"template": "plain"})})
    for pool, job in [(pools[0], spec), (pools[0], spec), (pools[1], spec), (pools[0], other_data)]:
        check = TeacherCheck(job, PLAN, permit, {}, teachers)
        assert check.run(pool, Local(None), StopRequest("")) is CANARY
        noted = read_checks(permit)
        assert noted is not None
        assert noted.findings[0] == CheckRecord(**vars(DOUBT))  # also in the files of a job that did not ask
    assert len(asked) == 3
    assert capfd.readouterr().err.count("verdict") == 3


def test_a_doubt_is_a_warning(checked: Any, caplog: pytest.LogCaptureFixture) -> None:
    checked([OK, DOUBT])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no tower" in caplog.text


def test_an_unfit_teacher_is_an_error_and_its_table_is_noted(checked: Any, permit: Permit) -> None:
    with pytest.raises(ModelUnfit, match=r"a cut file.*seen: zeros"):
        checked([OK, FAIL])
    noted = read_checks(permit)
    assert noted is not None
    assert noted.findings[-1].verdict == "fail"
    assert first_answer(permit) is None  # the answer of an unfit teacher is no measure for a later one


def test_off_is_said_and_nothing_is_asked(checked: Any, permit: Permit, caplog: pytest.LogCaptureFixture) -> None:
    canary, required = checked([FAIL], check="off")
    assert canary is None
    assert not required
    assert read_checks(permit) is None
    assert "teacher.check is off" in caplog.text


def test_a_resume_with_a_teacher_that_answers_differently_is_refused(checked: Any, permit: Permit) -> None:
    checked([OK])
    checked([OK])
    noted = read_checks(permit)
    assert noted is not None
    assert [(each.check, each.verdict) for each in noted.findings] == [("parity", "ok"), ("identity", "ok")]
    with pytest.raises(ModelUnfit, match="differently than when this run was begun"):
        checked([OK], replace(CANARY, signal={"hidden": 2 * CANARY.signal["hidden"]}))
    stored = first_answer(permit)
    assert stored is not None
    np.testing.assert_array_equal(stored.signal["hidden"], CANARY.signal["hidden"])


def test_another_sample_is_not_compared(checked: Any, permit: Permit) -> None:
    checked([OK])
    other = replace(CANARY, inputs=replace(CANARY.inputs, input_ids=CANARY.inputs.input_ids + 1))
    checked([OK], replace(other, signal={"hidden": 2 * CANARY.signal["hidden"]}))


def test_only_parts_that_both_have_are_compared(checked: Any) -> None:
    checked([OK], replace(CANARY, signal={**CANARY.signal, "visual": np.ones((2, 2), np.float32)}))
    checked([OK])


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 9])
def test_a_damaged_canary_is_an_error_with_a_remedy(checked: Any, permit: Permit, content: bytes) -> None:
    keep_first_answer(permit, CANARY)
    (Path(permit.run) / CANARY_NAME).write_bytes(content)
    with pytest.raises(OutputError, match=rf"{CANARY_NAME}.*Remove {CANARY_NAME}"):
        checked([OK])


def test_a_flipped_bit_of_the_canary_is_found(permit: Permit) -> None:
    keep_first_answer(permit, CANARY)
    file = Path(permit.run) / CANARY_NAME
    content = bytearray(file.read_bytes())
    content[-8] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(OutputError, match="checksum"):
        first_answer(permit)


# ------------------------------------------------------------------------------------------ asking the teacher


class Member(RemoteTeacher):
    """Teacher of a pool that answers what its pool says."""

    def apply(self, function: Any, *arguments: Any) -> Any:
        assert function is examine
        return SimpleNamespace(reference=self.actor._instance.answer(arguments[0]))


class Pool:
    """A pool whose teachers die of a sample, raise, or answer."""

    def __init__(self, is_deadly: Callable[[list[Any]], bool], error: Exception | None = None) -> None:
        self.number, self._is_deadly, self._error = 0, is_deadly, error
        self.asked: list[int] = []

    def roster(self, version: int) -> Roster:
        return Roster(self.number, {self.number: Member(self.number, Local(self))}, False)

    def lost(self, number: int, reason: str) -> None:
        assert number == self.number
        assert "while it was checked" in reason
        self.number += 1

    def answer(self, samples: list[Any]) -> Any:
        self.asked.append(len(samples))
        if self._is_deadly(samples):
            return ActorDiedError()
        return self._error or Examined([OK], HERE, CANARY)


def _unwrapped(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.fixture
def asked(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Pool], Examined]:
    monkeypatch.setattr(module, "unwrapped", _unwrapped)
    monkeypatch.setattr(module.ray, "wait", lambda answers, timeout: (answers, []))
    spec = spec_of(home, tmp_path)
    return lambda pool: ask_teacher(spec, CheckSpec(samples=4, answers=8), plan_of(spec), Local(pool), StopRequest(""))


@pytest.mark.parametrize("at", [0, 1, 6])
def test_a_teacher_that_dies_of_a_sample_is_checked_without_it(
    home: Path, asked: Any, samples: list[Any], at: int
) -> None:
    """In the job that sample would be put into quarantine, and the job would go on."""
    pool = Pool(lambda asked: any(sample.id == samples[at].id for sample in asked))
    found = asked(pool)
    assert found.findings == [OK]
    assert found.number == len(pool.asked) - 1 > 0
    assert len(pool.asked) <= 3


def test_a_node_that_is_lost_costs_no_more_than_another_teacher(asked: Any) -> None:
    pool = Pool(lambda _: pool.number == 0)
    assert asked(pool).number == 1


def test_teachers_that_always_die_are_an_error(asked: Any) -> None:
    with pytest.raises(TeacherError, match="every teacher that was checked died"):
        asked(Pool(lambda _: True))


def test_a_check_that_fails_itself_names_the_way_around_it(asked: Any) -> None:
    with pytest.raises(TeacherError, match=r"could not be checked: KeyError: 'lm_head'.*teacher\.check: off"):
        asked(Pool(lambda _: False, KeyError("lm_head")))


def test_portions_hold_every_sample_and_get_smaller() -> None:
    samples = [raw_sample(number, "This.", has_image=False) for number in range(5)]
    found = [[sample.index for sample in part] for part in portions(samples)]
    assert found[:3] == [[0, 1, 2, 3, 4], [0, 2, 4], [1, 3]]
    assert sorted(number for part in found[3:7] for number in part) == [0, 1, 2, 3, 4]
    assert all(found)


# ------------------------------------------------------------------------------------- in the model's process


@pytest.fixture(scope="module")
def scorer(home: Path) -> TeacherScorer:
    spec = spec_of(home, home).teacher
    assert spec is not None
    return TeacherScorer(spec, Needs(frozenset({"hidden"})))


@pytest.fixture
def samples(home: Path) -> list[Any]:
    spec = spec_of(home, home)
    return module.draw_samples(plan_of(spec), spec.data, 10)


def test_a_random_teacher_is_no_failure_and_its_canary_is_right(
    home: Path, scorer: TeacherScorer, samples: list[Any]
) -> None:
    spec = spec_of(home, home)
    assert spec.teacher is not None
    found = examine(scorer, samples, spec.data, CheckSpec(samples=4, answers=8), load_processor(spec.teacher))
    assert not [each for each in found.findings if each.verdict == "fail"]
    assert found.findings[-1].check == "canaries"
    assert found.canary is not None
    assert found.canary.difference(scorer.score(found.canary.inputs).signals()[0]) is None
    assert found.replica.versions["torch"]


def test_a_sample_at_which_the_teacher_raises_is_left_out(
    home: Path, scorer: TeacherScorer, samples: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(home, home)
    bad = samples[1].key
    seen: list[list[str]] = []

    def check(scorer: Any, samples: list[Any], *_: Any) -> list[Finding]:
        seen.append([sample.key for sample in samples])
        if bad in seen[-1]:
            raise IndexError("no such token")
        return [OK]

    def answer(scorer: Any, renderer: Any, sample: Any) -> Any:
        return None if sample.key == bad else Canary(CANARY.inputs, CANARY.signal)

    monkeypatch.setattr(module, "check_scorer", check)
    monkeypatch.setattr(module, "_answer", answer)
    monkeypatch.setattr(module, "ask_canary", lambda score, inputs: CANARY.signal)
    found = examine(scorer, samples, spec.data, CheckSpec(), None)
    assert [each.check for each in found.findings] == ["parity", "canaries"]
    assert seen == [[sample.key for sample in samples], [sample.key for sample in samples if sample.key != bad]]


def test_an_error_of_a_check_itself_is_raised(
    home: Path, scorer: TeacherScorer, samples: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*_: Any) -> list[Finding]:
        raise KeyError("lm_head")

    monkeypatch.setattr(module, "check_scorer", check)
    with pytest.raises(KeyError):
        examine(scorer, samples[:3], spec_of(home, home).data, CheckSpec(), None)


# --------------------------------------------------------------------------------------------------- the student


def config_of(spec: JobSpec, permit: Permit, told: list[str]) -> Any:
    config = object.__new__(WorkerConfig)
    fields = {"spec": spec, "permit": permit, "monitor": Local(SimpleNamespace(warn=told.append))}
    for name, value in fields.items():
        object.__setattr__(config, name, value)
    return config


def test_a_new_student_is_checked_and_noted_beside_the_teacher(
    home: Path, tmp_path: Path, permit: Permit, checked: Any
) -> None:
    checked([OK])
    spec = spec_of(home, tmp_path)
    check_new_student(config_of(spec, permit, []), build_student(spec.student, module.torch.float32))
    checked([OK, DOUBT])  # a resume: the student's line stays
    noted = read_checks(permit)
    assert noted is not None
    assert noted.teacher == str(HERE)
    assert [each.part for each in noted.findings] == ["teacher"] * 3 + ["student"] * (len(noted.findings) - 3)
    assert len(noted.findings) > 3


def test_a_student_with_broken_weights_is_an_error(home: Path, tmp_path: Path, permit: Permit) -> None:
    spec = spec_of(home, tmp_path)
    model = build_student(spec.student, module.torch.float32)
    next(iter(model.parameters())).data.fill_(module.torch.nan)
    with pytest.raises(ModelUnfit, match="student, weights"):
        check_new_student(config_of(spec, permit, []), model)


def test_off_leaves_the_student_alone(home: Path, tmp_path: Path, permit: Permit) -> None:
    check_new_student(config_of(spec_of(home, tmp_path, "off"), permit, []), None)
    assert not (Path(permit.run) / CHECKS).exists()


# ------------------------------------------------------------------------------------------ model card, command


def test_the_model_card_has_the_table(home: Path, tmp_path: Path) -> None:
    records = [CheckRecord(**vars(each)) for each in (OK, FAIL)]
    card = model_card(spec_of(home, tmp_path), {}, Checks(1, str(HERE), {}, records))
    assert "| teacher | parity | 0 | 0 | ok |" in card
    assert r"| teacher | weights | zeros \| everywhere | numbers | fail |" in card
    assert "Teacher on cpu; torch 2." in card, "without the name of the machine"


def test_the_model_card_says_that_the_checks_were_off(home: Path, tmp_path: Path) -> None:
    assert "`teacher.check: off`" in model_card(spec_of(home, tmp_path, "off"), {})
    without = parse_spec(
        {**spec_of(home, tmp_path).model_dump(mode="json"), "teacher": None, "objective": {"energies": []}}
    )
    assert "Checks" not in model_card(without, {})


@pytest.mark.parametrize(("findings", "code"), [([OK, DOUBT], 0), ([OK, DOUBT, FAIL], 2)])
def test_the_command_s_exit_code_is_that_of_its_findings(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, findings: list[Finding], code: int
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(spec_of(home, tmp_path / "out").model_dump_json())
    seen: list[JobSpec] = []

    def check(self: Any) -> list[Finding]:
        seen.append(self.spec)
        return findings

    monkeypatch.setattr(job_module.BetaKDJob, "check_models", check)
    result = CliRunner().invoke(app, ["check", str(file), "--set", "teacher.check.samples=3"])
    assert result.exit_code == code, result.output
    assert "it moves nothing" in result.stdout
    assert ("a cut file" in result.stderr) == (code == 2)
    settings = module.settings_of(seen[0])
    assert settings is not None
    assert settings.samples == 3
    assert not (tmp_path / "out").exists()


def test_the_stored_file_is_json_that_people_read(checked: Any, permit: Permit) -> None:
    checked([OK])
    text = (Path(permit.run) / CHECKS).read_text()
    assert json.loads(text)["findings"][0]["verdict"] == "ok"
    assert text.count("\n") > 5
