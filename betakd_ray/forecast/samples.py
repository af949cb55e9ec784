"""The samples that a forecast is made from: some of the data, or assumed ones."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.packing import stack
from betakd_ray.batch.sample import IMAGE, Rendering
from betakd_ray.data.plan import Pass
from betakd_ray.data.render import Renderer, Unrenderable
from betakd_ray.data.samples import BadSample, RawSample
from betakd_ray.data.shards import Shard, read_shard
from betakd_ray.errors import DataError
from betakd_ray.spec import JobSpec, TeacherSpec

SAMPLED = 64
"""Number of samples of the first shard that are read as examples of all samples."""


@dataclass(frozen=True)
class AssumedData:
    """Assumption about data that do not exist yet: every sample has one image and one answer."""

    samples: int
    prompt_tokens: int
    answer_tokens: int
    samples_per_shard: int = 10_000

    def passes(self) -> list[Pass]:
        """Return passes over shards of `samples_per_shard` samples, and one of the rest; an epoch reads each once."""
        whole, rest = divmod(self.samples, self.samples_per_shard)
        sizes = [self.samples_per_shard] * whole + ([rest] if rest else [])
        return [Pass(Shard(f"assumed-{number}", size, 0, ""), size) for number, size in enumerate(sizes)]

    def rendering(self, renderer: Renderer) -> Rendering:
        """Return a sample with an image, the template's tokens, and prompt and answer of the assumed lengths.

        Raises DataError if it is longer than data.max_length.
        """
        mask = np.repeat([False, True], [self.prompt_tokens, self.answer_tokens])
        try:
            shown = renderer.render(_one_image())
        except Unrenderable as reason:
            raise DataError(
                f"data.max_length: has no room for one image and the template ({reason}). Raise it"
            ) from reason
        length = len(shown.input_ids) + len(mask)
        if length > renderer.max_length:
            raise DataError(
                f"data.max_length is {renderer.max_length}; the image and the template ({len(shown.input_ids)} tokens) "
                f"and the {self.prompt_tokens} + {self.answer_tokens} assumed tokens are {length} together. Raise "
                "data.max_length, or assume fewer tokens."
            )
        own = np.zeros_like(shown.answer_mask)  # the example's own answer counts as part of the template
        filling = np.full(len(mask), renderer.pad_token_id, shown.input_ids.dtype)
        return Rendering(np.concatenate([shown.input_ids, filling]), np.concatenate([own, mask]), shown.images)


def _one_image() -> RawSample:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    turns = [{"from": "human", "value": IMAGE}, {"from": "gpt", "value": "."}]
    return RawSample("assumed", 0, "assumed", turns, [buffer.getvalue()])


@dataclass(frozen=True)
class SampleSize:
    """Mean sizes of a sample for one model."""

    tokens: float
    """Number of all tokens: prompt, image and answer."""
    answer_tokens: float
    image_tokens: float
    pairs: float
    """Number of pairs of an answer token and an image token."""
    bytes: float
    """Bytes on the network: ids, answer mask and decoded pixels."""

    @classmethod
    def of(cls, inputs: ModelInputs) -> "SampleSize":
        """Return the mean over a batch, without padding."""
        rows, visual = inputs.rows_per_sample, inputs.visual_per_sample
        tokens = inputs.attention_mask.sum() / inputs.size
        pixels = sum(array.nbytes for array in inputs.images.values()) / inputs.size
        # 5 bytes per token: the id is an int32, and the answer mask one byte.
        return cls(*map(float, (tokens, rows.mean(), visual.mean(), (rows * visual).mean(), 5 * tokens + pixels)))

    def __str__(self) -> str:
        return f"{self.tokens:,.0f}, of them {self.answer_tokens:,.0f} answer and {self.image_tokens:,.0f} image"


def first_samples(shard: Shard, spec: JobSpec, renderer: Renderer) -> list[Rendering]:
    """Return renderings of a shard's first `SAMPLED` samples. Raises DataError if none of them can be rendered."""
    found: list[Rendering] = []
    reason = "it is empty"
    for sample in islice(read_shard(shard, spec.data.storage), SAMPLED):
        if isinstance(sample, BadSample):
            reason = sample.reason
            continue
        try:
            found.append(renderer.render(sample))
        except Unrenderable as error:
            reason = str(error)
    if not found:
        raise DataError(f"{shard.url}: none of its first {SAMPLED} samples can be used ({reason}). Look at it with "
                        "`betakd inspect`.")  # fmt: skip
    return found


def largest_batch(samples: Sequence[Rendering], spec: JobSpec, renderer: Renderer) -> ModelInputs:
    """Return a micro-batch that repeats the longest sample."""
    longest = max(samples, key=lambda sample: len(sample.input_ids))
    training = spec.training
    return stacked(
        [longest] * training.samples_at_a_time(training.workers.min, float(len(longest.input_ids))), renderer
    )


def teacher_group(samples: Sequence[Rendering], spec: TeacherSpec, renderer: Renderer) -> ModelInputs:
    """Return a group for the teacher: the longest sample, as many times as `batch_tokens` allows."""
    longest = max(samples, key=lambda sample: len(sample.input_ids))
    return stacked([longest] * max(1, spec.batch_tokens // len(longest.input_ids)), renderer)


def stacked(samples: list[Rendering], renderer: Renderer) -> ModelInputs:
    return stack(samples, renderer.pad_token_id, renderer.image_token_id)


def size(count: float | int) -> str:
    """Return a number of bytes as text with a decimal unit: B, kB, MB and so on."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if count < 1000 or unit == "PB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"


def count_of(number: int) -> str:
    """Return a number of parameters as text, in millions (M) or billions (B)."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.4g} M"
