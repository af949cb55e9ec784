"""The section `objective`: cross-entropy, energies, and how they are weighted."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from betakd_ray.spec.base import Count, Short, Spec, as_tuple, named
from betakd_ray.spec.energies import AlignTopK, Energies, FeatureDistance, FeatureLayer


class EqualWeighting(Spec):
    """The plain sum of all channels."""

    kind: Literal["equal"] = "equal"


class ManualWeighting(Spec):
    """Fixed weights: given, or set once from the scales of the first steps (the paper's "initial scales")."""

    kind: Literal["manual"] = "manual"
    weights: dict[str, Annotated[float, Field(ge=0, le=1e9)]] | Literal["auto"] = "auto"
    auto_steps: Count = Field(
        default=20, description="number of first steps whose mean energies set the weights, with `auto`"
    )

    @model_validator(mode="after")
    def _auto(self) -> "ManualWeighting":
        if self.weights != "auto" and self.auto_steps != type(self).model_fields["auto_steps"].default:
            raise ValueError(
                "auto_steps: is used only with `weights: auto`, but weights are given; leave auto_steps out"
            )
        return self


LARGEST_LOG_BOUND = 20.0
"""Largest bound on |log β|; e^20 is about half a billion."""


class LearnedWeighting(Spec):
    """A β per channel that is learned together with the student, as the channel's precision."""

    d: float = Field(
        default=1.0,
        gt=0,
        le=1e6,
        description="a channel's share β·ℓ converges to d/2. The paper's dim(a) = V is for energies summed over the "
        "vocabulary; with energies of order one, the cross-entropy would be negligible",
    )
    positivity: Literal["softplus", "exp"] = "softplus"
    log_bound: float = Field(
        default=5.0, gt=0, le=LARGEST_LOG_BOUND, description="a smooth bound keeps β inside [e^-bound, e^bound]"
    )
    weight_ce: bool = Field(default=False, description="give CE a β of its own (Kendall & Gal); the paper does not")


class TaskWeighting(LearnedWeighting):
    """One learned β per channel, shared by all samples (homoscedastic)."""

    kind: Literal["task"] = "task"


Feature = Literal["teacher_vision", "teacher_answer", "teacher_entropy"]


class InstanceWeighting(LearnedWeighting):
    """One β per channel and sample, predicted from the teacher's features (Eq. 14)."""

    kind: Literal["instance"] = "instance"
    features: Annotated[tuple[Feature, ...], BeforeValidator(as_tuple), Short(), Field(min_length=1)] = (
        "teacher_vision",
    )
    hidden_size: Count = 128

    @model_validator(mode="after")
    def _once(self) -> "InstanceWeighting":
        if len(set(self.features)) != len(self.features):
            raise ValueError(f"features: a feature is listed twice in {list(self.features)}; list each once")
        return self


Weighting = Annotated[
    EqualWeighting | ManualWeighting | TaskWeighting | InstanceWeighting,
    Field(discriminator="kind"),
    BeforeValidator(named),
    Short({"enum": ["equal", "manual", "task", "instance"]}),
]


def check_weighting(weighting: Weighting, channels: Sequence[str], *, ce: bool) -> None:
    """Raise ValueError if a weighting does not fit the energies, or does not fit the cross-entropy."""
    weights = weighting.weights if isinstance(weighting, ManualWeighting) else None
    if isinstance(weights, dict) and set(weights) != set(channels):
        raise ValueError(
            f"weighting.weights names {sorted(weights)}, but the energies are {sorted(channels)}: give each energy one "
            "weight"
        )
    if weights == "auto" and not ce:
        raise ValueError(
            "weighting.weights: `auto` scales each energy to the cross-entropy, but ce is false: set ce or give weights"
        )
    if isinstance(weighting, LearnedWeighting) and weighting.weight_ce and not ce:
        raise ValueError("weighting.weight_ce gives the cross-entropy a β, but ce is false: change one of the two")


class ObjectiveSpec(Spec):
    """Cross-entropy on the data, energies between teacher and student, and their weighting (Eq. 13, 15)."""

    ce: bool = Field(default=True, description="false: distillation alone, as in the paper's Table 1")
    energies: Energies = ()
    weighting: Weighting = InstanceWeighting()
    reduction: Literal["sample", "token"] = Field(
        default="sample", description="mean over the samples of each sample's mean, or mean over all answer tokens"
    )
    chunk_rows: Count | None = Field(
        default=None,
        description="answer rows whose logits are in memory at a time; null: as many as fit 128 MiB for each side",
    )

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(energy.name for energy in self.energies)

    @property
    def teacher_parts(self) -> frozenset[str]:
        """Return the parts of the teacher's signal that the energies compare, besides its logits."""
        return frozenset().union(*(energy.teacher_parts for energy in self.energies))

    @property
    def feature_layer(self) -> FeatureLayer | None:
        """Return the layer whose output `fd` compares; None without `fd`, or if it compares the projectors' output."""
        layers = [energy.layer for energy in self.energies if isinstance(energy, FeatureDistance)]
        return layers[0] if layers and isinstance(layers[0], FeatureLayer) else None

    @property
    def reads_attention(self) -> bool:
        """Return whether an energy needs attention weights, which fused kernels do not return."""
        return any(energy.reads_attention for energy in self.energies)

    @property
    def compares_attention(self) -> bool:
        """Return whether the student's attention weights are compared too."""
        return "attention" in self.teacher_parts

    @property
    def salient_tokens(self) -> int:
        """Return the number of image tokens per sample that `align_topk` compares; 0 without it."""
        return next((energy.tokens for energy in self.energies if isinstance(energy, AlignTopK)), 0)

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveSpec":
        if len(set(self.channels)) != len(self.channels):
            raise ValueError(f"energies: a name is listed twice in {list(self.channels)}; list each once")
        if not self.ce and not self.energies:
            raise ValueError("ce is false and energies is empty: there is nothing to learn from. Add an energy")
        check_weighting(self.weighting, self.channels, ce=self.ce)
        return self
