"""One (epoch, shard) of the plan → blocks of rendered rows; what cannot become a row is reported.

Apart from `stream`, so that the processes that only hand blocks on load none of this.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from betakd_ray.batch.sample import Rendering
from betakd_ray.data.plan import Plan, Quarantined, require_few
from betakd_ray.data.render import Renderer, Unrenderable
from betakd_ray.data.rows import to_arrow
from betakd_ray.data.shards import BadSample, RawSample, Shard, read_shard_with_retry
from betakd_ray.errors import DataUnreachable, UserError
from betakd_ray.spec import DataSpec

BLOCK_BYTES = 4 << 20
"""A block costs the executor tens of milliseconds, whatever is in it: make it worth that."""
KEPT_BYTES = 128 << 20
"""Of rows that a reading process keeps of small sets, for later epochs and for later jobs."""


class Row(NamedTuple):
    """A sample on its way into a block."""

    index: int
    key: str
    views: dict[str, Rendering]
    signal: bytes | None = None

    @property
    def bytes(self) -> int:
        """About what it takes of a block."""
        images = [array.nbytes for view in self.views.values() for array in view.images.values()]
        return sum(5 * len(view.input_ids) for view in self.views.values()) + sum(images) + len(self.signal or b"")


class Refusal(NamedTuple):
    """A sample that cannot become a row."""

    index: int
    key: str
    reason: str

    @property
    def bytes(self) -> int:
        return len(self.key) + len(self.reason)


@dataclass(frozen=True)
class Reader:
    """Reads one (epoch, shard) of the plan into blocks. Shipped once to every reading process.

    A set that is small and read several times is rendered once a process, whichever of its jobs asks first.
    """

    plan: Plan
    data: DataSpec
    renderers: dict[str, Renderer]
    report: Callable[[list[Quarantined]], float]
    """Takes bad samples to the job's monitor; returns the quarantined share of the plan so far."""
    give_up: Callable[[UserError], None]
    """Tells the job that no retry will help."""
    signals: Callable[[Shard], Mapping[int, bytes]] | None = None
    """Looks up what the teacher is known to say of a shard's samples, by index."""
    pairs_images: bool = False
    """Whether image tokens are compared one by one, so that both models must make as many of an image."""

    def blocks(self, epoch: int, shard: int, done: np.ndarray) -> Iterator[pa.Table]:
        """Blocks of some BLOCK_BYTES. Raises DataError for a damaged shard, DataUnreachable, TooManyBadSamples."""
        try:
            yield from self._blocks(epoch, shard, done)
        except DataUnreachable:
            raise  # the students restart, and may find the store back
        except UserError as error:
            self.give_up(error)
            raise

    def _blocks(self, epoch: int, shard: int, done: np.ndarray) -> Iterator[pa.Table]:
        signals = self.signals(self.plan.shards[shard]) if self.signals else {}
        rows: list[Row] = []
        bad: list[Quarantined] = []
        size = 0
        for prepared in self._prepared(epoch, shard, done):
            if isinstance(prepared, Refusal):
                bad.append(Quarantined(epoch, shard, *prepared))
                continue
            row = prepared._replace(signal=signals.get(prepared.index))
            rows.append(row)
            size += row.bytes
            if size >= BLOCK_BYTES:
                yield _block(epoch, shard, rows)
                rows, size = [], 0
        if rows:
            yield _block(epoch, shard, rows)
        if bad:
            require_few(self.report(bad), self.data, self.plan, bad[-1])

    def _prepared(self, epoch: int, shard: int, done: np.ndarray) -> Iterator[Row | Refusal]:
        """What becomes of each sample that is not done, in this epoch's order."""
        described = self.plan.shards[shard]
        if kept := _KEPT.find(self._rendering, described):
            yield from self._shuffled((one for one in kept if not done[one.index]), epoch, shard)
            return
        samples = read_shard_with_retry(described, self.data.storage, skip=done)
        room = KEPT_BYTES if self._is_small and not done.any() else 0
        keeping: list[Row | Refusal] = []
        for sample in self._shuffled(samples, epoch, shard):
            prepared = self._prepare(sample)
            yield prepared
            if room > 0:
                room -= prepared.bytes
                keeping.append(prepared)
        if room > 0:
            # Shuffled anew, it then comes as if it were read again.
            _KEPT.keep(self._rendering, described, sorted(keeping, key=lambda one: one.index))

    @property
    def _is_small(self) -> bool:
        """Before it is rendered, as far as can be told."""
        return self.plan.epochs > 1 and sum(shard.bytes for shard in self.plan.shards) <= KEPT_BYTES

    @cached_property
    def _rendering(self) -> str:
        """The same for all jobs whose rows are alike."""
        views = {view: renderer.fingerprint for view, renderer in self.renderers.items()}
        return repr((views, self.pairs_images, self.data.storage))

    def _prepare(self, sample: RawSample | BadSample) -> Row | Refusal:
        try:
            if isinstance(sample, BadSample):
                raise Unrenderable(sample.reason)
            return Row(sample.index, sample.key, self._render(sample))
        except Unrenderable as reason:
            return Refusal(sample.index, sample.key, str(reason))

    def _render(self, sample: RawSample) -> dict[str, Rendering]:
        views = {view: renderer.render(sample) for view, renderer in self.renderers.items()}
        answers = [view.input_ids[1:][view.answer_mask[1:]] for view in views.values()]
        if not all(np.array_equal(answers[0], other) for other in answers[1:]):
            raise Unrenderable("teacher and student do not have the same answer tokens (one cuts at max_length)")
        counts = {view: renderer.count_image_tokens(views[view]) for view, renderer in self.renderers.items()}
        if self.pairs_images and len(set(counts.values())) > 1:
            raise Unrenderable(f"energies compare image tokens one by one, and there are {counts}")
        return views

    def _shuffled(self, samples: Iterator[Any], epoch: int, shard: int) -> Iterator[Any]:
        if not self.plan.shuffle:
            return samples
        return _shuffle(samples, self.data.shuffle_buffer, np.random.default_rng((self.plan.seed, epoch, shard)))


class KeptRows:
    """Rows of small sets, of this process's jobs; sets that were not asked for lately make room."""

    def __init__(self) -> None:
        self._sets: OrderedDict[str, dict[Shard, list[Row | Refusal]]] = OrderedDict()
        self._bytes: dict[str, int] = {}

    def find(self, rendering: str, shard: Shard) -> list[Row | Refusal] | None:
        """In the order of the shard."""
        if rendering not in self._sets:
            return None
        self._sets.move_to_end(rendering)
        return self._sets[rendering].get(shard)

    def keep(self, rendering: str, shard: Shard, rows: list[Row | Refusal]) -> None:
        """If there is room, or can be made."""
        size = sum(row.bytes for row in rows)
        while sum(self._bytes.values()) + size > KEPT_BYTES and next(iter(self._sets), rendering) != rendering:
            oldest, _ = self._sets.popitem(last=False)
            del self._bytes[oldest]
        if sum(self._bytes.values()) + size <= KEPT_BYTES:
            self._sets.setdefault(rendering, {})[shard] = rows
            self._bytes[rendering] = self._bytes.get(rendering, 0) + size


_KEPT = KeptRows()


def _shuffle(samples: Iterable[Any], buffer: int, rng: np.random.Generator) -> Iterator[Any]:
    """A seeded reservoir: as random as the buffer is long."""
    held: list[Any] = []
    for sample in samples:
        held.append(sample)
        if len(held) >= buffer:
            at = int(rng.integers(len(held)))
            held[at], held[-1] = held[-1], held[at]
            yield held.pop()
    rng.shuffle(held)
    yield from held


def _block(epoch: int, shard: int, rows: list[Row]) -> pa.Table:
    views = {view: [row.views[view] for row in rows] for view in rows[0].views}
    return pa.table(
        {
            "epoch": pa.array(np.full(len(rows), epoch, np.int32)),
            "shard": pa.array(np.full(len(rows), shard, np.int32)),
            "index": pa.array(np.array([row.index for row in rows], np.int32)),
            "key": pa.array([row.key for row in rows], pa.string()),
            "signal": pa.array([row.signal for row in rows], pa.large_binary()),
            **to_arrow(views),
        }
    )
