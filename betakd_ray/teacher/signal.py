"""What travels from the teacher to the student: no more than the objective needs.

For energies on logits that is the final hidden state of each answer row, from which the student, holding a copy of the
teacher's head, rebuilds the exact logits: at 7B some 8 kB a token instead of 64 kB of logits. `top_k` is smaller still,
and biased. Half-precision floats that numpy lacks travel as a view of uint16.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from betakd_ray.batch.inputs import to_device
from betakd_ray.spec import VISUAL_ENERGIES, Feature, InstanceWeighting, ObjectiveSpec, TeacherSpec, TopKSignal

FeatureSizes = dict[Feature, int]


@dataclass(frozen=True)
class Wire:
    """A tensor as numpy, with the dtype it really has."""

    array: NDArray
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> "Wire":
        """From a tensor on any device."""
        tensor = tensor.detach().contiguous().cpu()
        name = str(tensor.dtype).removeprefix("torch.")
        return cls((tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy(), name)

    def tensor(self, device: torch.device) -> Tensor:
        """Back to a tensor, on `device`."""
        return to_device(self.array, device).view(getattr(torch, self.dtype))


@dataclass(frozen=True)
class Needs:
    """What a job asks of its teacher."""

    hidden: bool = False
    top_k: int = 0
    """In place of `hidden`, the k largest of `vocab` probabilities."""
    vocab: int = 0
    """Ids that teacher and student have in common; for `top_k`."""
    visual: bool = False
    visual_layer: int = 0
    """A layer, counted from 1, whose output at the image tokens is asked for."""
    attention: bool = False
    salience: bool = False
    features: tuple[Feature, ...] = ()

    @classmethod
    def of(cls, teacher: TeacherSpec, objective: ObjectiveSpec, vocab: int) -> "Needs":
        """From a spec, and the number of ids that the models have in common."""
        weighting = objective.weighting
        on_logits = any(channel not in VISUAL_ENERGIES for channel in objective.channels)
        layer = objective.feature_layer
        # All on image tokens compare what the projectors give, but for these.
        elsewhere = {"align_attention", *(["fd"] if layer else [])}
        top_k = teacher.signal.k if isinstance(teacher.signal, TopKSignal) and on_logits else 0
        return cls(
            hidden=on_logits and not top_k,
            top_k=min(top_k, vocab - 1),
            vocab=vocab if top_k else 0,
            visual=any(channel in VISUAL_ENERGIES - elsewhere for channel in objective.channels),
            visual_layer=layer.teacher if layer else 0,
            attention="align_attention" in objective.channels,
            salience="align_topk" in objective.channels,
            features=weighting.features if isinstance(weighting, InstanceWeighting) else (),
        )

    def __or__(self, other: "Needs") -> "Needs":
        """What serves both of two jobs. They ask for the same top-k signal, or for none, and for the same layer."""
        assert self.choices == other.choices
        return Needs(
            hidden=self.hidden or other.hidden,
            top_k=self.top_k,
            vocab=self.vocab,
            visual=self.visual or other.visual,
            visual_layer=self.visual_layer,
            attention=self.attention or other.attention,
            salience=self.salience or other.salience,
            features=tuple(sorted({*self.features, *other.features})),
        )

    @property
    def choices(self) -> tuple[int, ...]:
        """What jobs that are answered together have to agree about."""
        return self.top_k, self.vocab, self.visual_layer

    @property
    def wires(self) -> frozenset[str]:
        """The parts of a Signal that carry it, features aside."""
        top = ["top_ids", "top_log_probs"] if self.top_k else []
        return frozenset([*self._flags, *top, *(["visual_layer"] if self.visual_layer else [])])

    @property
    def tag(self) -> str:
        """Its parts by name, in one word."""
        top = [f"top{self.top_k}of{self.vocab}"] if self.top_k else []
        layer = [f"layer{self.visual_layer}"] if self.visual_layer else []
        return "+".join([*self._flags, *top, *layer, *sorted(self.features)])

    @property
    def _flags(self) -> list[str]:
        return [name for name in ("hidden", "visual", "attention", "salience") if getattr(self, name)]


@dataclass(frozen=True)
class TeacherFacts:
    """What a student must know of the teacher before the first batch."""

    head: Wire | None
    """[V_t, H_t] the lm_head's weight, where hidden states travel."""
    visual_size: int
    """Width of the projector's tokens."""
    heads: int
    """Attention heads of a layer."""
    feature_sizes: FeatureSizes
    fingerprint: str
    """A hash of configuration and weights, for the cache; empty if there is none."""
    top_k_vocab: int = 0
    """Ids that a top-k signal is about."""


@dataclass(frozen=True)
class Signal:
    """The teacher's answer to one micro-batch of B samples, R answer rows and T image tokens."""

    valid: NDArray[np.bool_]
    """[B] false where a teacher row was not finite; such a sample takes no part."""
    hidden: Wire | None = None
    """[R, H_t]"""
    top_ids: Wire | None = None
    """[R, k] the k most probable ids, most probable first."""
    top_log_probs: Wire | None = None
    """[R, k + 1] their log-probabilities, and the log of what is left."""
    visual: Wire | None = None
    """[T, H_t]"""
    visual_layer: Wire | None = None
    """[T, H_t]"""
    attention: Wire | None = None
    """[P, heads] first-layer attention of each answer row to each image token of its sample."""
    salience: Wire | None = None
    """[T] its mean over heads and answer rows."""
    features: dict[Feature, NDArray[np.float32]] = field(default_factory=dict)
    """Each [B, size]; float32."""
    busy_s: float = 0.0
    """Seconds the teacher computed."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Why a sample is not valid, where it is known."""

    @classmethod
    def joined(cls, parts: Sequence["Signal"]) -> "Signal":
        """The signal of consecutive micro-batches as one."""
        starts = np.cumsum([0, *(len(part.valid) for part in parts)])
        return cls(
            valid=np.concatenate([part.valid for part in parts]),
            **{name: _joined([getattr(part, name) for part in parts]) for name in WIRES},
            features={name: np.concatenate([part.features[name] for part in parts]) for name in parts[0].features},
            busy_s=sum(part.busy_s for part in parts),
            reasons={
                int(start) + at: reason
                for start, part in zip(starts, parts, strict=False)
                for at, reason in part.reasons.items()
            },
        )


WIRES = ("hidden", "top_ids", "top_log_probs", "visual", "visual_layer", "attention", "salience")
"""The fields of a Signal that are of one row a token, or pair of tokens."""


def _joined(wires: Sequence[Wire | None]) -> Wire | None:
    there = [wire for wire in wires if wire]  # text-only parts have nothing on image tokens
    return Wire(np.concatenate([wire.array for wire in there]), there[0].dtype) if there else None
