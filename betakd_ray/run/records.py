"""Types of what the files of a run hold, with the bounds of every number. `run.files` says how they are read."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Plan, Quarantined
from betakd_ray.run.files import MAX_LARGE_BYTES, File, by_line, whole
from betakd_ray.run.folder import (
    CHECKS,
    LEDGER,
    LOGGED,
    MODEL,
    MODEL_RECORD,
    PROGRESS,
    QUARANTINE,
    RESULT,
    SKIPPED,
    TAIL,
)
from betakd_ray.run.metrics import Number

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_AGAIN = f"Remove {RESULT} and run the job again: it goes on from its last checkpoint, and writes this file anew."


@dataclass(frozen=True)
class Result:
    """Result of a finished job, as `job.JobResult` explains it."""

    name: str
    path: str
    model: str
    metrics: dict[str, Number]
    steps: Count
    planned: Count
    consumed: Count
    quarantined: Count
    tail: Count
    skipped_steps: Count
    token: Count = 0


@dataclass(frozen=True)
class ModelRecord:
    """Where the model of a run comes from."""

    token: Count
    """Token of the driver that exported it (`run.lease`)."""
    step: Count
    has_prompt: bool = False
    """Whether the folder's chat template makes the prompts of training; false also for one of version 0.1.0."""
    pad_to_square: bool = False
    """Whether images have to be padded before the folder's image processor gets them."""


@dataclass(frozen=True)
class CheckRecord:
    """Result of one check of a model, as `check.Finding` explains it."""

    check: str
    seen: str
    expected: str
    verdict: Literal["ok", "doubt", "fail", "skipped"]
    cause: str = ""
    remedy: str = ""
    part: str = "teacher"


@dataclass(frozen=True)
class Checks:
    """Checks of a job's models before its first step."""

    token: Count
    """Token of the driver that made them (`run.lease`)."""
    teacher: str
    """Node, device and libraries of the teacher that was checked."""
    origins: dict[str, str]
    """Digests of the models' files and versions of the libraries (`run.claim`)."""
    findings: list[CheckRecord]


@dataclass(frozen=True)
class TailSample:
    """A sample that was left over: its place for a human reader (`run.plan.place_of`)."""

    epoch: Count
    shard: str
    index: Count
    repeat: Annotated[Count | None, Field(alias="pass")] = None


@dataclass(frozen=True)
class Progress:
    """Counters of a job at a checkpoint."""

    samples: Count
    dropped: Count
    skipped: Count
    skipped_in_a_row: Count


@dataclass(frozen=True)
class Logged:
    """How much had been logged at a checkpoint: the newest step, and the number of records up to it."""

    step: Count
    records: Count


@dataclass(frozen=True)
class SkippedSample:
    """A sample of a skipped step."""

    epoch: Count
    shard: str
    index: Count
    key: str


@dataclass(frozen=True)
class Skip:
    """A step that was skipped because its gradient was not finite."""

    step: Count
    samples: list[SkippedSample]


def _as_int32(bad: Quarantined) -> Quarantined:
    # The ledger takes these numbers as int32, and numpy raises OverflowError for a larger one.
    if any(abs(number) >= 1 << 31 for number in (bad.epoch, bad.shard, bad.index)):
        raise ValueError("epoch, shard or index is no number of 32 bits")
    return bad


_QUARANTINED = by_line(Annotated[Quarantined, AfterValidator(_as_int32)])

RESULT_FILE: File[Result] = File(RESULT, whole(Result), _AGAIN)
MODEL_RECORD_FILE: File[ModelRecord] = File(f"{MODEL}/{MODEL_RECORD}", whole(ModelRecord), _AGAIN)
CHECKS_FILE: File[Checks] = File(
    CHECKS, whole(Checks), f"Remove {CHECKS} and run the job again: it checks its models anew."
)
TAIL_FILE: File[list[TailSample]] = File(TAIL, by_line(TailSample), _AGAIN)
QUARANTINE_FILE: File[list[Quarantined]] = File(QUARANTINE, _QUARANTINED, _AGAIN, MAX_LARGE_BYTES)
PROGRESS_FILE: File[Progress] = File(PROGRESS, whole(Progress))
LOGGED_FILE: File[Logged] = File(LOGGED, whole(Logged))
SKIPPED_FILE: File[list[Skip]] = File(SKIPPED, by_line(Skip), limit=MAX_LARGE_BYTES)


def ledger_file(plan: Plan | None) -> File[Ledger]:
    """Return the ledger's file in a checkpoint. With a plan, a ledger of another one counts as damaged."""

    def parse(content: bytes) -> Ledger:
        ledger = Ledger.from_json(content)
        if plan is not None:
            ledger.require_of(plan.sizes, plan.epochs)
        return ledger

    return File(LEDGER, parse, limit=MAX_LARGE_BYTES)


def quarantine_file(plan: Plan | None) -> File[list[Quarantined]]:
    """Return the quarantine's file in a checkpoint. With a plan, a sample outside of it counts as damage."""

    def parse(content: bytes) -> list[Quarantined]:
        found = _QUARANTINED(content)
        if plan is not None:
            for number, bad in enumerate(found, 1):
                if not plan.has(bad.epoch, bad.shard, bad.index):
                    raise ValueError(f"line {number}: sample {bad.index} of shard {bad.shard} is not in the plan")
        return found

    return File(QUARANTINE, parse, limit=MAX_LARGE_BYTES)
