"""The table of energies: name in specs, options, function, and what is compared, each in one place.

A class below says everything about one energy, and `SECTIONS` lists the classes. To add an energy, write its function
in `betakd_ray.energies.on_logits`, and its class here. An energy from a module of your own needs neither
(docs/extending.md).
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from betakd_ray.spec.base import (
    PLUGIN,
    PLUGIN_PATTERN,
    Count,
    Decay,
    Fraction,
    Plugin,
    Short,
    Spec,
    Temperature,
    as_tuple,
    finite,
    is_plugin,
    named,
)


class Energy(Spec):
    """One channel: a discrepancy between teacher and student. The fields of a subclass are its function's options."""

    function: ClassVar[str]
    """The function as module:name, so that a spec is checked without importing torch."""
    reads_attention: ClassVar[bool] = False
    """Whether attention weights are compared, which fused kernels do not return."""
    kind: Any

    @property
    def name(self) -> str:
        """Return the name of the energy's channel, in weights, metrics and messages."""
        return self.kind

    @property
    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of the function that the spec gives."""
        return self.model_dump(exclude={"kind", "schedule"})

    @property
    def teacher_parts(self) -> frozenset[str]:
        """Return the parts of the teacher's signal that are compared, besides its logits (see `teacher.parts`)."""
        return frozenset()


class LogitsEnergy(Energy):
    """An energy on the logits of answer rows: function(teacher_logits, student_logits, **options) → one per row."""

    moving: ClassVar[str | None] = None
    """Argument of the function that changes during the job, by the section's `schedule` (`betakd_ray.curriculum`)."""
    is_learned: ClassVar[bool] = False
    """Whether that argument is learned by gradient."""


class ProbabilitiesEnergy(LogitsEnergy):
    """An energy that is defined for any split of the vocabulary into buckets.

    Therefore it also works on `top_k` signals, at temperature 1.
    """

    teacher_temperature: Temperature = Field(default=1.0, description="τ_t")
    student_temperature: Temperature = Field(default=1.0, description="τ_s")


class ForwardKL(ProbabilitiesEnergy):
    function = "betakd_ray.energies.on_logits:forward_kl"
    kind: Literal["fkl"] = "fkl"
    reference: bool = Field(default=False, description="drop the teacher's entropy, as the released code does")


class ReverseKL(ProbabilitiesEnergy):
    function = "betakd_ray.energies.on_logits:reverse_kl"
    kind: Literal["rkl"] = "rkl"


class SkewForwardKL(ProbabilitiesEnergy):
    function = "betakd_ray.energies.on_logits:skew_forward_kl"
    kind: Literal["sfkl"] = "sfkl"
    skew: float = Field(default=0.1, gt=0, lt=1, description="λ, the teacher's share of the mixture")
    reference: bool = False


class SkewReverseKL(ProbabilitiesEnergy):
    function = "betakd_ray.energies.on_logits:skew_reverse_kl"
    kind: Literal["srkl"] = "srkl"
    skew: float = Field(default=0.1, gt=0, lt=1, description="λ, the student's share of the mixture")


class JensenShannon(ProbabilitiesEnergy):
    function = "betakd_ray.energies.on_logits:jensen_shannon"
    kind: Literal["js"] = "js"
    mixture: float = Field(default=0.5, gt=0, lt=1, description="w, the teacher's share (the released code: 0.1)")


class TotalVariation(ProbabilitiesEnergy):
    function = "betakd_ray.energies.on_logits:total_variation"
    kind: Literal["tvd"] = "tvd"


class AdaptiveKL(ProbabilitiesEnergy):
    function = "betakd_ray.energies.on_logits:adaptive_kl"
    kind: Literal["adaptive_kl"] = "adaptive_kl"
    head_mass: float = Field(default=0.5, gt=0, lt=1, description="μ, the teacher's probability mass in the head")


class TemperatureSchedule(Spec):
    """T = start + range · sigmoid(θ). θ learns to raise the loss, with a gradient that grows during the job."""

    start: Temperature = Field(default=1.0, description="lowest temperature")
    range: Temperature = Field(
        default=3.0, description="largest addition to start (the paper's 20 was for image classes)"
    )
    theta: float = Field(default=-2.0, ge=-20, le=20, description="θ at the first step")


class CurriculumTemperature(LogitsEnergy):
    """CTKD: forward KL at one temperature for teacher and student, which is learned against the student."""

    function = "betakd_ray.energies.on_logits:curriculum_temperature"
    moving = "temperature"
    is_learned = True
    kind: Literal["ctkd"] = "ctkd"
    schedule: TemperatureSchedule = TemperatureSchedule()
    reference: bool = Field(default=False, description="drop the teacher's entropy, as the released code does")


class InterpolationSchedule(Spec):
    """Schedule of t, the position of the target between student (0) and teacher (1).

    t rises at least linearly with the job's progress, and faster while the loss falls.
    """

    start: Fraction = Field(default=0.4, description="t_0")
    end: Fraction = Field(default=1.0, description="t_end")
    rate: float = Field(default=5e-4, gt=0, le=1, description="a")
    momentum: Decay = Field(default=0.99, description="b")

    @model_validator(mode="after")
    def _rises(self) -> "InterpolationSchedule":
        if self.start > self.end:
            raise ValueError(f"start {self.start} is above end {self.end}, but t only rises: lower start or raise end")
        return self


class TemporallyAdaptiveInterpolation(LogitsEnergy):
    """TAID: forward KL from a target that moves from the student to the teacher."""

    function = "betakd_ray.energies.on_logits:taid"
    moving = "t"
    kind: Literal["taid"] = "taid"
    schedule: InterpolationSchedule = InterpolationSchedule()
    reference: bool = Field(default=False, description="drop the target's entropy, as the released code does")


class MSELogits(LogitsEnergy):
    function = "betakd_ray.energies.on_logits:mse_logits"
    kind: Literal["mse_logits"] = "mse_logits"
    standardize: bool = Field(default=False, description="z-score both rows over the vocabulary first")


class MSEProbs(ProbabilitiesEnergy):
    function = "betakd_ray.energies.on_logits:mse_probs"
    kind: Literal["mse_probs"] = "mse_probs"


class CosineLogits(LogitsEnergy):
    function = "betakd_ray.energies.on_logits:cosine_logits"
    kind: Literal["cosine_logits"] = "cosine_logits"
    standardize: bool = False


class CosineProbs(ProbabilitiesEnergy):
    function = "betakd_ray.energies.on_logits:cosine_probs"
    kind: Literal["cosine_probs"] = "cosine_probs"


class VisualEnergy(Energy):
    """A channel on image tokens, which a text-only sample does not have.

    `train.distiller` calls its function, after a trained map of the teacher's values where `mapped` says so.
    """

    mapped: ClassVar[Literal["width", "heads"] | None] = None
    """Size in which the models may differ; a trained map gives the teacher's values the student's. None: no map."""


class FeatureLayer(Spec):
    """One layer of each language model, counted from 1; its output is compared."""

    teacher: Count
    student: Count


class FeatureDistance(VisualEnergy):
    """Distance of the image tokens' features, after a trained map from the teacher's width to the student's."""

    function = "betakd_ray.energies.on_image_tokens:feature_distance"
    mapped = "width"
    kind: Literal["fd"] = "fd"
    layer: FeatureLayer | Literal["projector"] = Field(
        default="projector",
        description="where the image tokens are compared: after the projectors, or, with e.g. "
        "{teacher: 16, student: 12}, after these layers of the language models",
    )

    @property
    def teacher_parts(self) -> frozenset[str]:
        return frozenset({"visual" if self.layer == "projector" else "visual_layer"})


class AlignTopK(VisualEnergy):
    """Align-KD's feature term: `fd` on the image tokens with the most attention in the teacher's first layer."""

    function = "betakd_ray.energies.on_image_tokens:feature_distance"
    mapped = "width"
    reads_attention = True
    kind: Literal["align_topk"] = "align_topk"
    tokens: Count = Field(default=16, description="compared image tokens per sample")

    @property
    def teacher_parts(self) -> frozenset[str]:
        return frozenset({"visual", "salience"})


class AlignAttention(VisualEnergy):
    """Align-KD's attention term: attention from each answer row to each image token in the first layer."""

    function = "betakd_ray.energies.on_image_tokens:feature_distance"
    mapped = "heads"
    reads_attention = True
    kind: Literal["align_attention"] = "align_attention"

    @property
    def teacher_parts(self) -> frozenset[str]:
        return frozenset({"attention"})


class Relation(VisualEnergy):
    """LLaVA-KD's relation term: similarities between the image tokens of a sample, in teacher and student."""

    function = "betakd_ray.energies.on_image_tokens:relation"
    kind: Literal["relation"] = "relation"

    @property
    def teacher_parts(self) -> frozenset[str]:
        return frozenset({"visual"})


SECTIONS: tuple[type[Energy], ...] = (
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    JensenShannon,
    TotalVariation,
    AdaptiveKL,
    CurriculumTemperature,
    TemporallyAdaptiveInterpolation,
    MSELogits,
    MSEProbs,
    CosineLogits,
    CosineProbs,
    FeatureDistance,
    AlignTopK,
    AlignAttention,
    Relation,
)
"""The energies of this package. docs/objective.md has a section for each."""
BY_NAME: dict[str, type[Energy]] = {section.model_fields["kind"].default: section for section in SECTIONS}
VISUAL_ENERGIES = frozenset(name for name, section in BY_NAME.items() if issubclass(section, VisualEnergy))


class PluginEnergy(LogitsEnergy):
    """An energy on logits from a module of your own: `kind` is module:function, all other fields are its options."""

    model_config = ConfigDict(extra="allow")

    kind: Plugin

    @property
    def function(self) -> str:
        return self.kind

    @property
    def name(self) -> str:
        return self.kind.partition(":")[2]

    @model_validator(mode="after")
    def _is_stored(self) -> "PluginEnergy":
        finite(self.model_extra)
        return self

    @model_validator(mode="after")
    def _has_a_name_of_its_own(self) -> "PluginEnergy":
        if self.name in {"ce", *BY_NAME}:
            raise ValueError(f"kind: {self.name} is a channel of this package; give your function another name")
        return self


def _tag(energy: Any) -> str | None:
    # A spec from a file has dicts here; a spec that is made in Python may have sections.
    kind = energy.get("kind") if isinstance(energy, dict) else getattr(energy, "kind", None)
    return PLUGIN if isinstance(kind, str) and is_plugin(kind) else kind


# A type checker does not accept a union that is made at run time.
if TYPE_CHECKING:
    AnyEnergy = Energy
else:
    AnyEnergy = Annotated[
        Union[
            (
                *(Annotated[section, Tag(name)] for name, section in BY_NAME.items()),
                Annotated[PluginEnergy, Tag(PLUGIN)],
            )
        ],
        Discriminator(_tag),
        BeforeValidator(named),
        Short({"enum": [*BY_NAME]}, {"type": "string", "pattern": PLUGIN_PATTERN}),
    ]
Energies = Annotated[tuple[AnyEnergy, ...], BeforeValidator(as_tuple), Short()]
