"""The description of a job: one frozen tree of pydantic models.

It is read from YAML and stored as JSON. Every default is the paper's (Beta-KD §4.1 and its released recipe). An unknown
field is an error. This module imports neither torch nor ray, so a spec is checked in milliseconds, before the job uses
a cluster. A spec must not hold secrets: storage credentials come from the environment.
"""

import difflib
import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import fsspec
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from betakd_ray.errors import SpecError, without_secrets, without_url_secrets


class Spec(BaseModel):
    """Base class of every section, which is immutable and accepts only declared keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True, allow_inf_nan=False
    )


def _public(url: str) -> str:
    """Refuse a URL with a secret, because a spec is stored with its run and printed in the model card."""
    if "\0" in url:
        raise ValueError("holds a NUL character, which no path or URL has")
    if without_url_secrets(url) != url:
        raise ValueError(
            "holds a password, a token or a signature, and a spec is stored and published: leave it out, and set "
            "credentials in the environment of the cluster (AWS_ACCESS_KEY_ID … or a role; docs/security.md)"
        )
    return url


def _absolute(location: str) -> str:
    """Return a path as an absolute path, because Ray's workers run in other folders; return a URL unchanged."""
    if re.match(r"^[a-z][a-z0-9+.-]*://", location):
        return location
    return os.path.abspath(os.path.expanduser(location))


def _absolute_if_present(location: str) -> str:
    """Return the absolute path of an existing folder; any other relative name is a hub id and is returned unchanged."""
    return (
        _absolute(location)
        if os.path.exists(os.path.expanduser(location)) or location.startswith(("/", "./", "~"))
        else location
    )


def _folder(location: str) -> str:
    if location.endswith(".gguf"):
        folder, _, file = location.rpartition("/")
        raise ValueError(
            f"is a file, and a model's folder is wanted; a teacher and a student of kind: checkpoint read one, as "
            f"path: {folder or '.'} and gguf_file: {file}"
        )
    return location


def _gguf_within(file: str) -> str:
    if not file.endswith(".gguf") or file.startswith(("/", "~")) or "://" in file or ".." in file.split("/"):
        raise ValueError(f"{_short(file)} is no .gguf file within path; name it as it is called there, e.g. Q8_0.gguf")
    return file


Url = Annotated[str, AfterValidator(_public)]
GgufFile = Annotated[Url, AfterValidator(_gguf_within)]
Location = Annotated[Url, Field(min_length=1), AfterValidator(_absolute)]
ModelLocation = Annotated[Url, Field(min_length=1), AfterValidator(_folder), AfterValidator(_absolute_if_present)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class StorageSpec(Spec):
    """Access to an object store. Credentials come from the environment, never from a spec."""

    endpoint_url: Url | None = Field(default=None, description="S3 endpoint, for stores other than AWS")
    region: str | None = None
    anonymous: bool = Field(default=False, description="read public buckets without credentials")


def _named(value: Any) -> Any:
    """Expand the short form `fkl` to `{kind: fkl}`."""
    return {"kind": value} if isinstance(value, str) else value


class _Place(Spec):
    """A folder and the store that holds it. A path or URL alone is a short form."""

    path: Location
    storage: StorageSpec = StorageSpec()

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class CacheSpec(_Place):
    """Storage for a teacher's answers.

    Every epoch after the first reads them there. So does every job with the same teacher, template and image size.
    """


# ---------------------------------------------------------------------------------------------------- data


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, (str, dict)) else value


class TrainingData(Spec):
    """Shards, and how often an epoch reads them. A path or URL alone is read once per epoch."""

    path: Location = Field(description="a path or URL, with {00..07} braces and * globs")
    weight: float = Field(default=1.0, gt=0, le=1000, description="passes an epoch, e.g. 2.5, or 0.1 for a tenth")

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_serializer
    def _as_given(self) -> str | dict[str, Any]:
        return self.path if self.weight == 1 else {"path": self.path, "weight": self.weight}

    def __str__(self) -> str:
        return self.path if self.weight == 1 else f"{self.path} × {self.weight:g}"


class DataSpec(Spec):
    """Settings for reading shards and for turning conversations into tokens."""

    train: Annotated[tuple[TrainingData, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = Field(
        description="shards: paths or URLs, with {00..07} braces and * globs, each alone or as {path, weight}"
    )
    storage: StorageSpec = StorageSpec()
    template: Literal["plain", "vicuna_v1", "chat"] = Field(
        default="vicuna_v1", description="`chat` is the processor's own template; `plain` is for projector warm-up"
    )
    system_prompt: str | None = Field(default=None, description="replaces the template's own; '' for none")
    max_length: int = Field(default=2048, ge=8, description="tokens, image tokens included")
    pad_to_square: bool | None = Field(
        default=None, description="pad images with the processor's mean colour; default: only for LLaVA and MobileVLM"
    )
    shuffle: bool = Field(default=True, description="seeded by training.seed and the epoch")
    shuffle_buffer: int = Field(default=1000, ge=1, description="samples of the open shards that are shuffled together")
    max_image_pixels: int = Field(default=100_000_000, ge=1, description="larger images are quarantined, not decoded")
    max_bad_fraction: Fraction = Field(default=0.01, description="quarantined share of the data that stops the job")

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the paths and URLs of `train`, without their weights."""
        return tuple(entry.path for entry in self.train)


# -------------------------------------------------------------------------------------------------- models


class ModelSpec(Spec):
    """A pretrained vision–language model, or a language model for text alone: a folder, a hub id, or a URL."""

    path: ModelLocation
    gguf_file: GgufFile | None = Field(
        default=None, description="a GGUF in that folder: the whole of a language model; its weights are unpacked"
    )
    revision: str | None = None
    storage: StorageSpec = StorageSpec()
    attn_implementation: str | None = None
    trust_remote_code: bool = Field(
        default=False, description="runs code found beside the weights: only if you read it"
    )

    @model_validator(mode="after")
    def _trusted(self) -> "ModelSpec":
        if "/" in (self.attn_implementation or "") and not self.trust_remote_code:
            raise ValueError(
                f"attn_implementation: {self.attn_implementation} is a repository, whose code would run: read it and "
                "set trust_remote_code: true, or name one of transformers' own, e.g. sdpa"
            )
        return self


class HiddenSignal(Spec):
    """The final hidden state of every answer token, which gives the exact logits with the teacher's head."""

    kind: Literal["hidden"] = "hidden"


class TopKSignal(Spec):
    """The k largest probabilities of every answer token, and the rest of the mass as one bucket.

    It needs a tenth of the bytes of `hidden`, and the students need no copy of the teacher's head. It has a bias
    (docs/objective.md).
    """

    kind: Literal["top_k"] = "top_k"
    k: int = Field(default=64, ge=1)


Signal = Annotated[HiddenSignal | TopKSignal, Field(discriminator="kind"), BeforeValidator(_named)]


_LOADING = {
    "config": "is read from teacher.path",
    "output_loading_info": "is for transformers alone",
    "pretrained_model_name_or_path": "is teacher.path",
    "state_dict": "is read from teacher.path",
    "token": "is a secret, and comes from the environment (HF_TOKEN)",
    "torch_dtype": "is set by teacher.dtype",
    "use_safetensors": "is always true: a pickle can run code",
    "weights_only": "is always true: a pickle can run code",
}
"""Keyword of from_pretrained that `teacher.options` may not set → the reason."""


class TeacherSpec(ModelSpec):
    """The frozen teacher, which runs in its own actors."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    signal: Signal = Field(default=HiddenSignal(), description="what travels for energies on logits")
    batch_tokens: int = Field(
        default=8192,
        ge=1,
        description="tokens that a teacher scores at a time, padding included: samples of like lengths are put "
        "together until it is reached. The default fits one GPU with a teacher that leaves a few GB free",
    )
    window: int = Field(
        default=4, ge=0, description="groups that a student worker keeps with the teachers beyond those of one step"
    )
    timeout_s: Positive = Field(
        default=600.0,
        description="a teacher that works on one group for so long, or is silent, is replaced; waiting for its turn "
        "does not count",
    )
    cache: CacheSpec | None = Field(default=None, description="keep the teacher's answers here, for other jobs too")
    options: dict[str, Any] = Field(
        default_factory=dict, description="further keywords of transformers' from_pretrained, e.g. quantization_config"
    )

    @model_validator(mode="after")
    def _own_options(self) -> "TeacherSpec":
        for name in self.options:
            if name in TeacherSpec.model_fields or name in _LOADING:
                raise ValueError(f"options.{name}: {_LOADING.get(name, f'is set by teacher.{name}')}; leave it out")
        quantization = self.options.get("quantization_config", {})
        if not isinstance(quantization, dict):
            raise ValueError(
                f"options.quantization_config: {_short(quantization)} is no mapping; write it as transformers keeps "
                "it, e.g. {quant_method: bitsandbytes, load_in_8bit: true}"
            )
        if self.gguf_file and quantization:
            raise ValueError("options.quantization_config: the weights of a gguf_file are unpacked; leave it out")
        return self


class CheckpointInit(ModelSpec):
    """Start from pretrained weights."""

    kind: Literal["checkpoint"] = "checkpoint"


class ConfigInit(Spec):
    """Start from random weights, with a transformers configuration."""

    kind: Literal["config"] = "config"
    config: dict[str, Any] = Field(description="a transformers config, with its model_type")
    processor: ModelLocation = Field(description="where the tokenizer and image processor come from")
    vision_tower: ModelLocation | None = Field(
        default=None, description="copy the vision tower's weights from this model; its config must match"
    )
    storage: StorageSpec = StorageSpec()


class PartsInit(Spec):
    """Start from a language model and a vision tower, with a new projector between them: a LLaVA before its warm-up."""

    kind: Literal["parts"] = "parts"
    language_model: ModelLocation = Field(description="a causal language model; the tokenizer is its own")
    vision_tower: ModelLocation = Field(
        description="a CLIP, SigLIP or DINOv2, or a model that has one; the image processor is its own"
    )
    projector: Literal["mlp2x_gelu", "ldpnetv2"] = Field(
        default="mlp2x_gelu", description="LLaVA's two linear layers, or MobileVLM's LDPv2"
    )
    vision_feature_layer: int = Field(default=-2, description="hidden state of the tower that the projector takes")
    storage: StorageSpec = StorageSpec()


Part = Literal["language_model", "projector", "vision_tower"]


class LoraSpec(Spec):
    """Low-rank adapters (arXiv 2106.09685) in the language model, whose own weights do not change."""

    r: int = Field(default=16, ge=1, description="rank")
    alpha: Positive = Field(default=32.0, description="what an adapter adds is scaled by alpha / r")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="linear layers by their last name, e.g. q_proj; default: all"
    )
    merge: bool = Field(
        default=True, description="add them to the weights on export; false: write them beside, for peft"
    )


class StudentSpec(Spec):
    """The model that is trained. Parts that `train` does not name are frozen and not in the optimizer."""

    init: Annotated[CheckpointInit | ConfigInit | PartsInit, Field(discriminator="kind")]
    train: tuple[Part, ...] = Field(default=("language_model", "projector"), min_length=1)
    lora: LoraSpec | None = Field(default=None, description="how the language model learns; default: all its weights")

    @model_validator(mode="after")
    def _adapts(self) -> "StudentSpec":
        if self.lora and "language_model" not in self.train:
            raise ValueError(f"lora is for the language model, which train {list(self.train)} leaves out: add it")
        return self


# ----------------------------------------------------------------------------------------------- objective


class Energy(Spec):
    """One channel of the objective: a discrepancy between teacher and student."""


class _OnProbabilities(Energy):
    """An energy that is defined for any split of the vocabulary into buckets.

    Therefore it also works on `top_k` signals, at temperature 1.
    """

    teacher_temperature: Positive = Field(default=1.0, description="τ_t")
    student_temperature: Positive = Field(default=1.0, description="τ_s")


class ForwardKL(_OnProbabilities):
    kind: Literal["fkl"] = "fkl"
    reference: bool = Field(default=False, description="drop the teacher's entropy, as the released code does")


class ReverseKL(_OnProbabilities):
    kind: Literal["rkl"] = "rkl"


class SkewForwardKL(_OnProbabilities):
    kind: Literal["sfkl"] = "sfkl"
    skew: float = Field(default=0.1, gt=0, lt=1, description="λ, the teacher's share of the mixture")
    reference: bool = False


class SkewReverseKL(_OnProbabilities):
    kind: Literal["srkl"] = "srkl"
    skew: float = Field(default=0.1, gt=0, lt=1, description="λ, the student's share of the mixture")


class JensenShannon(_OnProbabilities):
    kind: Literal["js"] = "js"
    mixture: float = Field(default=0.5, gt=0, lt=1, description="w, the teacher's share (the released code: 0.1)")


class TotalVariation(_OnProbabilities):
    kind: Literal["tvd"] = "tvd"


class AdaptiveKL(_OnProbabilities):
    kind: Literal["adaptive_kl"] = "adaptive_kl"
    head_mass: float = Field(default=0.5, gt=0, lt=1, description="μ, teacher mass that makes the head")


class TemperatureSchedule(Spec):
    """T = start + range · sigmoid(θ). θ learns to raise the loss, with a gradient that grows during the job."""

    start: Positive = Field(default=1.0, description="lowest temperature")
    range: Positive = Field(default=3.0, description="above it (the original's 20 was for image classes)")
    theta: float = Field(default=-2.0, description="θ at the first step")


class CurriculumTemperature(Energy):
    """CTKD: forward KL at one temperature for teacher and student, which is learned against the student."""

    kind: Literal["ctkd"] = "ctkd"
    schedule: TemperatureSchedule = TemperatureSchedule()
    reference: bool = Field(default=False, description="drop the teacher's entropy, as the released code does")


class InterpolationSchedule(Spec):
    """Schedule of t, the position of the target between student (0) and teacher (1).

    t rises at least linearly with the job's progress, and faster while the loss falls.
    """

    start: Fraction = Field(default=0.4, description="t_0")
    end: Fraction = Field(default=1.0, description="t_end")
    rate: Positive = Field(default=5e-4, description="a")
    momentum: float = Field(default=0.99, ge=0, lt=1, description="b")

    @model_validator(mode="after")
    def _rises(self) -> "InterpolationSchedule":
        if self.start > self.end:
            raise ValueError(f"start {self.start} is above end {self.end}: t only rises")
        return self


class TemporallyAdaptiveInterpolation(Energy):
    """TAID: forward KL from a target that moves from the student to the teacher."""

    kind: Literal["taid"] = "taid"
    schedule: InterpolationSchedule = InterpolationSchedule()
    reference: bool = Field(default=False, description="drop the target's entropy, as the released code does")


class MSELogits(Energy):
    kind: Literal["mse_logits"] = "mse_logits"
    standardize: bool = Field(default=False, description="z-score both rows over the vocabulary first")


class MSEProbs(_OnProbabilities):
    kind: Literal["mse_probs"] = "mse_probs"


class CosineLogits(Energy):
    kind: Literal["cosine_logits"] = "cosine_logits"
    standardize: bool = False


class CosineProbs(_OnProbabilities):
    kind: Literal["cosine_probs"] = "cosine_probs"


class VisualEnergy(Energy):
    """A channel on image tokens, which a text-only sample does not have."""


class FeatureLayer(Spec):
    """One layer of each language model, counted from 1; its output is compared."""

    teacher: int = Field(ge=1)
    student: int = Field(ge=1)


class FeatureDistance(VisualEnergy):
    """Distance of the image tokens' features, after a trained map from the teacher's width to the student's."""

    kind: Literal["fd"] = "fd"
    layer: FeatureLayer | Literal["projector"] = Field(
        default="projector",
        description="what the projectors give, or, with e.g. {teacher: 16, student: 12}, what the language models make "
        "of it up to there",
    )


class AlignAttention(VisualEnergy):
    """Align-KD's attention term: attention from each answer row to each image token in the first layer."""

    kind: Literal["align_attention"] = "align_attention"


class AlignTopK(VisualEnergy):
    """Align-KD's feature term: `fd` on the image tokens with the most attention in the teacher's first layer."""

    kind: Literal["align_topk"] = "align_topk"
    tokens: int = Field(default=16, ge=1, description="image tokens of a sample")


class Relation(VisualEnergy):
    """LLaVA-KD's relation term: similarities between the image tokens of a sample, in teacher and student."""

    kind: Literal["relation"] = "relation"


AnyEnergy = Annotated[
    ForwardKL
    | ReverseKL
    | SkewForwardKL
    | SkewReverseKL
    | JensenShannon
    | TotalVariation
    | AdaptiveKL
    | CurriculumTemperature
    | TemporallyAdaptiveInterpolation
    | MSELogits
    | MSEProbs
    | CosineLogits
    | CosineProbs
    | FeatureDistance
    | AlignAttention
    | AlignTopK
    | Relation,
    Field(discriminator="kind"),
    BeforeValidator(_named),
]
VISUAL_ENERGIES = frozenset({"fd", "relation", "align_attention", "align_topk"})
ATTENTION_ENERGIES = frozenset({"align_attention", "align_topk"})
Energies = Annotated[tuple[AnyEnergy, ...], BeforeValidator(_as_tuple)]


class EqualWeighting(Spec):
    """The plain sum of all channels."""

    kind: Literal["equal"] = "equal"


class ManualWeighting(Spec):
    """Fixed weights: given, or set once from the scales of the first steps (the paper's "initial scales")."""

    kind: Literal["manual"] = "manual"
    weights: dict[str, Annotated[float, Field(ge=0)]] | Literal["auto"] = "auto"
    auto_steps: int = Field(default=20, ge=1, description="steps whose mean scales set the weights, with `auto`")

    @model_validator(mode="after")
    def _auto(self) -> "ManualWeighting":
        if self.weights != "auto" and self.auto_steps != type(self).model_fields["auto_steps"].default:
            raise ValueError(
                "auto_steps: counts the steps that set `weights: auto`; weights are given, so leave it out"
            )
        return self


LARGEST_LOG_BOUND = 20.0
"""Largest bound on |log β|; e^20 is about half a billion."""


class LearnedWeighting(Spec):
    """A β per channel that is learned together with the student, as the channel's precision."""

    d: Positive = Field(
        default=1.0,
        description="a channel's share β·ℓ settles at d/2. The literal dim(a) = V belongs to energies summed over the "
        "vocabulary; with energies of order one it drowns the cross-entropy",
    )
    positivity: Literal["softplus", "exp"] = "softplus"
    log_bound: float = Field(
        default=5.0, gt=0, le=LARGEST_LOG_BOUND, description="β stays inside [e^-bound, e^bound], smoothly"
    )
    weight_ce: bool = Field(default=False, description="give CE a β of its own (Kendall & Gal); the paper does not")


class TaskWeighting(LearnedWeighting):
    """One learned β per channel, shared by all samples (homoscedastic)."""

    kind: Literal["task"] = "task"


Feature = Literal["teacher_vision", "teacher_answer", "teacher_entropy"]


class InstanceWeighting(LearnedWeighting):
    """One β per channel and sample, predicted from the teacher's features (Eq. 14)."""

    kind: Literal["instance"] = "instance"
    features: Annotated[tuple[Feature, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = ("teacher_vision",)
    hidden_size: int = Field(default=128, ge=1)

    @model_validator(mode="after")
    def _once(self) -> "InstanceWeighting":
        if len(set(self.features)) != len(self.features):
            raise ValueError(f"features: one stands twice in {list(self.features)}; give each once")
        return self


Weighting = Annotated[
    EqualWeighting | ManualWeighting | TaskWeighting | InstanceWeighting,
    Field(discriminator="kind"),
    BeforeValidator(_named),
]


def check_weighting(weighting: Weighting, channels: Sequence[str], *, ce: bool) -> None:
    """Raise ValueError if a weighting does not fit the energies, or does not fit the cross-entropy."""
    weights = weighting.weights if isinstance(weighting, ManualWeighting) else None
    if isinstance(weights, dict) and set(weights) != set(channels):
        raise ValueError(
            f"weighting.weights names {sorted(weights)}, the energies are {sorted(channels)}: give one weight to each "
            "energy"
        )
    if weights == "auto" and not ce:
        raise ValueError("weighting.weights: `auto` scales each energy to the cross-entropy, and ce is false")
    if isinstance(weighting, LearnedWeighting) and weighting.weight_ce and not ce:
        raise ValueError("weighting.weight_ce gives the cross-entropy a β, and ce is false: drop one of the two")


class ObjectiveSpec(Spec):
    """Cross-entropy on the data, energies between teacher and student, and their weighting (Eq. 13, 15)."""

    ce: bool = Field(default=True, description="false for the paper's Table 1: distillation alone")
    energies: Energies = ()
    weighting: Weighting = InstanceWeighting()
    reduction: Literal["sample", "token"] = Field(
        default="sample", description="mean over samples of per-sample means, or over all answer tokens"
    )
    chunk_rows: int = Field(default=1024, ge=1, description="answer rows whose logits exist at one time")

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(energy.kind for energy in self.energies)

    @property
    def feature_layer(self) -> FeatureLayer | None:
        """Return the layer whose output `fd` compares; None without `fd`, or if it compares the projectors' output."""
        layers = [energy.layer for energy in self.energies if isinstance(energy, FeatureDistance)]
        return layers[0] if layers and isinstance(layers[0], FeatureLayer) else None

    @property
    def reads_attention(self) -> bool:
        """Return whether an energy needs attention weights, which fused kernels do not return."""
        return not ATTENTION_ENERGIES.isdisjoint(self.channels)

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveSpec":
        if len(set(self.channels)) != len(self.channels):
            raise ValueError(f"energies: a kind stands twice in {list(self.channels)}; give each once")
        if not self.ce and not self.energies:
            raise ValueError("ce is false and energies is empty: there is nothing to learn from. Add an energy")
        check_weighting(self.weighting, self.channels, ce=self.ce)
        return self


# ------------------------------------------------------------------------------------ optimizer and training


class OptimizerSpec(Spec):
    """AdamW with separate learning rates for the projector, for β, and for everything else."""

    lr: Positive = 4e-5
    projector_lr: Positive | None = Field(default=None, description="default: lr; the recipe's stage 1 has 1e-3")
    beta_lr: Positive = Field(
        default=1e-3, description="for β's parameters and ctkd's θ, in float32, without weight decay"
    )
    weight_decay: float = Field(default=0.0, ge=0)
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Fraction = 0.03
    max_grad_norm: Positive = 1.0


class WorkersSpec(Spec):
    """Number of student processes, or {min, max} for as many as the cluster has room for.

    With {min, max}, the job resumes automatically with another number.
    """

    min: int = Field(default=1, ge=1)
    max: int = Field(ge=1)

    @property
    def is_elastic(self) -> bool:
        return self.min < self.max

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return {"min": value, "max": value} if isinstance(value, int | str) else value

    @model_validator(mode="after")
    def _ordered(self) -> "WorkersSpec":
        if self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}")
        return self


DEFAULT_MICRO_BATCH = 8
"""Default limit of a micro-batch, in samples."""


class TrainingSpec(Spec):
    """Settings of steps, batches, precision and checkpoints."""

    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1, description="stop early; default: all epochs")
    global_batch_size: int = Field(default=128, ge=1, description="samples a step, whatever the number of workers")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="samples a worker holds at a time; default: 8, or no limit with micro_batch_tokens",
    )
    micro_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens a worker holds at a time, padding and image tokens included: samples of like lengths are "
        "put together until it is reached",
    )
    workers: WorkersSpec = WorkersSpec(max=1)
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="merged last into the DeepSpeed config")
    seed: int = 0
    checkpoint_every: int = Field(default=500, ge=1, description="steps")
    keep: int = Field(default=2, ge=1, description="checkpoints kept")
    log_every: int = Field(default=10, ge=1, description="steps")
    max_skipped_steps: int = Field(default=5, ge=1, description="non-finite steps in a row that stop the job")
    max_failures: int = Field(
        default=3,
        ge=0,
        description="restarts in a row with no new checkpoint in between: of the student workers, and of the job where "
        "a process that watches over it died",
    )
    collective_timeout_s: Positive = Field(default=600.0, description="a rank silent for so long is taken for dead")

    def steps(self, samples: int) -> int:
        """Return the optimizer steps of a job that reads `samples` samples over all its epochs."""
        steps = samples // self.global_batch_size
        return min(steps, self.max_steps or steps)

    @property
    def micro_batch_samples(self) -> int | None:
        """Return the limit of a micro-batch in samples; None if only tokens limit it."""
        return self.micro_batch_size or (None if self.micro_batch_tokens else DEFAULT_MICRO_BATCH)

    def share(self, workers: int) -> int:
        """Return the largest number of samples of a step that one of `workers` workers gets."""
        return -(-self.global_batch_size // workers)

    def samples_at_a_time(self, workers: int, tokens: float) -> int:
        """Return the largest number of samples in a micro-batch if each sample has `tokens` tokens."""
        by_tokens = max(1, int(self.micro_batch_tokens / tokens)) if self.micro_batch_tokens else self.share(workers)
        return min(by_tokens, self.micro_batch_samples or by_tokens, self.share(workers))

    def accumulation(self, workers: int, tokens: float) -> int:
        """Return the number of micro-batches per step and worker if each sample has `tokens` tokens."""
        return -(-self.share(workers) // self.samples_at_a_time(workers, tokens))

    @model_validator(mode="after")
    def _owns(self) -> "TrainingSpec":
        taken = {
            "train_batch_size": "global_batch_size",
            "train_micro_batch_size_per_gpu": "micro_batch_size and micro_batch_tokens",
            "gradient_accumulation_steps": "micro_batch_size, micro_batch_tokens and workers",
            "gradient_clipping": "optimizer.max_grad_norm",
            "bf16": "precision",
            "fp16": "precision",
            "data_types": "this package (gradients are summed in float32)",
            "communication_data_type": "this package (gradients are summed in float32)",
            "optimizer": "the optimizer section",
            "scheduler": "the optimizer section",
        }
        for key in self.deepspeed:
            if key in taken:
                raise ValueError(f"deepspeed.{key}: is set by {taken[key]}; leave it out")
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"deepspeed.zero_optimization: is {_short(zero)}, not a mapping")
        if "stage" in zero:
            raise ValueError("deepspeed.zero_optimization.stage: is set by zero_stage; leave it out")
        return self

    @model_validator(mode="after")
    def _has_work_for_all(self) -> "TrainingSpec":
        if self.global_batch_size < self.workers.max:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is less than one sample for each of up to "
                f"{self.workers.max} workers: raise it, or lower workers"
            )
        return self

    @model_validator(mode="after")
    def _keeps_float32_copies(self) -> "TrainingSpec":
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError(
                "zero_stage is 0 and precision is bf16: there DeepSpeed sums gradients in bfloat16. Set zero_stage to "
                "1, which with one worker takes no more memory, or precision to fp32"
            )
        return self


# ------------------------------------------------------------------------------------------ cluster, output


class PoolSpec(Spec):
    """Resources that one process of a pool needs on its node."""

    gpus: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description="per process; auto: one if the cluster has any, else none"
    )
    cpus: float = Field(default=1.0, ge=0)
    labels: dict[str, str] = Field(default_factory=dict, description="node labels, e.g. betakd.io/pool: student")
    resources: dict[str, float] = Field(default_factory=dict, description="custom resources, e.g. student_slot: 1")


AcceleratorType = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class GPUPoolSpec(PoolSpec):
    """Resources that one process with a model (teacher or student) needs on its node."""

    # Not checked against Ray's list: a node reports the name of any GPU that it finds, and an operator may give a name
    # of its own, such as "A100-40G".
    accelerator_type: AcceleratorType | None = Field(
        default=None, description="model of the GPU as Ray calls it (ray.util.accelerators), e.g. H100, L40S, A100-80G"
    )

    @model_validator(mode="after")
    def _has_gpus(self) -> "GPUPoolSpec":
        if self.accelerator_type and self.gpus == 0:
            raise ValueError(
                f"accelerator_type is {self.accelerator_type} and gpus is 0: ask for a GPU, or for no type"
            )
        return self


class TeacherPoolSpec(GPUPoolSpec):
    """The teacher's actors, which keep running when the students restart."""

    min: int = Field(default=1, ge=1)
    max: int | None = Field(default=None, ge=1, description="default: min")
    max_restarts: int = Field(
        default=3, ge=0, description="times `max`: teachers that may die in a row, with no answer from any in between"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "TeacherPoolSpec":
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}")
        return self


class ClusterSpec(Spec):
    """The cluster, and the resources of each kind of process."""

    address: Url | None = Field(
        default=None, description="a running cluster; default: the one around, else a local one"
    )
    teacher: TeacherPoolSpec = TeacherPoolSpec()
    student: GPUPoolSpec = GPUPoolSpec()
    readers: PoolSpec = Field(default=PoolSpec(gpus=0, cpus=1.0), description="tasks that read and decode shards")
    start_timeout_s: Positive = Field(default=600.0, description="wait for nodes and models")


class OutputSpec(_Place):
    """Folder for everything that a run writes, which goes to `path`/`name`."""

    path: Location = "runs"


class TrackingSpec(Spec):
    """Places for the metrics, in addition to the run's own metrics.jsonl."""

    progress: bool = Field(default=True, description="a progress line with ETA on the driver's terminal")
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()


# ------------------------------------------------------------------------------------------------- the jobs


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="letters, digits, . _ -")]


class JobSpec(Spec):
    """One distillation job, or plain supervised fine-tuning if there is no `teacher`."""

    name: Name
    data: DataSpec
    student: StudentSpec
    teacher: TeacherSpec | None = None
    objective: ObjectiveSpec = ObjectiveSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    training: TrainingSpec = TrainingSpec()
    cluster: ClusterSpec = ClusterSpec()
    output: OutputSpec = Field(default_factory=OutputSpec)
    tracking: TrackingSpec = TrackingSpec()

    @model_validator(mode="after")
    def _teacher_has_work(self) -> "JobSpec":
        if self.teacher is None and self.objective.energies:
            raise ValueError(
                f"objective.energies is {list(self.objective.channels)} and there is no teacher: name one, or drop them"
            )
        weighting = self.objective.weighting
        if self.teacher is None and isinstance(weighting, InstanceWeighting) and weighting.weight_ce:
            raise ValueError(
                "objective.weighting: instance predicts β from a teacher's features, and there is none: use task"
            )
        if self.teacher is not None and isinstance(self.teacher.signal, TopKSignal):
            self._check_top_k()
        if self.objective.reads_attention:
            self._check_attention()
        if self.teacher is not None and self.training.workers.is_elastic:
            self._check_elastic()
        if self.teacher is not None and not self.objective.energies:
            raise ValueError("teacher is given and objective.energies is empty: add one, e.g. energies: [cosine_probs]")
        return self

    def _check_elastic(self) -> None:
        # Ray Train counts how many workers fit by resources. It ignores labels, and does not know that the teachers
        # need some of the same resources.
        if not self.cluster.student.resources:
            raise ValueError(
                "cluster.student.resources: with training.workers of {min, max}, name a resource that only the "
                "students' nodes have, e.g. {student_slot: 1}; else Ray counts the teachers' room as the students'"
            )

    def _check_attention(self) -> None:
        if self.training.gradient_checkpointing:
            raise ValueError(
                "training.gradient_checkpointing: align_attention and align_topk read the first layer's attention, "
                "which checkpointing throws away: turn it off, or drop them"
            )
        named = {"teacher": self.teacher, "student.init": self.student.init}
        for field, model in named.items():
            if isinstance(model, ModelSpec) and model.attn_implementation not in (None, "eager"):
                raise ValueError(
                    f"{field}.attn_implementation: {model.attn_implementation} gives no attention weights, which "
                    "align_attention and align_topk read: leave it out"
                )

    def _check_top_k(self) -> None:
        for energy in self.objective.energies:
            if isinstance(energy, VisualEnergy):
                continue
            if not isinstance(energy, _OnProbabilities):
                raise ValueError(f"teacher.signal: {energy.kind} needs every logit, top_k has some: use signal: hidden")
            if energy.teacher_temperature != 1 or energy.student_temperature != 1:
                raise ValueError(
                    f"teacher.signal: top_k has probabilities at temperature 1, and {energy.kind} asks for another: "
                    "use signal: hidden"
                )


class QuestionsSpec(Spec):
    """A packed question set, with the settings for answering and scoring it."""

    data: DataSpec = Field(description="`train` names the shards to evaluate on, without weights")
    benchmark: Literal["exact_match"] = "exact_match"
    max_new_tokens: int = Field(default=16, ge=1)
    batch_size: int = Field(default=64, ge=1)
    limit: int | None = Field(default=None, ge=1, description="first samples only")

    @model_validator(mode="after")
    def _asked_once(self) -> "QuestionsSpec":
        if weighted := [entry for entry in self.data.train if entry.weight != 1]:
            raise ValueError(
                f"data.train: {weighted[0].path} has weight {weighted[0].weight:g}, and each question is asked once: "
                "leave weight out"
            )
        return self


class EvaluationSpec(QuestionsSpec):
    """Evaluation of several models on one packed question set, with the same scoring."""

    name: Name
    models: dict[str, ModelSpec] = Field(min_length=1, description="label → model")
    agreement_with: str | None = Field(default=None, description="label of the model that the others are compared with")
    cluster: ClusterSpec = ClusterSpec()
    output: OutputSpec = Field(default_factory=OutputSpec)

    @model_validator(mode="after")
    def _known_label(self) -> "EvaluationSpec":
        if self.agreement_with is not None and self.agreement_with not in self.models:
            raise ValueError(f"agreement_with {self.agreement_with!r} is none of the models {list(self.models)}")
        return self


class SweepSpec(Spec):
    """A grid of jobs: one template, and the values for some of its fields."""

    name: Name
    template: Location = Field(description="YAML of the job that every cell starts from")
    fixed: dict[str, Any] = Field(default_factory=dict, description="section.field → value, for every cell")
    axes: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(
        min_length=1, description="section.field → values, e.g. objective.weighting: [equal, task, instance]"
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = Field(
        default=(0,), description="each cell is run once a seed; the table has mean ± standard deviation"
    )
    parallel: int = Field(default=1, ge=1, description="cells that run at a time, each with workers of its own")
    evaluation: QuestionsSpec | None = Field(default=None, description="what each cell's model is asked")
    output: OutputSpec = Field(default_factory=OutputSpec)

    @model_validator(mode="after")
    def _sets_each_field_once(self) -> "SweepSpec":
        paths = [*self.fixed, *self.axes]
        for path in paths:
            if _overlap(path, "training.seed"):
                raise ValueError(
                    f"{path}: training.seed comes from `seeds`, over which the table has mean and deviation; name "
                    "other fields"
                )
            if path.partition(".")[0] in ("name", "output"):
                raise ValueError(f"{path}: a cell is named by its values, under the sweep's output; leave it out")
        for one, other in itertools.combinations(paths, 2):
            if _overlap(one, other):
                raise ValueError(f"{one} and {other}: one would undo the other; name each field once")
        return self


def _overlap(one: str, other: str) -> bool:
    """Return whether the two field paths are equal or one of them contains the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


class PackSpec(Spec):
    """Packing of a LLaVA-style JSON and its images into checked WebDataset shards."""

    conversations: Location = Field(description="JSON list, or JSON lines, of {id, image?, conversations}")
    images: Location | None = Field(default=None, description="folder that `image` is relative to")
    output: Location = Field(description="folder for the shards")
    prefix: str = "train"
    samples_per_shard: int = Field(default=1000, ge=1)
    shuffle_seed: int | None = Field(default=0, description="shuffle samples before packing; null keeps the order")
    storage: StorageSpec = StorageSpec()


# -------------------------------------------------------------------------------------------------- loading

AnySpec = TypeVar("AnySpec", bound=Spec)


def load_spec(path: str | Path, overrides: list[str] | tuple[str, ...] = (), kind: type[AnySpec] = JobSpec) -> AnySpec:
    """Read a YAML file, apply `overrides` such as "training.workers=2", and check the result.

    Raises SpecError, which names each wrong field, the value that was seen, and what to do.
    """
    tree = read_tree(path)
    for override in overrides:
        _apply(tree, override)
    return parse_spec(tree, kind, source=str(path))


def read_tree(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, given its path or URL, or `-` for standard input. Raises SpecError."""
    try:
        tree = yaml.load(_text(str(path)), _Yaml)
    except OSError as error:
        said = getattr(error, "strerror", None) or error
        raise SpecError(f"{path}: cannot be read ({said}). Give the path or URL of a YAML spec, or -.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: is not YAML: {_fault(error)}") from None
    if not isinstance(tree, dict):
        raise SpecError(f"{path}: holds a {type(tree).__name__}, not the mapping that a spec is.")
    return tree


def _text(location: str) -> str:
    if location == "-":
        return sys.stdin.read()
    if "://" in location:
        return _downloaded(location).decode()
    return Path(location).read_text(encoding="utf-8")


def _downloaded(url: str) -> bytes:
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        return cast(bytes, filesystem.cat_file(path))
    except Exception as error:  # each kind of store has its own errors, without a common base class
        raise OSError(f"{type(error).__name__}: {error}") from error


def parse_spec(tree: dict[str, Any], kind: type[AnySpec] = JobSpec, source: str = "spec") -> AnySpec:
    """Check a mapping against a kind of spec. Raises SpecError."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        faults = [_explain(kind, issue) for issue in error.errors()[:MAX_FAULTS]]
        more = [f"and {error.error_count() - MAX_FAULTS} more"] if error.error_count() > MAX_FAULTS else []
        raise SpecError(f"{source}: " + "; ".join(faults + more)) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise SpecError(f"override {override!r}: write it as section.field=value, e.g. training.workers=2")
    try:
        set_field(tree, path, yaml.load(text, _Yaml))
    except yaml.YAMLError as error:
        raise SpecError(f"override {override!r}: the value is not YAML: {_fault(error)}") from None


def set_field(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set section.field in a spec's mapping. Raises SpecError if a section on the path is a plain value."""
    *sections, field = path.split(".")
    node = tree
    for section in sections:
        inner = node.get(section, {})
        if not isinstance(inner, dict):
            raise SpecError(f"override {path}: {section} is {_short(inner)}, which has no fields")
        node[section] = dict(inner)  # a copy: through a YAML alias, the same mapping may be in another section
        node = node[section]
    node[field] = value


MAX_VALUES = 10_000
MAX_DEPTH = 50
MAX_FAULTS = 20
"""Largest number of wrong fields that a message names."""
_KINDS = ("str", "null", "bool", "int", "float", "seq", "map", "merge")
_TEXT, *_VALUES, _MERGE = (f"tag:yaml.org,2002:{kind}" for kind in _KINDS)


class _Yaml(yaml.SafeLoader):
    """Loader of YAML whose values JSON can hold too, because a run stores its spec as JSON.

    Keys are text, numbers are finite, and there are no dates. A key that occurs twice in a mapping is an error, because
    the last value would silently replace the first. Aliases may expand to fewer than `MAX_VALUES` values.
    """

    yaml_constructors = {  # noqa: RUF012
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in (None, _TEXT, *_VALUES)
    }
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in known if tag in (_MERGE, *_VALUES)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}  # number of values in a node, with its aliases expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if self._depth == MAX_DEPTH:
            raise ComposerError(None, None, f"more than {MAX_DEPTH} levels", event.start_mark)
        self._depth += 1
        node = cast(yaml.Node, super().compose_node(parent, index))
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self._sizes[node] = 1 + sum(self._sizes[inner] for inner in _inner(node))
        if self._sizes.get(node, MAX_VALUES) >= MAX_VALUES:  # an alias inside its own anchor has no size yet
            raise ComposerError(None, None, f"aliases that unfold to more than {MAX_VALUES} values", event.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.tag not in (_TEXT, _MERGE):
                raise ComposerError(None, None, f"{_short(key.value)} is a key and no text: quote it", key.start_mark)
            if key.value in seen:
                raise ComposerError(None, None, f"{_short(key.value)} stands a second time", key.start_mark)
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(node, yaml.ScalarNode):
                json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, LookupError) as error:  # .inf, half a surrogate pair, `!!int x`, 5,000 digits
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(
                None, None, f"{_short(node.value)} is no {kind} that a spec can hold", node.start_mark
            ) from error
        return value


def _inner(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [inner for pair in node.value for inner in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _fault(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """Return the problem and its position in the file, without the text there.

    That text may be a part of a URL, in which a password is not recognised and would be printed.
    """
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    return f"{error.problem} at line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"


def _explain(kind: type[Spec], issue: Any) -> str:
    """Return one line about one wrong field: where it is, what was seen, what to do."""
    where = ".".join(str(part) for part in issue["loc"]) or "the spec"
    seen = issue.get("input")
    message = issue["msg"].removeprefix("Value error, ")
    if issue["type"] == "extra_forbidden":
        known = _fields_at(kind, issue["loc"][:-1])
        hint = _closest(str(issue["loc"][-1]), known)
        return f"{where}: no such field{hint}"
    if issue["type"] == "missing":
        return f"{where}: is missing; add it"
    if issue["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {message}, got {_short(seen)}"


def _short(value: Any) -> str:
    text = without_secrets(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _closest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; the fields here are {', '.join(known)}" if known else ""


def _fields_at(kind: Any, location: tuple[Any, ...]) -> list[str]:
    """Return the field names of the model that a pydantic error location points into.

    The location holds the tags of unions too.
    """
    models = [kind]
    for part in location:
        inner = [
            m for model in models if part in model.model_fields for m in _models_in(model.model_fields[part].annotation)
        ]
        tagged = [m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == part]
        models = inner or tagged or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
