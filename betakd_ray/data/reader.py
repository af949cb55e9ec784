"""One group of the plan → blocks of rendered rows. Samples that cannot become a row are reported.

Separate from `stream`, so that processes that only pass blocks on do not import this module.
"""

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from betakd_ray.batch.sample import Rendering, Sample, Stored
from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import MIXED_SHARDS, Plan, Quarantined, require_few
from betakd_ray.data.render import Renderer, Unrenderable
from betakd_ray.data.rows import STUDENT, TEACHER, block_of
from betakd_ray.data.samples import BadSample, RawSample
from betakd_ray.data.shards import Shard, read_shard_with_retry
from betakd_ray.errors import DataUnreachable, UserError
from betakd_ray.spec import DataSpec

KEPT_BYTES = 128 << 20
"""Limit in bytes of the rows of small sets that a reading process keeps for later epochs and later jobs."""


class RenderedSample(NamedTuple):
    """A sample on its way into a block, numbered within its shard's file."""

    member: int
    key: str
    views: dict[str, Rendering]

    @property
    def bytes(self) -> int:
        """Return the approximate size in bytes in a block. The cache does not count: blocks must not depend on it."""
        return sum(view.nbytes for view in self.views.values())


class RefusedSample(NamedTuple):
    """A sample that cannot become a row."""

    member: int
    key: str
    reason: str

    @property
    def bytes(self) -> int:
        return len(self.key) + len(self.reason)


class Planned(NamedTuple):
    """A sample that is not done yet, before or after rendering."""

    shard: int
    index: int
    sample: "RawSample | BadSample | RenderedSample | RefusedSample"


@dataclass(frozen=True)
class Reader:
    """Reader of groups of the plan into blocks. It is sent once to every reading process.

    A small set that is read several times is rendered once per process, also for several jobs.
    """

    plan: Plan
    data: DataSpec
    renderers: dict[str, Renderer]
    report: Callable[[list[Quarantined]], float]
    """Function that reports bad samples to the job's monitor; returns the quarantined fraction of the plan so far."""
    give_up: Callable[[UserError], None]
    """Function that tells the job that no retry will help."""
    locate: Callable[[Shard], Mapping[int, Stored]] | None = None
    """Function that returns the places of a shard's cached signals, by number in the file; None: no cache."""
    pairs_images: bool = False
    """Whether image tokens are compared one by one, so that both models must make equally many of an image."""

    def blocks(self, epoch: int, first: int, last: int, done: Ledger, rows: int, size: int) -> Iterator[pa.Table]:
        """Yield the samples that are not done of an epoch's passes first ≤ … < last, in blocks.

        A block ends at `rows` samples or `size` bytes. The same arguments give the same blocks at any time, on any node
        and for any content of the caches: Ray Data runs a read task again if its blocks are lost, and skips as many
        blocks as it had before.

        Raises DataError for a damaged shard, DataUnreachable, TooManyBadSamples.
        """
        try:
            yield from self._blocks(epoch, first, last, done, rows, size)
        except DataUnreachable:
            raise  # the students restart, and the store may answer then
        except UserError as error:
            self.give_up(error)
            raise

    def _blocks(self, epoch: int, first: int, last: int, done: Ledger, rows: int, size: int) -> Iterator[pa.Table]:
        shards = self.plan.order(epoch)[first:last].tolist()
        todo = {shard: np.flatnonzero(~done.done(epoch, shard)) for shard in shards}
        todo = {shard: indexes for shard, indexes in todo.items() if len(indexes)}
        answers = _Answers(self.locate, {shard: len(indexes) for shard, indexes in todo.items()})
        block: list[Sample] = []
        bad: list[Quarantined] = []
        taken = 0
        for shard, index, prepared in self._prepared(epoch, first, todo):
            stored = answers.take(shard, self.plan.shards[shard], prepared.member)
            if isinstance(prepared, RefusedSample):
                bad.append(Quarantined(epoch, shard, index, prepared.key, prepared.reason))
                continue
            student = prepared.views[STUDENT]
            teacher = prepared.views.get(TEACHER, student)
            block.append(Sample(epoch, shard, index, prepared.member, prepared.key, student, teacher, stored))
            taken += prepared.bytes
            if len(block) >= rows or taken >= size:
                self._require_few(bad)
                yield block_of(block)
                block, bad, taken = [], [], 0
        self._require_few(bad)
        if block:
            yield block_of(block)

    def _require_few(self, bad: list[Quarantined]) -> None:
        if bad:
            require_few(self.report(bad), self.data, self.plan, bad[-1])

    def _prepared(
        self, epoch: int, first: int, todo: dict[int, NDArray[np.intp]]
    ) -> Iterator[tuple[int, int, RenderedSample | RefusedSample]]:
        """Yield (shard, index, row or refusal) for each sample that is not done, in this epoch's order."""
        keeping = _Keeping(self._rendering, self.plan.shards, KEPT_BYTES if self._is_small else 0)
        sources = ((len(indexes), self._read(epoch, shard, indexes)) for shard, indexes in todo.items())
        for shard, index, sample in self._mixed(sources, epoch, first):
            if isinstance(sample, (RenderedSample, RefusedSample)):
                yield shard, index, sample
                continue
            prepared = self._prepare(sample)
            keeping.add(shard, prepared)
            yield shard, index, prepared

    def _read(self, epoch: int, shard: int, indexes: NDArray[np.intp]) -> Generator[Planned]:
        """Yield the samples of a shard that are not done, in the order of its file."""
        described = self.plan.shards[shard]
        members = self.plan.members(epoch, shard)[indexes]
        index_of = dict(zip(members.tolist(), indexes.tolist(), strict=True))
        if kept := _KEPT.find(self._rendering, described):
            for one in kept:
                if one.member in index_of:
                    yield Planned(shard, index_of[one.member], one)
            return
        skip = np.ones(described.samples, dtype=bool)
        skip[members] = False
        for sample in read_shard_with_retry(described, self.data.storage, skip=skip):
            yield Planned(shard, index_of[sample.index], sample)

    def _mixed(self, sources: Iterable[tuple[int, Generator[Planned]]], epoch: int, first: int) -> Iterator[Planned]:
        """Yield the samples of a group, mixed from a few open shards at a time through one buffer."""
        if not self.plan.shuffle:
            for _, source in sources:
                yield from source
            return
        # The order depends on the numbers of samples only. It is thus the same for samples from a file and from memory.
        rng = self.plan.mixing(epoch, first)
        yield from _shuffle(_interleave(sources, MIXED_SHARDS, rng), self.data.shuffle_buffer, rng)

    @property
    def _is_small(self) -> bool:
        """Return whether the set is read several times and small enough to keep, by its size in bytes."""
        repeats = self.plan.epochs > 1 or len(self.plan.distinct) < len(self.plan.shards)
        return repeats and sum(shard.bytes for shard in self.plan.distinct) <= KEPT_BYTES

    @cached_property
    def _rendering(self) -> str:
        """Return a key that is equal for all jobs whose rows are alike."""
        views = {view: renderer.fingerprint for view, renderer in self.renderers.items()}
        return repr((views, self.pairs_images, self.data.storage))

    def _prepare(self, sample: RawSample | BadSample) -> RenderedSample | RefusedSample:
        try:
            if isinstance(sample, BadSample):
                raise Unrenderable(sample.reason)
            return RenderedSample(
                sample.index, sample.key, views_of(sample, self.renderers, pairs_images=self.pairs_images)
            )
        except Unrenderable as reason:
            return RefusedSample(sample.index, sample.key, str(reason))


def views_of(
    sample: RawSample, renderers: Mapping[str, Renderer], *, pairs_images: bool = False
) -> dict[str, Rendering]:
    """Return what each model sees of a sample. Raises Unrenderable if the two cannot be compared.

    With `pairs_images`, they must have equally many image tokens.
    """
    views = {view: renderer.render(sample) for view, renderer in renderers.items()}
    # From the second token on, because no row of logits predicts the first one.
    answers = [view.input_ids[1:][view.answer_mask[1:]] for view in views.values()]
    if not all(np.array_equal(answers[0], other) for other in answers[1:]):
        raise Unrenderable(
            "teacher and student do not have the same answer tokens (for one of them max_length cuts the sample)"
        )
    counts = {view: renderer.count_image_tokens(views[view]) for view, renderer in renderers.items()}
    if pairs_images and len(set(counts.values())) > 1:
        raise Unrenderable(f"energies compare image tokens one by one, but their numbers differ: {counts}")
    return views


class _Answers:
    """Places of the cached signals of a group's samples. A shard is looked up when its first sample comes."""

    def __init__(self, locate: Callable[[Shard], Mapping[int, Stored]] | None, left: dict[int, int]) -> None:
        self._locate = locate
        self._left = left
        self._known: dict[int, Mapping[int, Stored]] = {}

    def take(self, number: int, shard: Shard, member: int) -> Stored | None:
        """Return the place of one sample's signal, or None. After a shard's last sample, forget its places."""
        if self._locate is None:
            return None
        if number not in self._known:
            self._known[number] = self._locate(shard)
        place = self._known[number].get(member)
        self._left[number] -= 1
        if not self._left[number]:
            del self._known[number]
        return place


class _Keeping:
    """Collector of the rows of a small set. It keeps the shards of which it has every sample."""

    def __init__(self, rendering: str, shards: tuple[Shard, ...], room: int) -> None:
        self._rendering, self._shards, self._room = rendering, shards, room
        self._rows: dict[int, list[RenderedSample | RefusedSample]] = {}

    def add(self, shard: int, row: RenderedSample | RefusedSample) -> None:
        """Add a row. With the last row of a shard, the whole shard is kept."""
        if self._room <= 0:
            return
        self._room -= row.bytes
        if self._room <= 0:
            # Rows hold decoded images, so a set of small files may be too large as rows.
            self._rows.clear()
            return
        rows = self._rows.setdefault(shard, [])
        rows.append(row)
        if len(rows) == self._shards[shard].samples:
            # In the file's order, so that a later epoch mixes them exactly as if it read the file again.
            _KEPT.keep(self._rendering, self._shards[shard], sorted(rows, key=lambda one: one.member))
            del self._rows[shard]


class KeptRows:
    """Rows of small sets for all jobs of this process. The least recently used sets are dropped first."""

    def __init__(self) -> None:
        self._sets: OrderedDict[str, dict[Shard, list[RenderedSample | RefusedSample]]] = OrderedDict()
        self._bytes: dict[str, int] = {}

    def find(self, rendering: str, shard: Shard) -> list[RenderedSample | RefusedSample] | None:
        """Return the rows of a shard in the order of its file; None if they are not kept."""
        if rendering not in self._sets:
            return None
        self._sets.move_to_end(rendering)
        return self._sets[rendering].get(shard)

    def keep(self, rendering: str, shard: Shard, rows: list[RenderedSample | RefusedSample]) -> None:
        """Keep the rows of a shard, if there is room after dropping older sets."""
        size = sum(row.bytes for row in rows)
        # Never drops rows of the set that is being read: that would only make room for other rows of the same set.
        while sum(self._bytes.values()) + size > KEPT_BYTES and next(iter(self._sets), rendering) != rendering:
            oldest, _ = self._sets.popitem(last=False)
            del self._bytes[oldest]
        if sum(self._bytes.values()) + size <= KEPT_BYTES:
            self._sets.setdefault(rendering, {})[shard] = rows
            self._bytes[rendering] = self._bytes.get(rendering, 0) + size


_KEPT = KeptRows()


def _interleave(
    sources: Iterable[tuple[int, Generator[Planned]]], window: int, rng: np.random.Generator
) -> Iterator[Planned]:
    """Mix sources, given as (number of items, iterator): `window` at a time, drawn in proportion to the items left.

    The order depends only on the numbers of items and on `rng`.
    """
    waiting = iter(sources)
    opened: list[Generator[Planned]] = []
    left: list[int] = []
    try:
        while True:
            for items, source in islice(waiting, window - len(opened)):
                opened.append(source)
                left.append(items)
            if not opened:
                return
            # A permutation with each source repeated once per item left: proportional draws with one random call.
            for at in rng.permutation(np.repeat(np.arange(len(opened)), left)).tolist():
                yield next(opened[at])
                left[at] -= 1
                # The rest of the permutation is dropped: the source that takes the free place must be in the next draw.
                if not left[at]:
                    break
            next(opened[at], None)  # a damaged shard raises only after its last sample
            del opened[at], left[at]
    finally:
        # Otherwise the files of the open shards would stay open until their generators are collected.
        for source in opened:
            source.close()


def _shuffle(samples: Iterable[Planned], buffer: int, rng: np.random.Generator) -> Iterator[Planned]:
    """Shuffle with a buffer: the longer the buffer, the more random the order."""
    held: list[Planned] = []
    for sample in samples:
        held.append(sample)
        if len(held) >= buffer:
            at = int(rng.integers(len(held)))
            # Swapped with the last one first: pop(at) would move every item behind it.
            held[at], held[-1] = held[-1], held[at]
            yield held.pop()
    rng.shuffle(held)
    yield from held
