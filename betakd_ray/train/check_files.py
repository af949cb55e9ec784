"""What a run keeps of the checks of its models: the table, and the teacher's first answer to the canary."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from betakd_ray.output import output_errors
from betakd_ray.run.files import File, stored
from betakd_ray.run.folder import CANARY, CHECKS
from betakd_ray.run.lease import Permit
from betakd_ray.run.records import CHECKS_FILE, CheckRecord, Checks
from betakd_ray.storage import join, open_store, replace_file
from betakd_ray.teacher.cache import loaded, serialized
from betakd_ray.teacher.canary import KnownAnswer, digest_of
from betakd_ray.teacher.parts import Signal

INPUTS = "inputs"
"""Name in the canary's file of the digest of its inputs, beside the parts of the signal."""


@dataclass(frozen=True)
class FirstAnswer:
    """The teacher's answer to the canary when the run was begun."""

    signal: Signal
    inputs: bytes
    """Digest of the sample (`digest_of`)."""

    def is_of(self, inputs: bytes) -> bool:
        """Return whether it is an answer to the sample with this digest."""
        return self.inputs == inputs


def _parsed(content: bytes) -> FirstAnswer:
    signal = loaded(content)
    if INPUTS not in signal:
        raise ValueError(f"it has only {sorted(signal)}, and no {INPUTS}")
    return FirstAnswer(signal, signal.pop(INPUTS).tobytes())


CANARY_FILE: File[FirstAnswer] = File(
    CANARY, _parsed, f"Remove {CANARY} and run the job again: it notes the teacher's present answer."
)


def first_answer(permit: Permit) -> FirstAnswer | None:
    """Return the first answer to the canary; None if the run has none. Raises OutputError."""
    return stored(permit.run, permit.storage, CANARY_FILE, partial(output_errors, permit.run))


def keep_first_answer(permit: Permit, canary: KnownAnswer) -> None:
    """Store the answer to the canary, unless the run has one. Raises OutputError."""
    if first_answer(permit) is None:
        inputs: NDArray[np.uint8] = np.frombuffer(digest_of(canary.inputs), np.uint8)
        _write(permit, CANARY, serialized({**canary.signal, INPUTS: inputs}))


def read_checks(permit: Permit) -> Checks | None:
    """Return the checks of a run; None if it has none. Raises OutputError."""
    return stored(permit.run, permit.storage, CHECKS_FILE, partial(output_errors, permit.run))


def write_checks(
    permit: Permit,
    teacher: str | None,
    origins: dict[str, str],
    records: Sequence[CheckRecord],
    *,
    part: str = "teacher",
) -> None:
    """Store the findings on one of the models, in place of earlier ones on it. Raises OutputError."""
    before = read_checks(permit) or Checks(permit.token, "", {}, [])
    others = [each for each in before.findings if each.part != part]
    findings = sorted([*others, *records], key=lambda each: each.part != "teacher")
    checks = replace(before, token=permit.token, findings=findings)
    if teacher is not None:
        checks = replace(checks, teacher=teacher, origins=origins)
    _write(permit, CHECKS, json.dumps(asdict(checks), indent=2).encode())


def _write(permit: Permit, name: str, content: bytes) -> None:
    permit.check()
    filesystem, root = open_store(permit.run, permit.storage)
    with output_errors(permit.run):
        replace_file(filesystem, join(root, name), content)
