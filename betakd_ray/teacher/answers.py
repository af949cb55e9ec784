"""Answers of a teacher: arrays on the wire, split into samples' signals and joined into micro-batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from betakd_ray.batch.inputs import ModelInputs, to_device
from betakd_ray.errors import TeacherError
from betakd_ray.teacher.parts import PARTS, Axis, Needs, Signal, TeacherFacts, wire_dtype

NOT_FINITE = "the teacher's output is not finite"


def to_wire(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor of any device as a numpy array; bfloat16 becomes a view of uint16."""
    tensor = tensor.detach().contiguous().cpu()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return the tensor that `to_wire` was given, on `device`."""
    tensor = to_device(array, device)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


@dataclass(frozen=True)
class GroupAnswer:
    """Answer of a teacher to a group of B samples: few large arrays, which Ray sends without a copy."""

    arrays: dict[str, NDArray[Any]]
    """Part → [places of all samples, *shape], the samples one after the other."""
    rows: NDArray[np.integer]
    """[B] the number of answer rows of each sample."""
    tokens: NDArray[np.integer]
    """[B] the number of image tokens of each sample."""
    is_finite: NDArray[np.bool_]
    """[B] false for a sample for which an output of the teacher was not finite."""
    busy_s: float = 0.0
    """Seconds that the teacher computed this group."""

    def signals(self) -> list[Signal | None]:
        """Return the signal of each sample, as views of the arrays; None for a sample that is not finite."""
        ends = {axis: np.cumsum(_counts(axis, self.rows, self.tokens)) for axis in ("row", "token", "pair", "sample")}
        found: list[Signal | None] = []
        for at, is_finite in enumerate(self.is_finite.tolist()):
            signal: Signal = {}
            for name, array in self.arrays.items():
                axis = PARTS[name].axis
                start, stop = (int(ends[axis][at - 1]) if at else 0), int(ends[axis][at])
                if axis == "sample":
                    signal[name] = array[at]
                elif stop > start or axis == "row":
                    signal[name] = array[start:stop]
            found.append(signal if is_finite else None)
        return found


@dataclass(frozen=True)
class Answer:
    """Signals of a group of samples, or the reasons why samples have none."""

    signals: list[Signal | None]
    """Signal of each sample; None if the teacher cannot score it, and then it takes no part in training."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Position in the group → why that sample has no signal."""
    busy_s: float = 0.0
    """Seconds that teachers computed this group."""

    @classmethod
    def of(cls, group: GroupAnswer) -> "Answer":
        """Make the answer from what one teacher sent."""
        signals = group.signals()
        reasons = {at: NOT_FINITE for at, signal in enumerate(signals) if signal is None}
        return cls(signals, reasons, group.busy_s)

    @classmethod
    def joined(cls, parts: Iterable["Answer"]) -> "Answer":
        """Join the answers to consecutive pieces of a group."""
        signals: list[Signal | None] = []
        reasons: dict[int, str] = {}
        busy_s = 0.0
        for part in parts:
            reasons |= {len(signals) + at: reason for at, reason in part.reasons.items()}
            signals += part.signals
            busy_s += part.busy_s
        return cls(signals, reasons, busy_s)


def places(part: str, inputs: ModelInputs) -> NDArray[np.integer]:
    """Return [B] the number of values of a part that each sample has."""
    return _counts(PARTS[part].axis, inputs.rows_per_sample, inputs.visual_per_sample)


def _counts(axis: Axis, rows: NDArray[np.integer], tokens: NDArray[np.integer]) -> NDArray[np.integer]:
    if axis == "row":
        return rows
    if axis == "token":
        return tokens
    return rows * tokens if axis == "pair" else np.ones_like(rows)


def join_signals(signals: Sequence[Signal], inputs: ModelInputs, needs: Needs) -> dict[str, NDArray[Any]]:
    """Join the signals of a micro-batch's samples; parts that are not in `needs` are dropped.

    Parts of the sample axis are stacked to [B, size]; other parts are concatenated to [places, *shape]. A part is left
    out if no sample has a place for it, e.g. image tokens if no sample has an image. Raises TeacherError, naming the
    part, if the signals do not fit the samples.
    """
    joined: dict[str, NDArray[Any]] = {}
    for name in (name for name in PARTS if name in needs):
        counts = places(name, inputs)
        if not counts.any():
            continue
        arrays = []
        for at, (signal, count) in enumerate(zip(signals, counts.tolist(), strict=True)):
            array = signal.get(name)
            if array is not None and PARTS[name].axis == "sample":
                array = array[None]
            found = 0 if array is None else len(array)
            if found != count:
                raise TeacherError(
                    f"the teacher's signal has {found} values of {name!r}, but the sample has {count} places for them "
                    f"(sample {at} of {len(signals)} in a micro-batch). If it was read from teacher.cache, remove that "
                    "cache. Otherwise teacher and student do not agree on the tokens of this sample."
                )
            if array is not None:
                arrays.append(array)
        joined[name] = np.concatenate(arrays)
    return joined


def empty_signal(needs: Needs, facts: TeacherFacts, rows: int, tokens: int) -> Signal:
    """Return a signal of zeros, shaped for a sample with `rows` answer rows and `tokens` image tokens."""
    signal: Signal = {}
    for name in (name for name in PARTS if name in needs):
        (count,) = _counts(PARTS[name].axis, np.array([rows]), np.array([tokens])).tolist()
        shape = PARTS[name].shape(needs, facts)
        if PARTS[name].axis == "sample":
            signal[name] = np.zeros(shape, wire_dtype(name, facts))
        elif count or PARTS[name].axis == "row":
            signal[name] = np.zeros((count, *shape), wire_dtype(name, facts))
    return signal
