"""Samples on which a student is evaluated while it trains: which they are, and how each rank reads its part."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice

from betakd_ray.batch.sample import Sample
from betakd_ray.data.manifest import find_shards
from betakd_ray.data.plan import Plan
from betakd_ray.data.reader import views_of
from betakd_ray.data.render import Renderer
from betakd_ray.data.rows import STUDENT, TEACHER
from betakd_ray.data.samples import BadSample, RawSample, Unrenderable
from betakd_ray.data.shards import Shard, read_shard_with_retry
from betakd_ray.errors import DataError
from betakd_ray.spec import JobSpec, StorageSpec, VisualEnergy


@dataclass(frozen=True)
class HeldOutData:
    """What every worker needs to read the held-out samples."""

    shards: tuple[Shard, ...]
    samples: int
    """Number of first samples of the shards that are used."""
    renderers: Mapping[str, Renderer]
    pairs_images: bool
    storage: StorageSpec
    batch_tokens: int
    """Largest number of tokens that a teacher scores at a time; 0 without a teacher."""

    @classmethod
    def of(cls, spec: JobSpec, plan: Plan, renderers: Mapping[str, Renderer]) -> "HeldOutData | None":
        """Return the data of a job; None if its spec has no evaluation.

        Raises DataError if there are no such shards, or if the job also trains on one of them.
        """
        if spec.evaluation is None:
            return None
        shards = find_shards(spec.evaluation.data, spec.data.storage)
        if not sum(shard.samples for shard in shards):
            raise DataError(f"evaluation.data: {list(spec.evaluation.data)} has no samples. Name shards with some.")
        trained = {shard.url for shard in plan.distinct} | {shard.checksum for shard in plan.distinct}
        if shared := [shard.url for shard in shards if {shard.url, shard.checksum} & trained]:
            raise DataError(
                f"evaluation.data: {shared[0]} is also in data.train, or is a copy of such a shard ({len(shared)} "
                "shards in all). An evaluation on what was trained on says nothing: name shards that are not."
            )
        pairs = any(isinstance(energy, VisualEnergy) for energy in spec.objective.energies)
        tokens = spec.teacher.batch_tokens if spec.teacher else 0
        return cls(tuple(shards), spec.evaluation.samples, renderers, pairs, spec.data.storage, tokens)

    def part(self, rank: int, ranks: int) -> Iterator[Sample | None]:
        """Yield the samples of one rank; None for one that cannot be used. Raises DataError."""
        raw = chain.from_iterable(read_shard_with_retry(shard, self.storage) for shard in self.shards)
        for position, sample in islice(enumerate(islice(raw, self.samples)), rank, None, ranks):
            yield self._sample(position, sample)

    def _sample(self, position: int, sample: RawSample | BadSample) -> Sample | None:
        if isinstance(sample, BadSample):
            return None
        try:
            views = views_of(sample, self.renderers, pairs_images=self.pairs_images)
        except Unrenderable:
            return None
        student = views[STUDENT]
        return Sample(0, 0, position, position, sample.key, student, views.get(TEACHER, student))
