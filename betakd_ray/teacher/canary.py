"""A sample whose answer by a checked teacher is known. Every other teacher of the pool has to give the same answer."""

import hashlib
import platform
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.run.claim import library_versions
from betakd_ray.teacher.compare import differs
from betakd_ray.teacher.parts import Signal
from betakd_ray.teacher.ports import Pending, Unanswered


@dataclass(frozen=True)
class Replica:
    """Where a teacher runs, and which libraries compute its answers."""

    node: str
    device: str
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def here(cls, scorer: Any) -> "Replica":
        """Return this process, which has the teacher `scorer`."""
        device = torch.device(scorer.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return cls(platform.node(), name, library_versions())

    def __str__(self) -> str:
        return f"{self.node} ({self.device}; {', '.join(map(' '.join, self.versions.items()))})"

    def difference(self, other: "Replica") -> str:
        """Return the libraries that have other versions than in `other`; empty if none has."""
        names = sorted(self.versions.keys() | other.versions.keys())
        pairs = ((name, self.versions.get(name, "none"), other.versions.get(name, "none")) for name in names)
        return ", ".join(f"{name} {own} instead of {others}" for name, own, others in pairs if own != others)


@dataclass(frozen=True)
class KnownAnswer:
    """A canary: one sample, and the signal that the checked teacher gave for it."""

    inputs: ModelInputs
    signal: Signal
    dtype: str
    """Dtype that the teacher computes in (`TeacherFacts.dtype`)."""
    replica: Replica

    def difference(self, now: Signal | None) -> str | None:
        """Return how another answer to the same sample differs by more than rounding; None if it does not."""
        return "the answer is not finite" if now is None else differs(now, self.signal, self.dtype)


def digest_of(inputs: ModelInputs) -> bytes:
    """Return the SHA-256 of a batch's tokens and pixels."""
    digest = hashlib.sha256()
    for name, array in [("input_ids", inputs.input_ids), *sorted(inputs.images.items())]:
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


def answer_canary(scorer: Any, inputs: ModelInputs) -> tuple[Signal | None, Replica]:
    """Return a teacher's signal for a canary, and who gives it. It runs in the teacher's process (`Teacher.apply`)."""
    return scorer.score(inputs).signals()[0], Replica.here(scorer)


class Differs(Unanswered):
    """A teacher answers a canary differently than the checked one: it is another model, or its device is damaged."""


@dataclass(frozen=True)
class Proof:
    """Pending of a teacher that is asked a canary: answered once it has given the known answer."""

    known: KnownAnswer
    pending: Pending

    def result(self, timeout_s: float) -> None:
        """Return once the teacher has proved itself. Raises Differs if it answers differently, and as `Pending`."""
        signal, replica = self.pending.result(timeout_s)
        if difference := self.known.difference(signal):
            versions = replica.difference(self.known.replica) or "the same library versions"
            raise Differs(
                f"a teacher on {replica} answers a checked sample differently than the checked teacher on "
                f"{self.known.replica}: {difference}; it has {versions}. Give all nodes the same files behind "
                "teacher.path and the same libraries, or take the node out."
            )
