"""The section `data`: which shards are read, and how a conversation becomes tokens."""

import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from betakd_ray.spec.base import (
    LARGEST_COUNT,
    Count,
    Fraction,
    FreeForm,
    Location,
    Plugin,
    Short,
    Shortened,
    Spec,
    StorageSpec,
    as_tuple,
)

TEMPLATES = {
    "plain": "betakd_ray.data.templates:plain",
    "vicuna_v1": "betakd_ray.data.templates:vicuna_v1",
    "chat": None,
}
"""Chat template → its function as module:name; None for the processor's own template."""
# A type checker does not accept a Literal that is made at run time.
if TYPE_CHECKING:
    TemplateName = str
else:
    TemplateName = Literal[tuple(TEMPLATES)]


RESERVED = {"messages", "add_generation_prompt", "chat_template", "conversations", "continue_final_message", "tokenize"}
"""Variables of a chat template that a spec may not set."""


class TrainingData(Shortened):
    """Shards, and how often an epoch reads them. A path or URL alone is read once per epoch."""

    path: Location = Field(description="a path or URL, with {00..07} braces and * globs, or a folder")
    # Limited, because each whole pass over a shard is an entry of the plan.
    weight: float = Field(default=1.0, gt=0, le=1000, description="passes per epoch, e.g. 2.5, or 0.1 for a tenth")

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

    train: Annotated[tuple[TrainingData, ...], BeforeValidator(as_tuple), Short(), Field(min_length=1)] = Field(
        description="shards: paths or URLs, with {00..07} braces and * globs, each alone or as {path, weight}"
    )
    manifest: Location | None = Field(
        default=None,
        description="file that `betakd index SHARDS --manifest FILE` wrote, for shards whose folder cannot be written",
    )
    storage: StorageSpec = StorageSpec()
    template: TemplateName | Plugin = Field(
        default="vicuna_v1",
        description="`chat`: the processor's own template; `plain`: for projector warm-up; module:name: your own",
    )
    system_prompt: str | None = Field(
        default=None,
        description="replaces the template's own system prompt, and those of samples; '': no system prompt",
    )
    chat_template: str | None = Field(
        default=None, description="with `chat`: the name of the template if the model has several; default: `default`"
    )
    template_arguments: FreeForm = Field(
        default_factory=dict,
        description="with `chat`: further variables of the template, e.g. {enable_thinking: false}",
    )
    template_date: datetime.date = Field(
        default=datetime.date(2024, 7, 26),
        description="what a `chat` template gets as today's date (`strftime_now`), in every run alike; the default is "
        "the date that Llama 3's template takes where it gets none",
    )
    special_tokens: Literal["refuse", "allow"] | tuple[str, ...] = Field(
        default="refuse",
        description="text of the data that the tokenizer makes into a control token, e.g. `</s>` or `<|im_end|>`: "
        "`refuse` quarantines the sample, `allow` keeps it as that token, [<think>, …] keeps only these",
    )
    max_length: int = Field(default=2048, ge=8, le=LARGEST_COUNT, description="tokens, image tokens included")
    pad_to_square: bool | None = Field(
        default=None, description="pad images with the processor's mean colour; default: only for LLaVA and MobileVLM"
    )
    min_pixels: Count | None = Field(
        default=None,
        description="Qwen: a smaller image is scaled up to this number of pixels; default: the processor's",
    )
    max_pixels: Count | None = Field(
        default=None,
        description="Qwen: a larger image is scaled down to this number of pixels, of which 28×28 (Qwen3: 32×32) are "
        "one token; default: the processor's, up to 16,384 tokens",
    )
    shuffle: bool = Field(default=True, description="seeded by training.seed and the epoch")
    shuffle_buffer: Count = Field(default=1000, description="samples of the open shards that are shuffled together")
    max_image_pixels: Count = Field(default=100_000_000, description="larger images are quarantined, not decoded")
    max_bad_fraction: Fraction = Field(default=0.01, description="the job stops if a larger share is quarantined")

    @model_validator(mode="after")
    def _belongs_to_chat(self) -> "DataSpec":
        fields = type(self).model_fields
        for name in ("template_date", "chat_template", "template_arguments"):
            if self.template != "chat" and getattr(self, name) != fields[name].get_default(call_default_factory=True):
                raise ValueError(
                    f"{name}: is used only with `template: chat`, but template is {self.template}; leave it out"
                )
        if taken := RESERVED & self.template_arguments.keys():
            raise ValueError(f"template_arguments.{min(taken)}: is set by this package; leave it out")
        return self

    @model_validator(mode="after")
    def _pixels_ordered(self) -> "DataSpec":
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}; lower it")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the paths and URLs of `train`, without their weights."""
        return tuple(entry.path for entry in self.train)
