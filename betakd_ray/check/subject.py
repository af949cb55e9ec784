"""The model under check: how it is asked, and the samples on which it is asked."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from betakd_ray.batch.inputs import ModelInputs, Pairs, TensorInputs
from betakd_ray.batch.normalization import Normalization
from betakd_ray.batch.packing import cut, stack
from betakd_ray.batch.sample import Rendering
from betakd_ray.check.keeping import KeepingRenderer
from betakd_ray.check.weights import is_trained
from betakd_ray.data.samples import RawSample
from betakd_ray.models.vlm import lm_head
from betakd_ray.objective import project
from betakd_ray.spec import DataSpec
from betakd_ray.teacher.answers import GroupAnswer, to_tensor, to_wire
from betakd_ray.teacher.parts import Needs, Signal
from betakd_ray.teacher.scorer import answer

Score = Callable[[ModelInputs], GroupAnswer]
"""Function that asks the model, as students do: `TeacherScorer.score`."""
CPU = torch.device("cpu")
HIDDEN = Needs(frozenset({"hidden"}))
MOST_ROWS = 64
"""Largest number of answer rows of a sample that are compared, so that long answers cost no more memory."""
MOST_LOGITS = 2**24
"""Largest number of logits that are computed at once, unless one sample has more: 64 MiB."""
ALONE = 8
"""Largest number of samples that are also asked alone."""


@dataclass(frozen=True)
class Subject:
    """A model with its processor, the function that asks it, and samples of the data."""

    model: Any
    renderer: KeepingRenderer
    data: DataSpec
    samples: tuple[RawSample, ...]
    renderings: tuple[Rendering, ...]
    """The samples as the spec's template shows them."""
    needs: Needs
    score: Score
    head: Tensor
    """Copy of the head [vocab, width] as students have it, on the CPU."""
    batch_tokens: int
    part: str = "teacher"
    knows_answers: bool = True
    close: int = 16
    """Number of samples that are compared with the model's own forward pass, one by one."""

    @cached_property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @cached_property
    def is_trained(self) -> bool:
        """Return whether the model's weights have structure that random numbers lack."""
        return is_trained(self.model)

    @property
    def dtype(self) -> str:
        """Return the dtype that the model computes in, by its torch name."""
        return str(lm_head(self.model).weight.dtype).removeprefix("torch.")

    @property
    def normalize(self) -> Normalization:
        return Normalization.of(self.renderer.image_processor)

    @property
    def few(self) -> Iterator[tuple[RawSample, Rendering, Tensor]]:
        """Yield the samples that are looked at one by one, with their renderings and hidden states."""
        yield from islice(zip(self.samples, self.renderings, self.hidden, strict=True), self.close)

    @cached_property
    def with_images(self) -> tuple[int, ...]:
        """Return the positions of the samples that have an image."""
        return tuple(at for at, sample in enumerate(self.samples) if sample.images)

    @cached_property
    def hidden(self) -> tuple[Tensor, ...]:
        """Return the hidden states of each sample's answer rows, as they arrive at a student."""
        return tuple(self.ask(self.renderings))

    @cached_property
    def alone(self) -> tuple[Tensor, ...]:
        """Return the hidden states of the first samples, each asked in a group of its own."""
        return tuple(self.ask([each])[0] for each in self.renderings[:ALONE])

    def stacked(self, renderings: Sequence[Rendering]) -> ModelInputs:
        return stack(renderings, self.renderer.pad_token_id, self.renderer.image_token_id)

    def signals(self, renderings: Sequence[Rendering]) -> list[Signal | None]:
        """Return the needed parts for each sample, asked in groups; None for a sample that is not finite."""
        return _grouped(self, renderings, self.score)

    def ask(self, renderings: Sequence[Rendering]) -> list[Tensor]:
        """Return the hidden states [rows, width] of each sample, asked in groups; NaN for one that is not finite."""
        score = self.score if "hidden" in self.needs else self._own_score
        signals = _grouped(self, renderings, score)
        return [
            self._nothing(each) if signal is None else to_tensor(signal["hidden"], CPU)[:MOST_ROWS]
            for each, signal in zip(renderings, signals, strict=True)
        ]

    def own_ask(self, renderings: Sequence[Rendering]) -> list[Signal | None]:
        """Return hidden states that this process computes from the model, whatever `score` is."""
        return _grouped(self, renderings, self._own_score)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits that a student computes from hidden states, in float32."""
        return self._project(hidden).cpu()

    def each_logits(self, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield `logits` of each sample's hidden states on the model's device, computed for many samples at once."""
        for run in _runs([len(each) for each in hidden], max(1, MOST_LOGITS // len(self.head))):
            yield from self._project(torch.cat([hidden[at] for at in run])).split([len(hidden[at]) for at in run])

    def _project(self, hidden: Tensor) -> Tensor:
        return project(hidden.to(self.device).to(self.head.dtype), self._device_head)

    @cached_property
    def _device_head(self) -> Tensor:
        """Return the head where it is multiplied; in float32 on a CPU, which has no products of other dtypes."""
        head = self.head.to(self.device)
        return head if self.device.type == "cuda" else head.float()

    def _own_score(self, inputs: ModelInputs) -> GroupAnswer:
        return local_score(self.model, HIDDEN, self.renderer.image_processor)(inputs)

    def _nothing(self, rendering: Rendering) -> Tensor:
        return torch.full((len(targets(rendering)), self.head.shape[1]), torch.nan)


def local_score(model: Any, needs: Needs, image_processor: Any, *, normalize: Normalization | None = None) -> Score:
    """Return a function that asks a model in this process, as a teacher's actor does.

    `normalize` replaces the image processor's normalisation.
    """
    normalize = normalize or Normalization.of(image_processor)

    @torch.inference_mode()
    def score(inputs: ModelInputs) -> GroupAnswer:
        device = model.get_input_embeddings().weight.device
        pairs = Pairs.of(inputs, device) if needs.reads_attention else None
        is_finite, values = answer(model, needs, TensorInputs.of(inputs, device), pairs, normalize)
        arrays = {name: to_wire(value) for name, value in values.items()}
        return GroupAnswer(arrays, inputs.rows_per_sample, inputs.visual_per_sample, is_finite.cpu().numpy())

    return score


def rows_of(rendering: Rendering) -> NDArray[np.int64]:
    """Return the positions of a sample's answer rows, at most `MOST_ROWS`."""
    return np.nonzero(rendering.answer_mask[1:])[0][:MOST_ROWS]


def targets(rendering: Rendering, shift: int = 0) -> Tensor:
    """Return the token that follows each answer row, or the one `shift` places further; -100 outside of the sample."""
    at = rows_of(rendering) + 1 + shift
    ids = rendering.input_ids
    is_inside = (at >= 0) & (at < len(ids))
    return torch.from_numpy(np.where(is_inside, ids[np.clip(at, 0, len(ids) - 1)], -100).astype(np.int64))


def with_images(sample: RawSample, images: list[bytes]) -> RawSample:
    """Return a sample with other images."""
    return replace(sample, images=images)


def _runs(counts: Sequence[int], most: int) -> Iterator[range]:
    """Yield runs of positions whose counts add up to `most` at the most, or are single."""
    start = total = 0
    for at, count in enumerate(counts):
        if at > start and total + count > most:
            yield range(start, at)
            start, total = at, 0
        total += count
    if counts:
        yield range(start, len(counts))


@lru_cache(maxsize=16)
def _groups(lengths: tuple[int, ...], max_tokens: int) -> list[list[int]]:
    """Return `cut`, found once: the settings are tried on the same samples again and again."""
    return cut(lengths, max_tokens=max_tokens)


def _grouped(subject: Subject, renderings: Sequence[Rendering], score: Score) -> list[Signal | None]:
    lengths = tuple(len(each.input_ids) for each in renderings)
    found: list[Signal | None] = [None] * len(renderings)
    for group in _groups(lengths, subject.batch_tokens):
        signals = score(subject.stacked([renderings[at] for at in group])).signals()
        for at, signal in zip(group, signals, strict=True):
            found[at] = signal
    return found
