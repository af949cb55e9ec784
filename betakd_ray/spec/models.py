"""The sections `teacher` and `student`: which models, where they come from, and what of them is trained."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from betakd_ray.errors import shortened
from betakd_ray.spec.base import (
    Count,
    CountOrZero,
    FreeForm,
    GgufFile,
    ModelLocation,
    Place,
    Plugin,
    Seconds,
    Short,
    Spec,
    StorageSpec,
    named,
)


class ModelSpec(Spec):
    """A pretrained vision–language model, or a language model for text alone: a folder, a hub id, or a URL."""

    path: ModelLocation
    gguf_file: GgufFile | None = Field(
        default=None, description="a GGUF in that folder with a whole language model; its weights are dequantised"
    )
    revision: str | None = None
    storage: StorageSpec = StorageSpec()
    attn_implementation: str | None = None
    trust_remote_code: bool = Field(
        default=False, description="run the code that is stored beside the weights; read that code first"
    )

    @model_validator(mode="after")
    def _trusted(self) -> "ModelSpec":
        if "/" in (self.attn_implementation or "") and not self.trust_remote_code:
            raise ValueError(
                f"attn_implementation: {self.attn_implementation} is a repository, and its code would run. Read that "
                "code and set trust_remote_code: true, or name an implementation of transformers, e.g. sdpa"
            )
        return self


class CacheSpec(Place):
    """Storage for a teacher's answers.

    Every epoch after the first reads them there. So does every job with the same teacher, template and image size.
    """


class HiddenSignal(Spec):
    """The final hidden state of every answer token, which gives the exact logits with the teacher's head."""

    kind: Literal["hidden"] = "hidden"


class TopKSignal(Spec):
    """The k largest probabilities of every answer token, and the rest of the mass as one bucket.

    It needs a tenth of the bytes of `hidden`, and the students need no copy of the teacher's head. It has a bias
    (docs/objective.md).
    """

    kind: Literal["top_k"] = "top_k"
    k: Count = 64


SignalChoice = Annotated[
    HiddenSignal | TopKSignal,
    Field(discriminator="kind"),
    BeforeValidator(named),
    Short({"enum": ["hidden", "top_k"]}),
]


_LOADING = {
    "config": "is read from teacher.path",
    "output_loading_info": "cannot be used: it changes what transformers returns",
    "pretrained_model_name_or_path": "is teacher.path",
    "state_dict": "is read from teacher.path",
    "token": "is a secret, and is read from the environment (HF_TOKEN)",
    "torch_dtype": "is set by teacher.dtype",
    "use_safetensors": "is always true: a pickle can run code",
    "weights_only": "is always true: a pickle can run code",
}
"""Keyword of from_pretrained that `teacher.options` may not set → the reason."""


class CheckSpec(Spec):
    """Checks of the teacher's signal and of the student's weights, before the first step and while the job runs."""

    samples: int = Field(
        default=16, ge=2, le=1024, description="samples of data.train whose signal is compared with the teacher itself"
    )
    answers: int = Field(
        default=128, ge=0, le=4096, description="samples by whose answers it is judged what the teacher knows and sees"
    )
    knows_answers: bool = Field(
        default=True,
        description="the teacher is expected to give the data's answers more probability than chance, and to use the "
        "image for it; false: for data whose answers no teacher could know",
    )
    canary_every: int = Field(
        default=100, ge=0, description="steps between two repetitions of one checked sample; 0 for none"
    )


def _off(value: object) -> object:
    """Return `off` for false: YAML 1.1 reads an unquoted off as false."""
    return "off" if value is False else value


CheckChoice = Annotated[CheckSpec | Literal["off"], BeforeValidator(_off)]


class TeacherSpec(ModelSpec):
    """The frozen teacher, which runs in its own actors."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    engine: Literal["transformers"] | Plugin = Field(
        default="transformers", description="what runs the teacher; module:name is a subclass of TeacherScorer"
    )
    signal: SignalChoice = Field(default=HiddenSignal(), description="what the teacher sends for energies on logits")
    batch_tokens: Count = Field(
        default=8192,
        description="largest number of tokens that a teacher scores at a time, padding included; samples of similar "
        "length are grouped up to it. The default fits a GPU on which the teacher leaves a few GB free",
    )
    window: CountOrZero = Field(
        default=4, description="groups that a student worker sends to the teachers in addition to one step's"
    )
    timeout_s: Seconds = Field(
        default=600.0,
        description="a teacher is replaced if it computes one group for longer than this, or is silent for longer; a "
        "group's time in the queue does not count",
    )
    cache: CacheSpec | None = Field(default=None, description="keep the teacher's answers here, for other jobs too")
    check: CheckChoice = Field(
        default=CheckSpec(), description="check the teacher's signal before the first step; off: trust it unseen"
    )
    options: FreeForm = Field(
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
                f"options.quantization_config: {shortened(quantization)} is not a mapping; write it as transformers "
                "stores it, e.g. {quant_method: bitsandbytes, load_in_8bit: true}"
            )
        if self.gguf_file and quantization:
            raise ValueError("options.quantization_config: the weights of a gguf_file are dequantised; leave it out")
        return self


class CheckpointInit(ModelSpec):
    """Start from pretrained weights."""

    kind: Literal["checkpoint"] = "checkpoint"


class ConfigInit(Spec):
    """Start from random weights, with a transformers configuration."""

    kind: Literal["config"] = "config"
    config: FreeForm = Field(description="a transformers config, with its model_type")
    processor: ModelLocation = Field(description="where the tokenizer and image processor come from")
    vision_tower: ModelLocation | None = Field(
        default=None, description="copy the vision tower's weights from this model; its config must match"
    )
    storage: StorageSpec = StorageSpec()


class PartsInit(Spec):
    """Start from a language model and a vision tower, with a new projector between them: a LLaVA before its warm-up."""

    kind: Literal["parts"] = "parts"
    language_model: ModelLocation = Field(description="a causal language model; its tokenizer is used too")
    vision_tower: ModelLocation = Field(
        description="a CLIP, SigLIP or DINOv2, or a model that contains one; its image processor is used too"
    )
    projector: Literal["mlp2x_gelu", "ldpnetv2"] = Field(
        default="mlp2x_gelu", description="LLaVA's two linear layers, or MobileVLM's LDPv2"
    )
    vision_feature_layer: int = Field(default=-2, description="the tower's hidden state that the projector reads")
    storage: StorageSpec = StorageSpec()


Part = Literal["language_model", "projector", "vision_tower"]


class LoraSpec(Spec):
    """Low-rank adapters (arXiv 2106.09685) in the language model, whose own weights do not change."""

    r: Count = Field(default=16, description="rank")
    alpha: float = Field(default=32.0, gt=0, le=10_000, description="an adapter's output is multiplied by alpha / r")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="linear layers by their last name, e.g. q_proj; default: all"
    )
    merge: bool = Field(
        default=True,
        description="export adds them to the weights; false: it writes them to files of their own, for peft",
    )


class StudentSpec(Spec):
    """The model that is trained. Parts that `train` does not name are frozen and not in the optimizer."""

    init: Annotated[CheckpointInit | ConfigInit | PartsInit, Field(discriminator="kind")]
    train: tuple[Part, ...] = Field(default=("language_model", "projector"), min_length=1)
    lora: LoraSpec | None = Field(
        default=None, description="low-rank adapters in the language model; default: train all its weights"
    )

    @model_validator(mode="after")
    def _adapts(self) -> "StudentSpec":
        if self.lora and "language_model" not in self.train:
            raise ValueError(f"lora adapts the language model, but train is {list(self.train)}: add language_model")
        return self
