"""What a teacher said, kept in object storage: one pass of the teacher serves every later epoch, and a whole sweep.

    CACHE / KEY / PARTS / SHARD / *.arrow        rows of (index, signal)

KEY is a hash of the teacher's weights and code and of all that shapes its view of a sample, so a changed teacher,
template or image size can never be a wrong hit; energies, temperatures and weightings are not in it. PARTS says what
was kept, e.g. hidden+visual: a job is served by any folder that has at least what it needs.

Reading tasks look signals up by shard, so that they reach the students with their samples; students write what they had
to ask for. A part written twice, by two attempts at one step, is read once.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import safetensors.numpy

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.data.ledger import SampleIds
from betakd_ray.data.plan import Plan
from betakd_ray.data.shards import Shard
from betakd_ray.errors import TeacherError
from betakd_ray.spec import CacheSpec, TeacherSpec
from betakd_ray.storage import join, open_store, replace_file
from betakd_ray.teacher.signal import WIRES, Needs, Signal, TeacherFacts, Wire

FORMAT = 1
FLUSH_BYTES = 32 << 20
KEPT_BYTES = 128 << 20
"""Of signals that a student worker keeps at hand: of a small set, rows are read epochs ahead of their answers."""
SCHEMA = pa.schema([("index", pa.int32()), ("signal", pa.large_binary())])


@dataclass(frozen=True)
class SignalCache:
    """One teacher's answers to one way of rendering."""

    location: CacheSpec
    key: str
    needs: Needs

    @classmethod
    def of(cls, spec: TeacherSpec, facts: TeacherFacts, view: str, needs: Needs) -> "SignalCache | None":
        """From the teacher as loaded and the fingerprint of its renderer; None if the spec names no cache."""
        if spec.cache is None:
            return None
        content = [FORMAT, facts.fingerprint, view, spec.attn_implementation]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
        return cls(spec.cache, key, needs)

    def read(self, shard: Shard) -> dict[int, bytes]:
        """Index in the shard → serialised signal, for the samples that are known."""
        filesystem, root = open_store(self.location.path, self.location.storage)
        folder = join(root, self.key)
        known: dict[int, bytes] = {}
        for parts in self._sufficient(filesystem, folder):
            for path in filesystem.glob(join(folder, parts, _name(shard), "*.arrow")):
                table = pyarrow.ipc.open_file(pa.BufferReader(filesystem.cat_file(path))).read_all()
                known |= zip(table["index"].to_pylist(), table["signal"].to_pylist(), strict=True)
        return known

    def write(self, shard: Shard, signals: Mapping[int, bytes]) -> None:
        """Add signals of one shard, as a file of its own: whole, or not there."""
        sink = pa.BufferOutputStream()
        table = pa.table({"index": list(signals), "signal": list(signals.values())}, schema=SCHEMA)
        with pyarrow.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_table(table)
        filesystem, root = open_store(self.location.path, self.location.storage)
        folder = join(root, self.key, self.needs.tag, _name(shard))
        filesystem.makedirs(folder, exist_ok=True)
        replace_file(filesystem, join(folder, f"{uuid4().hex}.arrow"), sink.getvalue().to_pybytes())

    def _sufficient(self, filesystem: Any, folder: str) -> list[str]:
        """PARTS folders that have at least what is needed."""
        found = [path.rstrip("/").rsplit("/", 1)[-1] for path in filesystem.glob(join(folder, "*"))]
        return [parts for parts in found if set(self.needs.tag.split("+")) <= set(parts.split("+"))]


class CacheWriter:
    """One student worker's side: gathers signals and writes them in the background; if samples come again, it keeps
    the first at hand."""

    def __init__(self, cache: SignalCache, plan: Plan) -> None:
        self._cache = cache
        self._shards = plan.shards
        self._held: dict[int, dict[int, bytes]] = defaultdict(dict)
        self._bytes = 0
        self._kept: dict[tuple[int, int], bytes] = {}
        self._room = KEPT_BYTES if plan.epochs > 1 else 0
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cache")
        self._writing: Future[None] | None = None

    def add(self, ids: SampleIds, inputs: ModelInputs, signal: Signal) -> None:
        """Keep the answer to a micro-batch; samples whose answer is not valid are left out."""
        for shard, index, one in zip(ids.shard.tolist(), ids.index.tolist(), split(signal, inputs), strict=True):
            if one is not None:
                self._held[shard][index] = one
                self._bytes += len(one)
                if self._room >= len(one):
                    self._kept[shard, index] = one
                    self._room -= len(one)
        if self._bytes >= FLUSH_BYTES:
            self._start()

    def known(self, ids: SampleIds) -> list[bytes] | None:
        """What was said of these samples in an earlier epoch, if all of it is still at hand."""
        parts = [self._kept.get(place) for place in zip(ids.shard.tolist(), ids.index.tolist(), strict=True)]
        return None if None in parts else cast(list[bytes], parts)

    def flush(self) -> None:
        """Return once everything is stored. Raises OSError if it cannot be."""
        self._start()
        self._finish()

    def _start(self) -> None:
        self._finish()
        held, self._held, self._bytes = self._held, defaultdict(dict), 0
        self._writing = self._executor.submit(self._write, held)

    def _finish(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write(self, held: Mapping[int, Mapping[int, bytes]]) -> None:
        for shard, signals in held.items():
            self._cache.write(self._shards[shard], signals)


def split(signal: Signal, inputs: ModelInputs) -> list[bytes | None]:
    """Each sample's part of a micro-batch's signal, serialised; None where it is not valid."""
    columns: dict[str, Sequence[np.ndarray]] = {}
    for name in WIRES:
        wire: Wire | None = getattr(signal, name)
        if wire:
            columns[f"{name}:{wire.dtype}"] = np.split(wire.array, np.cumsum(_counts(name, inputs))[:-1])
    columns |= {f"feature:{name}": list(values) for name, values in signal.features.items()}
    return [
        safetensors.numpy.save({name: np.ascontiguousarray(column[at]) for name, column in columns.items()})
        if valid
        else None
        for at, valid in enumerate(signal.valid)
    ]


def joined(parts: Sequence[bytes], inputs: ModelInputs, needs: Needs) -> Signal:
    """A micro-batch's signal from its samples': the inverse of `split`, for what is needed of it.

    Raises TeacherError if the parts do not fit the samples.
    """
    samples = [safetensors.numpy.load(part) for part in parts]
    columns: dict[str, list[np.ndarray]] = defaultdict(list)
    for sample in samples:  # each may have more than is needed, and a text-only one has nothing on image tokens
        for name, array in sample.items():
            columns[name].append(array)
    wires: dict[str, Any] = {
        name.split(":")[0]: Wire(np.concatenate(column), name.split(":")[1])
        for name, column in columns.items()
        if name.split(":")[0] in needs.wires
    }
    for name, wire in wires.items():
        if len(wire.array) != _counts(name, inputs).sum():
            raise TeacherError("teacher.cache holds signals of other lengths than these samples have; remove it")
    if not len(inputs.visual_sample):
        wires.pop("visual", None)
        wires.pop("visual_layer", None)
    return Signal(
        valid=np.ones(len(parts), dtype=bool),
        **wires,
        features={
            name.removeprefix("feature:"): np.stack(column)  # type: ignore[misc]
            for name, column in columns.items()
            if name.startswith("feature:") and name.removeprefix("feature:") in needs.features
        },
    )


def _counts(name: str, inputs: ModelInputs) -> np.ndarray:
    """[B] how many rows of a part each sample has."""
    if name == "attention":
        return inputs.rows_per_sample * inputs.visual_per_sample
    on_image_tokens = name in ("visual", "visual_layer", "salience")
    return inputs.visual_per_sample if on_image_tokens else inputs.rows_per_sample


def _name(shard: Shard) -> str:
    """A folder name for a shard's content."""
    return f"{shard.url.rsplit('/', 1)[-1]}-{shard.samples}-{shard.bytes}-{shard.checksum}"
