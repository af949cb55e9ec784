"""Which planned samples are done: one bit each, and one bit for a whole finished shard.

The ledger is what makes a stream exactly-once. It rides in every checkpoint; the stream subtracts it from the plan at
every start, whatever the number of workers then is.
"""

import base64
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Place = tuple[int, int]
"""(epoch, shard)"""


@dataclass(frozen=True)
class SampleIds:
    """Where each sample of a batch came from; the ledger's terms. All [B]."""

    epoch: NDArray[np.int32]
    shard: NDArray[np.int32]
    index: NDArray[np.int32]

    def where(self, wanted: NDArray[np.bool_]) -> "SampleIds":
        """Those of them."""
        return SampleIds(self.epoch[wanted], self.shard[wanted], self.index[wanted])


class Ledger:
    """Done samples by (epoch, shard, index). `sizes` are the samples of each shard of the plan.

    A finished shard costs a bit in each epoch, one that was begun and is not finished a bit for each of its samples.
    The latter are the shards in flight and, for good, those with a quarantined sample, which is never done.
    """

    def __init__(self, sizes: Sequence[int] | NDArray[np.integer]) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self._complete: dict[int, NDArray[np.bool_]] = {}
        self._partial: dict[Place, NDArray[np.uint8]] = {}  # packed, eight samples a byte; replaced, never changed

    def add(self, ids: SampleIds) -> int:
        """Mark samples as done; returns how many of them already were."""
        return sum(self._mark(place, ids.index[at]) for place, at in _by_place(ids))

    def merge(self, other: "Ledger") -> None:
        """Add everything that another ledger of the same plan has. Raises ValueError if it is of another plan."""
        if not np.array_equal(self.sizes, other.sizes):
            raise ValueError("two ledgers of different plans cannot be merged: their shards differ")
        for epoch, shards in other._complete.items():
            self._completed(epoch)[:] |= shards
        self._partial = {place: bits for place, bits in self._partial.items() if not self.is_complete(*place)}
        for place, bits in other._partial.items():
            if not self.is_complete(*place):
                self._put(place, self._partial[place] | bits if place in self._partial else bits)

    def is_complete(self, epoch: int, shard: int) -> bool:
        """Whether every sample of the shard is done in that epoch."""
        return epoch in self._complete and bool(self._complete[epoch][shard])

    def done(self, epoch: int, shard: int) -> NDArray[np.bool_]:
        """[samples of the shard] true where done."""
        size = int(self.sizes[shard])
        if (epoch, shard) in self._partial:
            return _unpacked(self._partial[epoch, shard], size)
        return np.full(size, self.is_complete(epoch, shard))

    def holds(self, ids: SampleIds) -> NDArray[np.bool_]:
        """[B] true for the samples that are done."""
        held = np.zeros(len(ids.index), dtype=bool)
        for place, at in _by_place(ids):
            held[at] = self.done(*place)[ids.index[at]]
        return held

    def counts(self, epochs: int) -> NDArray[np.int64]:
        """[epochs, shards] samples done."""
        counts = np.zeros((epochs, len(self.sizes)), dtype=np.int64)
        for epoch in self._complete.keys() & range(epochs):
            counts[epoch] = np.where(self._complete[epoch], self.sizes, 0)
        for (epoch, shard), bits in self._partial.items():
            if epoch < epochs:
                counts[epoch, shard] = _count(bits)
        return counts

    @property
    def count(self) -> int:
        """Samples done, over all epochs."""
        complete = sum(int(self.sizes[shards].sum()) for shards in self._complete.values())
        return complete + sum(_count(bits) for bits in self._partial.values())

    def _mark(self, place: Place, indexes: NDArray[np.integer]) -> int:
        done = self.done(*place)
        before = np.count_nonzero(done)
        done[indexes] = True
        self._put(place, np.packbits(done))
        return len(indexes) - int(np.count_nonzero(done) - before)

    def _put(self, place: Place, bits: NDArray[np.uint8]) -> None:
        epoch, shard = place
        if _count(bits) < self.sizes[shard]:
            self._partial[place] = bits
        else:
            self._partial.pop(place, None)
            self._completed(epoch)[shard] = True

    def _completed(self, epoch: int) -> NDArray[np.bool_]:
        return self._complete.setdefault(epoch, np.zeros(len(self.sizes), dtype=bool))

    def to_json(self) -> str:
        """A compact text form: deflated bits.

        Where bits are random, and a shuffled plan's are, deflating gains nothing: the text then has 4/3 bytes for each
        byte of bits. Measured with 200,000 shards of 10,000 samples: 45 kB with half of the shards finished, 1.7 kB
        more for each that is half done (in flight), 60 bytes for each that lacks ten samples, 290 for a hundred.
        Shards of uneven sizes add 2.5 bytes each.
        """
        places = sorted(self._partial)
        return json.dumps(
            {
                "sizes": _deflated(self.sizes.astype("<i8").tobytes()),
                "complete": {
                    str(epoch): _deflated(np.packbits(bits).tobytes()) for epoch, bits in self._complete.items()
                },
                "partial": _deflated(np.array(places, "<i4").tobytes()),
                "done": _deflated(b"".join(self._partial[place].tobytes() for place in places)),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Ledger":
        """The inverse of `to_json`."""
        tree = json.loads(text)
        ledger = cls(np.frombuffer(_inflated(tree["sizes"]), "<i8"))
        for epoch, bits in tree["complete"].items():
            ledger._complete[int(epoch)] = _unpacked(np.frombuffer(_inflated(bits), np.uint8), len(ledger.sizes))
        places = np.frombuffer(_inflated(tree["partial"]), "<i4").reshape(-1, 2)
        ends = np.cumsum((ledger.sizes[places[:, 1]] + 7) // 8)
        done = np.split(np.frombuffer(_inflated(tree["done"]), np.uint8), ends)
        ledger._partial = {(epoch, shard): bits for (epoch, shard), bits in zip(places.tolist(), done, strict=False)}
        return ledger


def _by_place(ids: SampleIds) -> Iterator[tuple[Place, NDArray[np.intp]]]:
    """(epoch, shard), and where in the batch its samples are."""
    order = np.lexsort((ids.shard, ids.epoch))
    epoch, shard = ids.epoch[order], ids.shard[order]
    is_first = (np.diff(epoch, prepend=-1) != 0) | (np.diff(shard, prepend=-1) != 0)
    for at in np.split(order, np.flatnonzero(is_first))[1:]:
        yield (int(ids.epoch[at[0]]), int(ids.shard[at[0]])), at


def _count(bits: NDArray[np.uint8]) -> int:
    return int(np.bitwise_count(bits).sum())


def _unpacked(bits: NDArray[np.uint8], size: int) -> NDArray[np.bool_]:
    return np.unpackbits(bits, count=size).astype(bool)


def _deflated(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, level=1)).decode()


def _inflated(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))
