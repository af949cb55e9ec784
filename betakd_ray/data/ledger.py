"""Which planned samples are done: one bit each, and one bit for a whole finished shard.

The ledger is what makes a stream exactly-once. It rides in every checkpoint; the stream subtracts it from the plan at
every start, whatever the number of workers then is.
"""

import base64
import json
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from betakd_ray.data.collate import SampleIds

Place = tuple[int, int]
"""(epoch, shard)"""


class Ledger:
    """Done samples by (epoch, shard, index). `sizes` are the samples of each shard of the plan."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self._complete: dict[int, NDArray[np.bool_]] = {}
        self._partial: dict[Place, NDArray[np.bool_]] = {}

    def add(self, ids: SampleIds) -> int:
        """Mark samples as done; returns how many of them already were."""
        repeated = 0
        places = np.stack([ids.epoch, ids.shard], axis=1)
        for epoch, shard in np.unique(places, axis=0) if len(places) else ():
            indexes = ids.index[(ids.epoch == epoch) & (ids.shard == shard)]
            repeated += self._mark((int(epoch), int(shard)), indexes)
        return repeated

    def merge(self, other: "Ledger") -> None:
        """Add everything that another ledger of the same plan has."""
        for epoch, shards in other._complete.items():
            for shard in np.flatnonzero(shards):
                self._mark((epoch, int(shard)), np.arange(self.sizes[shard]))
        for place, done in other._partial.items():
            self._mark(place, np.flatnonzero(done))

    def is_complete(self, epoch: int, shard: int) -> bool:
        """Whether every sample of the shard is done in that epoch."""
        return epoch in self._complete and bool(self._complete[epoch][shard])

    def done(self, epoch: int, shard: int) -> NDArray[np.bool_]:
        """[samples of the shard] true where done."""
        if self.is_complete(epoch, shard):
            return np.ones(self.sizes[shard], dtype=bool)
        return self._partial.get((epoch, shard), np.zeros(self.sizes[shard], dtype=bool))

    @property
    def count(self) -> int:
        """Samples done, over all epochs."""
        complete = sum(int(self.sizes[shards].sum()) for shards in self._complete.values())
        return complete + sum(int(done.sum()) for done in self._partial.values())

    def _mark(self, place: Place, indexes: NDArray[np.integer]) -> int:
        epoch, shard = place
        done = self.done(epoch, shard).copy()
        repeated = int(done[indexes].sum()) + len(indexes) - len(np.unique(indexes))
        done[indexes] = True
        if done.all():
            self._partial.pop(place, None)
            self._complete.setdefault(epoch, np.zeros(len(self.sizes), dtype=bool))[shard] = True
        else:
            self._partial[place] = done
        return repeated

    def to_json(self) -> str:
        """A compact text form: packed bits, deflated."""
        return json.dumps(
            {
                "sizes": self.sizes.tolist(),
                "complete": {str(epoch): _pack(shards) for epoch, shards in self._complete.items()},
                "partial": {f"{epoch}/{shard}": _pack(done) for (epoch, shard), done in self._partial.items()},
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Ledger":
        """The inverse of `to_json`."""
        tree = json.loads(text)
        ledger = cls(tree["sizes"])
        ledger._complete = {int(epoch): _unpack(bits, len(ledger.sizes)) for epoch, bits in tree["complete"].items()}
        for place, bits in tree["partial"].items():
            epoch, shard = (int(part) for part in place.split("/"))
            ledger._partial[epoch, shard] = _unpack(bits, int(ledger.sizes[shard]))
        return ledger


def _pack(bits: NDArray[np.bool_]) -> str:
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes())).decode()


def _unpack(text: str, size: int) -> NDArray[np.bool_]:
    packed = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return np.unpackbits(packed, count=size).astype(bool)
