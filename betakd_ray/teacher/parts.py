"""Signals from the teacher to the student: the table of their parts, and functions that join and split them.

A sample's signal is a mapping from a part's name to an array. The parts are defined in `PARTS` and nowhere else: which
energies and features need a part, what it has a value for (an answer row, an image token, a pair of both, or the
sample), the shape and dtype of a value, and how it is computed from one forward pass of the teacher. `Needs`, the
signals, the cache, the forecast, the memory estimate and the student all read this table. To add a part, add an entry
here, and nothing else.

For energies on logits the part is the final hidden state of each answer row. The student has a copy of the teacher's
head and computes the exact logits from it: for a 7B teacher about 8 kB per token instead of 64 kB of logits. `top_k` is
even smaller, but biased. numpy has no bfloat16, so such arrays are sent as a view of uint16; no part is uint16 itself.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from betakd_ray.batch.inputs import Pairs, TensorInputs
from betakd_ray.energies.rows import entropy
from betakd_ray.models.hidden import Hidden
from betakd_ray.objective import project, segment_mean, top_k
from betakd_ray.spec import Feature, InstanceWeighting, LogitsEnergy, ObjectiveSpec, TeacherSpec, TopKSignal

Signal = dict[str, NDArray[Any]]
"""Signal of the teacher for one sample: part → [places, width] or [places]; [size] for a part of the sample axis.

A sample without an image has no parts of the token axis.
"""
Axis = Literal["row", "token", "pair", "sample"]
"""Axis of a part: it has one value for each answer row, each image token, each pair of both, or the whole sample."""
IsNeeded = Callable[[TeacherSpec, ObjectiveSpec], bool]
CHUNK_ROWS = 1024
"""Number of rows whose logits are in memory at a time, for parts that are computed from logits."""


@dataclass(frozen=True)
class TeacherFacts:
    """Facts about the teacher that a student needs before the first batch. Small: the head is fetched separately."""

    width: int
    """Width of the hidden states, which is also the width of the image tokens that the language model receives."""
    heads: int
    """Number of attention heads of a layer."""
    dtype: str
    """Dtype of the hidden states by its torch name, e.g. bfloat16."""
    fingerprint: str = ""
    """Hash of configuration, code and weights, for the cache; empty if there is no cache."""
    top_k_vocab: int = 0
    """Number of token ids that a top-k signal chooses from."""

    @property
    def feature_sizes(self) -> dict[Feature, int]:
        """Return the width of each part that a weighting can take as a feature."""
        return {name: math.prod(PARTS[name].shape(Needs(), self)) for name in FEATURES}


@dataclass(frozen=True)
class Needs:
    """Parts that a job needs from its teacher, and their options."""

    parts: frozenset[str] = frozenset()
    top_k: int = 0
    """Number k of the most probable ids in `top_ids` and `top_log_probs`, per answer row."""
    vocab: int = 0
    """Number of token ids that teacher and student have in common; for `top_k`."""
    layer: int = 0
    """Layer whose output is `visual_layer`, counted from 1; 0 for none."""

    @classmethod
    def of(cls, teacher: TeacherSpec, objective: ObjectiveSpec, vocab: int) -> "Needs":
        """Return the needs of a spec; `vocab` is the number of token ids that the models have in common."""
        parts = frozenset(name for name, part in PARTS.items() if part.is_needed(teacher, objective))
        has_top_k = "top_ids" in parts
        layer = objective.feature_layer
        return cls(
            parts,
            # At least one id is left over. With none, the log-probability of the rest would be minus infinity.
            top_k=min(_k(teacher), vocab - 1) if has_top_k else 0,
            vocab=vocab if has_top_k else 0,
            layer=layer.teacher if layer else 0,
        )

    def __contains__(self, part: str) -> bool:
        return part in self.parts

    def __or__(self, other: "Needs") -> "Needs":
        """Return needs that serve two jobs. Both must ask for the same layer, and for the same top-k signal or none."""
        assert self.choices == other.choices
        return Needs(self.parts | other.parts, self.top_k, self.vocab, self.layer)

    @property
    def choices(self) -> tuple[int, ...]:
        """Return the options that must be equal for jobs that share answers."""
        return self.top_k, self.vocab, self.layer

    @property
    def reads_attention(self) -> bool:
        """Return whether a part is computed from attention weights, which fused kernels do not return."""
        return any(PARTS[name].reads_attention for name in self.parts)

    @property
    def tag(self) -> str:
        """Return the tags of all parts, joined by +. To the cache, a part with another tag is another part."""
        tags = (part.tag(self) if part.tag else name for name, part in PARTS.items() if name in self)
        return "+".join(dict.fromkeys(tags))


@dataclass(frozen=True)
class Forward:
    """Result of one forward pass of the teacher over a group of samples, from which the parts are computed."""

    hidden: Hidden
    inputs: TensorInputs
    pairs: Pairs | None
    """Pairs (answer row, image token); None if no part reads attention."""
    head: Tensor
    needs: Needs

    @cached_property
    def top(self) -> tuple[Tensor, Tensor]:
        """Return ids [R, k] and log-probabilities [R, k + 1]; the last one is that of all other ids together."""
        ids, log_probs = [], []
        for chunk in self.hidden.rows.split(CHUNK_ROWS):
            # Cut before the softmax: the probabilities of the ids that the student also has must add up to 1.
            logits = project(chunk, self.head)[:, : self.needs.vocab]
            top, at, rest = top_k(logits.log_softmax(1), self.needs.top_k)
            ids.append(at.int())
            log_probs.append(torch.cat([top, rest], dim=1))
        return torch.cat(ids), torch.cat(log_probs)


# --------------------------------------------------------------------------------------------- computing


def _vision(forward: Forward) -> Tensor:
    """Return [B, H] the mean image token of each sample; zeros for a sample without an image."""
    hidden, inputs = forward.hidden, forward.inputs
    if hidden.visual is None:
        return hidden.rows.new_zeros((len(inputs.input_ids), forward.head.shape[1]), dtype=torch.float32)
    return segment_mean(hidden.visual.float(), inputs.visual_sample, inputs.visual_per_sample)


def _answer(forward: Forward) -> Tensor:
    """Return [B, H] the mean hidden state over each sample's answer rows."""
    inputs = forward.inputs
    # In float32, because a long sum in bfloat16 stops growing.
    return segment_mean(forward.hidden.rows.float(), inputs.row_sample, inputs.rows_per_sample)


def _entropies(forward: Forward) -> Tensor:
    """Return [B, 2] mean and maximum of H(p), in nats, over each sample's answer rows."""
    inputs = forward.inputs
    rows = torch.cat([entropy(project(chunk, forward.head)) for chunk in forward.hidden.rows.split(CHUNK_ROWS)])
    mean = segment_mean(rows[:, None], inputs.row_sample, inputs.rows_per_sample)
    # The zeros take part in the maximum. They do not change it, because no entropy is below zero.
    top = rows.new_zeros(len(inputs.input_ids)).scatter_reduce(0, inputs.row_sample, rows, "amax")
    return torch.cat([mean, top[:, None]], dim=1)


def _salience(forward: Forward) -> Tensor | None:
    """Return [T] the mean attention to each image token, over heads and the answer rows of its sample."""
    hidden, pairs, inputs = forward.hidden, forward.pairs, forward.inputs
    if hidden.attention is None or pairs is None:
        return None
    received = torch.zeros(len(inputs.visual_sample), device=inputs.visual_sample.device)
    received.index_add_(0, pairs.token, hidden.attention.float().mean(dim=1))
    return received / inputs.rows_per_sample[inputs.visual_sample].clamp_min(1)


# ------------------------------------------------------------------------------------------------- asking


def _k(teacher: TeacherSpec) -> int:
    return teacher.signal.k if isinstance(teacher.signal, TopKSignal) else 0


def _compares_logits(objective: ObjectiveSpec) -> bool:
    return any(isinstance(energy, LogitsEnergy) for energy in objective.energies)


def _is_hidden_needed(teacher: TeacherSpec, objective: ObjectiveSpec) -> bool:
    return _compares_logits(objective) and not _k(teacher)


def _is_top_k_needed(teacher: TeacherSpec, objective: ObjectiveSpec) -> bool:
    return _compares_logits(objective) and bool(_k(teacher))


def _by_energy(name: str) -> IsNeeded:
    return lambda _, objective: name in objective.teacher_parts


def _by_feature(name: str) -> IsNeeded:
    def is_needed(_: TeacherSpec, objective: ObjectiveSpec) -> bool:
        weighting = objective.weighting
        return isinstance(weighting, InstanceWeighting) and name in weighting.features

    return is_needed


# -------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Part:
    """One part of a teacher's signal."""

    name: str
    axis: Axis
    is_needed: IsNeeded
    """Whether a job needs this part."""
    compute: Callable[[Forward], Tensor | None]
    """Function that computes the values for all samples of a forward pass: [places, *shape], or [B, *shape] for the
    sample axis. It returns None if no sample has a place."""
    shape: Callable[[Needs, TeacherFacts], tuple[int, ...]]
    """Shape of one value."""
    dtype: str | None = None
    """Dtype by its torch name; None for the dtype of the teacher."""
    tag: Callable[[Needs], str] | None = None
    """Tag of this part in `Needs.tag`; None if that is its name."""
    reads_attention: bool = False
    """Whether it is computed from attention weights."""
    must_be_finite: bool = False
    """Whether a sample is refused if a value is not finite. All other parts are computed from such parts."""
    noise: float = 0.0
    """Absolute size below which a value counts as noise when two signals are compared, in the unit of the part."""


def _wide(_: Needs, facts: TeacherFacts) -> tuple[int, ...]:
    return (facts.width,)


_TABLE = (
    # The final hidden state of each answer row.
    Part(
        "hidden",
        axis="row",
        is_needed=_is_hidden_needed,
        compute=lambda forward: forward.hidden.rows,
        shape=_wide,
        must_be_finite=True,
    ),
    # Instead of it, the k most probable ids of each answer row, most probable first …
    Part(
        "top_ids",
        axis="row",
        is_needed=_is_top_k_needed,
        compute=lambda forward: forward.top[0],
        shape=lambda needs, _: (needs.top_k,),
        dtype="int32",
        tag=lambda needs: f"top{needs.top_k}of{needs.vocab}",
    ),
    # … and their log-probabilities, with the log of all that is left in the last place.
    Part(
        "top_log_probs",
        axis="row",
        is_needed=_is_top_k_needed,
        compute=lambda forward: forward.top[1],
        shape=lambda needs, _: (needs.top_k + 1,),
        dtype="float32",
        tag=lambda needs: f"top{needs.top_k}of{needs.vocab}",
    ),
    # The projector's image tokens, as the language model receives them.
    Part(
        "visual",
        axis="token",
        is_needed=_by_energy("visual"),
        compute=lambda forward: forward.hidden.visual,
        shape=_wide,
        must_be_finite=True,
    ),
    # What a layer of the language model makes of them.
    Part(
        "visual_layer",
        axis="token",
        is_needed=_by_energy("visual_layer"),
        compute=lambda forward: forward.hidden.visual_layer,
        shape=_wide,
        tag=lambda needs: f"layer{needs.layer}",
        must_be_finite=True,
    ),
    # First-layer attention of each answer row to each image token of its sample, by head.
    Part(
        "attention",
        axis="pair",
        is_needed=_by_energy("attention"),
        compute=lambda forward: forward.hidden.attention,
        shape=lambda _, facts: (facts.heads,),
        reads_attention=True,
    ),
    # Its mean over heads and answer rows.
    Part(
        "salience",
        axis="token",
        is_needed=_by_energy("salience"),
        compute=_salience,
        shape=lambda *_: (),
        dtype="float32",
        reads_attention=True,
    ),
    # Features that a weighting predicts β from, h(x): one vector a sample.
    Part(
        "teacher_vision",
        axis="sample",
        is_needed=_by_feature("teacher_vision"),
        compute=_vision,
        shape=_wide,
        dtype="float32",
    ),
    Part(
        "teacher_answer",
        axis="sample",
        is_needed=_by_feature("teacher_answer"),
        compute=_answer,
        shape=_wide,
        dtype="float32",
    ),
    Part(
        "teacher_entropy",
        axis="sample",
        is_needed=_by_feature("teacher_entropy"),
        compute=_entropies,
        shape=lambda *_: (2,),
        dtype="float32",
        noise=0.1,  # nats: the entropy of a confident teacher is almost zero
    ),
)
PARTS: Mapping[str, Part] = {part.name: part for part in _TABLE}
"""All parts by name."""
FEATURES = cast(tuple[Feature, ...], tuple(name for name, part in PARTS.items() if part.axis == "sample"))


# -------------------------------------------------------------------------------------------- on the wire


def wire_dtype(part: str, facts: TeacherFacts) -> np.dtype[Any]:
    """Return the dtype of a part's array."""
    name = PARTS[part].dtype or facts.dtype
    return np.dtype("uint16" if name == "bfloat16" else name)


def value_bytes(part: str, needs: Needs, facts: TeacherFacts) -> int:
    """Return the size in bytes of one value of a part, e.g. for one answer row."""
    return math.prod(PARTS[part].shape(needs, facts)) * wire_dtype(part, facts).itemsize


# --------------------------------------------------------------------------------- samples and their groups
