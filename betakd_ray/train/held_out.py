"""Evaluation while a job trains: held-out samples through the student of all ranks, beside the training's own data."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from betakd_ray.batch.packing import cut
from betakd_ray.batch.sample import Rendering, Sample
from betakd_ray.data.held_out import HeldOutData
from betakd_ray.errors import DataError
from betakd_ray.teacher.parts import Signal
from betakd_ray.teacher.signals import Scores
from betakd_ray.train.agreement import Proposal, StepCounts, TokenCounts, gather_over
from betakd_ray.train.learner import Learner
from betakd_ray.train.micro_batches import Collator, MicroBatch, token_counts

AT_A_TIME = 4
"""Number of groups that a rank has with the teachers at a time; the training needs them too."""


@dataclass(frozen=True)
class HeldOut:
    """One rank's micro-batches of the held-out samples, with the teacher's signals, and the counts over all ranks."""

    batches: Sequence[MicroBatch]
    counts: StepCounts

    @classmethod
    def of(cls, data: HeldOutData, collator: Collator, client: Scores | None, group: dist.ProcessGroup) -> "HeldOut":
        """Read this rank's part and ask the teachers for its signals, once for all evaluations. Collective.

        `group` is a gloo group of the training's thread. Raises DataError if no sample can be used.
        """
        every = list(data.part(dist.get_rank(), dist.get_world_size()))
        usable = [sample for sample in every if sample is not None]
        valid = _with_signals(usable, client, data.batch_tokens)
        batches = collator.micro_batches(valid)
        inputs = [batch.inputs for batch in batches]
        proposal = Proposal(
            taken=len(every),
            valid=len(valid),
            micro_batches=len(batches),
            tokens=sum(map(token_counts, inputs), TokenCounts()),
        )
        counts = StepCounts.of(gather_over(group)(proposal.vector()))
        if not counts.samples:
            raise DataError(
                f"evaluation.data: none of the first {counts.dropped} samples can be used: they cannot be rendered, or "
                "the teacher has no answer to them. Name shards like those of data.train."
            )
        # As in training: the passes of ZeRO are collectives, so every rank must run equally many.
        empties = [collator.empty()] * (counts.micro_batches - len(batches))
        return cls([*batches, *empties], counts)

    def evaluate(self, learner: Learner) -> dict[str, float]:
        """Return the numbers of the student as it is now, by their names in the metrics. Collective."""
        totals = learner.evaluate(map(learner.loader, self.batches), self.counts)
        named = {"loss": totals.loss.item(), "samples": self.counts.samples, "dropped_samples": self.counts.dropped}
        energies = zip(learner.channels, totals.energies.tolist(), strict=True)
        named |= {f"energy/{name}": value for name, value in energies}
        named |= dict(zip(learner.distiller.rows.measures, totals.statistics.tolist(), strict=True))
        return {f"eval/{name}": value for name, value in named.items()}


def _with_signals(samples: Sequence[Sample], client: Scores | None, batch_tokens: int) -> list[tuple[Sample, Signal]]:
    """Return the samples to which the teacher has an answer, with it; all, with an empty one, without a teacher."""
    if client is None:
        return [(sample, {}) for sample in samples]
    views: list[Rendering] = [sample.teacher for sample in samples]
    groups = cut([len(view.input_ids) for view in views], max_tokens=batch_tokens)
    found: dict[int, Any] = {}
    with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="held-out") as threads:
        answers = threads.map(client.score, ([views[at] for at in group] for group in groups))
        for group, answer in zip(groups, answers, strict=True):
            found |= dict(zip(group, answer.signals, strict=True))
    return [(sample, found[at]) for at, sample in enumerate(samples) if found[at] is not None]
