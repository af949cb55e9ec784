"""Specs beside a job: evaluation, sweep and packing."""

import itertools
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from betakd_ray.spec.base import (
    Count,
    FreeForm,
    Location,
    Place,
    Plugin,
    Seed,
    Spec,
    StorageSpec,
    as_tuple,
    finite,
)
from betakd_ray.spec.cluster import ClusterSpec
from betakd_ray.spec.data import DataSpec, TemplateName
from betakd_ray.spec.job import Name, OutputSpec
from betakd_ray.spec.models import ModelSpec

BENCHMARKS = {"exact_match": "betakd_ray.evaluation.exact_match:score"}
"""Benchmark → its function as module:name."""
# A type checker does not accept a Literal that is made at run time.
if TYPE_CHECKING:
    BenchmarkName = str
else:
    BenchmarkName = Literal[tuple(BENCHMARKS)]


class QuestionsSpec(Spec):
    """A packed question set, with the settings for answering and scoring it."""

    data: DataSpec = Field(description="`train` names the shards to evaluate on, without weights")
    benchmark: BenchmarkName | Plugin = Field(
        default="exact_match", description="how answers are scored; module:name is a function of your own"
    )
    max_new_tokens: Count = 16
    batch_size: Count = 64
    limit: Count | None = Field(default=None, description="use only this number of first samples")

    @model_validator(mode="after")
    def _asked_once(self) -> "QuestionsSpec":
        if weighted := [entry for entry in self.data.train if entry.weight != 1]:
            raise ValueError(
                f"data.train: {weighted[0].path} has weight {weighted[0].weight:g}, but each question is asked once: "
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
            raise ValueError(f"agreement_with {self.agreement_with!r} is not one of the models {list(self.models)}")
        return self


class BenchmarksSpec(Spec):
    """Evaluation of models on public benchmarks, from the files in which these are published."""

    name: Name = "evaluation"
    models: dict[Name, ModelSpec] = Field(min_length=1, description="label → model; the label is in the answers' files")
    benchmarks: Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)] = Field(
        description="names such as scienceqa, textvqa, gqa, pope, mme, mmbench; module:name for your own"
    )
    data: Place = Field(description="folder or URL with the benchmarks' files, in the layout of LLaVA or MobileVLM")
    template: TemplateName | Plugin | None = Field(
        default=None,
        description="default: the one that a model of this package was trained with; otherwise vicuna_v1 for LLaVA and "
        "MobileVLM, and the model's own for others",
    )
    system_prompt: str | None = Field(default=None, description="as in the data section of a job")
    processing: Literal["pad", "crop"] | None = Field(
        default=None,
        description="how LLaVA and MobileVLM see an image that is no square: padded, or its centre; default: as each "
        "benchmark's published figures were made",
    )
    ocr: bool | None = Field(
        default=None, description="whether TextVQA's questions have OCR tokens; default: as they are in its file"
    )
    rule: str | None = Field(default=None, description="how MMBench finds the letter in an answer; see the docs")
    limit: Count | None = Field(default=None, description="ask only about this number of first questions of each")
    max_new_tokens: Count | None = Field(default=None, description="default: as each benchmark's published figures")
    batch_size: Count = Field(default=64, description="questions that a process answers at a time")
    batch_tokens: Count = Field(
        default=16384, description="largest number of tokens of a batch, new ones and padding included"
    )
    workers: Count | None = Field(default=None, description="processes at most; default: as many as have room")
    cluster: ClusterSpec = ClusterSpec()
    output: OutputSpec = Field(default_factory=OutputSpec)

    @field_validator("benchmarks")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{repeated[0]} is named twice; name each benchmark once")
        return names


def label_of(path: str) -> str:
    """Return a label for a model: the name of its folder, or of the run whose `model` folder it is."""
    names = [name for name in re.split(r"[/\\]+", path) if name not in ("", ".", "..")]
    names = names[:-1] if len(names) > 1 and names[-1] == "model" else names
    return re.sub(r"[^A-Za-z0-9._-]", "-", names[-1]).lstrip("._-") if names else "model"


class SweepSpec(Spec):
    """A grid of jobs: one template, and the values for some of its fields."""

    name: Name
    template: Location = Field(description="YAML of the job that every cell starts from")
    fixed: FreeForm = Field(default_factory=dict, description="section.field → value, for every cell")
    axes: Annotated[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]], AfterValidator(finite)] = Field(
        min_length=1, description="section.field → values, e.g. objective.weighting: [equal, task, instance]"
    )
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = Field(
        default=(0,), description="each cell is run once per seed; the table has mean ± standard deviation"
    )
    parallel: Count = Field(default=1, description="cells that run at the same time, each with its own workers")
    evaluation: QuestionsSpec | None = Field(default=None, description="questions for each cell's model")
    output: OutputSpec = Field(default_factory=OutputSpec)

    @model_validator(mode="after")
    def _sets_each_field_once(self) -> "SweepSpec":
        paths = [*self.fixed, *self.axes]
        for path in paths:
            if _overlap(path, "training.seed"):
                raise ValueError(
                    f"{path}: `seeds` sets training.seed, and the table has mean and deviation over the seeds; name "
                    "other fields"
                )
            if path.partition(".")[0] in ("name", "output"):
                raise ValueError(
                    f"{path}: the sweep names each cell by its values, and puts it under its own output; leave this out"
                )
        for one, other in itertools.combinations(paths, 2):
            if _overlap(one, other):
                raise ValueError(f"{one} and {other}: one would overwrite the other; name each field once")
        return self


def _overlap(one: str, other: str) -> bool:
    """Return whether the two field paths are equal or one of them contains the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


SOURCE_FORMATS = ("json", "parquet", "arrow", "table", "shards")
"""Names of the formats in `betakd_ray.data.formats`."""
MAPPED = ("conversations", "question", "answer", "caption", "image", "id", "system")
"""Fields of a record that `map` can take from another key."""
if TYPE_CHECKING:
    SourceFormat = Mapped = str
else:
    SourceFormat, Mapped = Literal[SOURCE_FORMATS], Literal[MAPPED]


class PackSpec(Spec):
    """Packing of records and their images into checked WebDataset shards."""

    conversations: Location = Field(
        description="records: JSON or JSON lines, parquet, a data set saved by `datasets`, CSV or TSV, or shards"
    )
    images: Location | None = Field(default=None, description="folder that names of images are relative to")
    output: Location = Field(description="folder for the shards")
    format: SourceFormat | None = Field(default=None, description="default: by the name of `conversations`")
    map: dict[Mapped, str] = Field(
        default_factory=dict, description="field → the key or column that holds it, e.g. {question: query}"
    )
    on_bad: Literal["stop", "skip"] = Field(
        default="stop", description="after all records were looked at: pack none if one is bad, or only the good ones"
    )
    split_turns: bool = Field(
        default=False, description="make each answer a sample of its own, with the turns before it"
    )
    prefix: str = "train"
    samples_per_shard: Count = 1000
    shuffle_seed: Seed | None = Field(
        default=0,
        description="shuffle records before packing, those that hold their images within a window of 1000; null keeps "
        "the order",
    )
    storage: StorageSpec = StorageSpec()
