"""The checks of a job's models as the driver sees them: asked where the model is, printed, stored, and enforced."""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, cast

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from rich.console import Console

from betakd_ray.check.canary import Canary, ask_canary, canary_of, drift
from betakd_ray.check.finding import Finding, as_table, doubts, require_fit
from betakd_ray.check.student import check_student
from betakd_ray.check.teacher import check_scorer
from betakd_ray.data.draw import draw_samples
from betakd_ray.data.plan import Plan
from betakd_ray.data.render import Renderer
from betakd_ray.data.samples import RawSample, Unrenderable
from betakd_ray.errors import BetaKDError, TeacherError
from betakd_ray.models.student import build_student, student_processor
from betakd_ray.on_ray.cluster import gpus_each, placement
from betakd_ray.run.lease import Permit
from betakd_ray.run.records import CheckRecord
from betakd_ray.sigterm import StopRequest
from betakd_ray.spec import CheckSpec, DataSpec, JobSpec, StudentSpec
from betakd_ray.teacher.canary import KnownAnswer, Replica, digest_of
from betakd_ray.teacher.ports import Roster
from betakd_ray.teacher.remote import RemoteTeacher, unwrapped
from betakd_ray.teacher.scorer import TeacherScorer
from betakd_ray.teacher.sharing import Teachers
from betakd_ray.train.check_files import first_answer, keep_first_answer, write_checks
from betakd_ray.train.config import WorkerConfig

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examined:
    """Result of the checks of one teacher."""

    findings: list[Finding]
    replica: Replica
    canary: KnownAnswer | None = None
    """None if no sample has an answer that is finite."""
    number: int = -1
    """Number of the teacher in its pool."""


# ------------------------------------------------------------------------------------------ in the model's process


def examine(
    scorer: TeacherScorer, samples: Sequence[RawSample], data: DataSpec, settings: CheckSpec, student: Any
) -> Examined:
    """Check a teacher, and ask it a canary before and after: the checks must leave it as it was.

    `student` is the student's processor.
    """
    dtype, replica, renderer = scorer.facts().dtype, Replica.here(scorer), Renderer(scorer.processor, data)
    canary = _first_canary(scorer, renderer, samples)
    try:
        findings = check_scorer(scorer, samples, data, settings, student)
    except BetaKDError:
        raise
    except Exception:
        # It may be the fault of a sample: in the job it would be put into quarantine, and the others be answered.
        answered = [sample for sample in samples if _answer(scorer, renderer, sample)]
        if not answered or len(answered) == len(samples):
            raise
        findings = check_scorer(scorer, answered, data, settings, student)
    if canary is None:
        return Examined(findings, replica)
    findings = [*findings, drift(canary, ask_canary(scorer.score, canary.inputs), dtype)]
    return Examined(findings, replica, KnownAnswer(canary.inputs, canary.signal, dtype, replica))


def _first_canary(scorer: TeacherScorer, renderer: Renderer, samples: Sequence[RawSample]) -> Canary | None:
    return next(filter(None, (_answer(scorer, renderer, sample) for sample in samples)), None)


def _answer(scorer: TeacherScorer, renderer: Renderer, sample: RawSample) -> Canary | None:
    """Return a sample with its answer; None if it has none that is finite, or cannot be rendered or answered."""
    try:
        rendering = renderer.render(sample)
        return canary_of(scorer.score, rendering, renderer.pad_token_id, renderer.image_token_id)
    except Unrenderable:
        return None
    except Exception as error:
        _LOG.warning("sample %s cannot be answered: %s: %s", sample.key, type(error).__name__, error)
        return None


def _examine_student(student: StudentSpec) -> list[Finding]:
    return check_student(build_student(student, torch.float32), student)


# --------------------------------------------------------------------------------------------------- in the driver


def settings_of(spec: JobSpec) -> CheckSpec | None:
    """Return how the job's models are checked; None if they are not."""
    return spec.teacher.check if spec.teacher and isinstance(spec.teacher.check, CheckSpec) else None


def ask_teacher(spec: JobSpec, settings: CheckSpec, plan: Plan, pool: ActorHandle, stop: StopRequest) -> Examined:
    """Check a ready teacher of the pool on samples of the plan. One that dies meanwhile is replaced.

    Raises TeacherError if the pool gives up or a check itself fails, DataError, and Interrupted.
    """
    # More than are checked, because some may be unrenderable.
    count = max(2 * settings.samples, settings.answers + settings.answers // 4)
    student = student_processor(spec.student)
    for samples in portions(draw_samples(plan, spec.data, count)):
        number, teacher = _first_member(pool, stop)
        answer = teacher.apply(examine, samples, spec.data, settings, student).reference
        stop.wait_until(lambda timeout_s, answer=answer: bool(ray.wait([answer], timeout=timeout_s)[0]))
        try:
            return replace(cast(Examined, unwrapped(answer)), number=number)
        except BetaKDError:
            raise
        except RayActorError as error:
            unwrapped(pool.lost.remote(number, f"it died while it was checked: {str(error).strip().splitlines()[0]}"))
        except Exception as error:
            raise TeacherError(
                f"the teacher could not be checked: {type(error).__name__}: {error}. Correct its engine or its files, "
                "or set teacher.check: off to use it without a check."
            ) from error
    raise TeacherError("every teacher that was checked died. Look for the cause in the logs of their nodes.")


def portions(samples: list[RawSample]) -> Iterator[list[RawSample]]:
    """Yield the samples, then each half of them, each quarter, and so on: one of them may kill every teacher."""
    parts = 1
    while parts <= len(samples):
        yield from (samples[at::parts] for at in range(parts))
        parts *= 2


def _first_member(pool: ActorHandle, stop: StopRequest) -> tuple[int, RemoteTeacher]:
    """Wait for a member of the pool. The pool raises if none can start."""
    while True:
        roster = cast(Roster, unwrapped(pool.roster.remote(-1)))
        if roster.members:
            number = min(roster.members)
            return number, cast(RemoteTeacher, roster.members[number])
        stop.pause(0.1)


def ask_student(spec: JobSpec, stop: StopRequest) -> list[Finding]:
    """Check the weights that the student starts from, in a task with the place of a student worker."""
    place = placement(spec.cluster.student, gpus_each(spec.cluster.student.gpus))
    answer = ray.remote(_examine_student).options(**place).remote(spec.student)
    stop.wait_until(lambda timeout_s: bool(ray.wait([answer], timeout=timeout_s)[0]))
    return cast(list[Finding], unwrapped(answer))


def tell(monitor: ActorHandle, text: str) -> None:
    """Have the driver print a warning, from any process."""
    monitor.warn.remote(text)


def show(findings: Sequence[Finding]) -> None:
    """Print the table of the checks, and log the doubts as warnings."""
    # Without a terminal rich would assume 80 columns, and fold the cells in a log file.
    Console(stderr=True, width=None if sys.stderr.isatty() else 1000).print(as_table(findings))
    for doubt in doubts(findings):
        _LOG.warning("%s", doubt)


@dataclass(frozen=True)
class TeacherCheck:
    """The check of a job's teacher at the start of `fit()`."""

    spec: JobSpec
    plan: Plan
    permit: Permit
    origins: dict[str, str] = field(default_factory=dict)
    teachers: Teachers = field(default_factory=Teachers)
    """Teachers of this job and of those that run beside it: what one job has found out, the others know."""

    def run(self, pool: ActorHandle, monitor: ActorHandle, stop: StopRequest) -> KnownAnswer | None:
        """Check a teacher of the pool; return the canary that its replicas answer from then on.

        The table is printed and stored. Returns None, with a warning, if the checks are off. Raises ModelUnfit if a
        check failed.
        """
        settings = settings_of(self.spec)
        if settings is None:
            _LOG.warning("%s: teacher.check is off: the teacher is used without a check of its signal", self.spec.name)
            return None
        key = (pool, self.spec.data.model_dump_json(), self.spec.student.model_dump_json())
        examined, is_new = self.teachers.once(
            key, lambda: ask_teacher(self.spec, settings, self.plan, pool, stop), stop
        )
        findings = [*examined.findings, *self.since_the_first(examined.canary)]
        if is_new:
            show(findings)
        records = [CheckRecord(**asdict(each)) for each in findings]
        write_checks(self.permit, str(examined.replica), self.origins, records)
        require_fit(findings)
        if examined.canary:
            keep_first_answer(self.permit, examined.canary)
            unwrapped(pool.require_answer.remote(examined.canary, examined.number, partial(tell, monitor)))
        return examined.canary

    def since_the_first(self, canary: KnownAnswer | None) -> list[Finding]:
        """Return a finding on the answer to the canary beside that at the run's first start.

        There is none if the run has no such answer, or if the canary was another sample then.
        """
        first = first_answer(self.permit)
        if canary is None or first is None or not first.is_of(digest_of(canary.inputs)):
            return []
        common = first.signal.keys() & canary.signal.keys()  # jobs that share a pool may need more parts than one alone
        then, now = ({name: signal[name] for name in common} for signal in (first.signal, canary.signal))
        found = drift(Canary(canary.inputs, then), now, canary.dtype, check="identity")
        if found.verdict != "fail":
            return [found]
        cause = (
            "the teacher answers differently than when this run was begun: other libraries, kernels or another device"
        )
        remedy = "Restore what the run was begun with (checks.json of the run names it), or choose another `name`."
        return [replace(found, cause=cause, remedy=remedy)]


def check_new_student(config: WorkerConfig, model: Any) -> None:
    """Check the weights of a student that has not been trained yet, on rank 0, unless `teacher.check` is off.

    Raises ModelUnfit if a check failed.
    """
    if settings_of(config.spec) is None:
        return
    findings = check_student(model, config.spec.student)
    for each in doubts(findings):
        tell(config.monitor, str(each))
    write_checks(config.permit, None, {}, [CheckRecord(**asdict(each)) for each in findings], part="student")
    require_fit(findings)
