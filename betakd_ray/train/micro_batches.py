"""Steps of one rank and their micro-batches, as arrays on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.packing import cut, stack
from betakd_ray.batch.sample import Rendering, Sample
from betakd_ray.teacher.answers import empty_signal, join_signals
from betakd_ray.teacher.parts import Needs, Signal, TeacherFacts
from betakd_ray.train.agreement import StepCounts, TokenCounts


@dataclass(frozen=True)
class MicroBatch:
    """Samples of a step that go through the model together, as arrays on the host."""

    inputs: ModelInputs
    signal: dict[str, NDArray[Any]]
    """Part → array whose first axis is the samples' places (`teacher.parts`); empty without a teacher."""
    is_empty: bool = False
    """True for a placeholder of weight zero, which fills up a rank that has fewer micro-batches than another."""


@dataclass(frozen=True)
class Step:
    """One rank's part of a global batch."""

    number: int
    """Number of the step in the job, counted from 1."""
    counts: StepCounts
    micro_batches: Sequence[MicroBatch]
    samples: Sequence[Sample]
    """Samples of this rank that take part in the loss."""
    teacher_busy_s: float = 0.0
    """Seconds that teachers computed for this rank's samples."""


class Refused(NamedTuple):
    """A sample for which the teacher has no answer, and the reason."""

    sample: Sample
    reason: str


@dataclass(frozen=True)
class Collator:
    """Function object that cuts a rank's share of a step into micro-batches, and makes arrays of each."""

    pad_token_id: int
    image_token_id: int
    needs: Needs
    facts: TeacherFacts | None
    """Facts about the teacher; None without a teacher."""
    max_samples: int | None = None
    max_tokens: int | None = None

    def micro_batches(self, samples: Sequence[tuple[Sample, Signal]]) -> list[MicroBatch]:
        """Return the samples in micro-batches of similar lengths, the longest first."""
        lengths = [len(sample.student.input_ids) for sample, _ in samples]
        batches = cut(lengths, self.max_samples, self.max_tokens)
        return [self._batch([samples[at] for at in batch]) for batch in batches]

    def empty(self) -> MicroBatch:
        """Return a micro-batch of one text-only sample with one answer token."""
        # Two tokens, because the row that predicts an answer token is that of the token before it.
        blank = Rendering(np.zeros(2, np.int32), np.array([False, True]))
        signal = empty_signal(self.needs, self.facts, rows=1, tokens=0) if self.facts else {}
        return replace(self._made([blank], [signal]), is_empty=True)

    def _batch(self, samples: Sequence[tuple[Sample, Signal]]) -> MicroBatch:
        return self._made([sample.student for sample, _ in samples], [signal for _, signal in samples])

    def _made(self, views: Sequence[Rendering], signals: Sequence[Signal]) -> MicroBatch:
        inputs = stack(views, self.pad_token_id, self.image_token_id)
        return MicroBatch(inputs, join_signals(signals, inputs, self.needs) if self.facts else {})


def token_counts(inputs: ModelInputs) -> TokenCounts:
    real, image, answer = int(inputs.attention_mask.sum()), len(inputs.visual_sample), len(inputs.targets)
    return TokenCounts(real - image - answer, image, answer, inputs.input_ids.size - real)
