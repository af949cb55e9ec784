"""Cache of teacher signals in object storage: one pass of the teacher serves all later epochs, and a whole sweep.

    CACHE / KEY / PARTS / *.signals        signals of many samples, of any shards, one after the other
    CACHE / KEY / PARTS / *.index          for each such file: (shard, member, offset, length) of each signal in it

KEY is a hash of the teacher's weights and code and of everything that shapes its view of a sample. So a new teacher,
template or image size never gives a wrong hit. Energies, temperatures and weightings are not in the key. PARTS names
the stored parts, e.g. hidden+visual: a job can use any folder that has at least the parts that it needs.

Readers look up the places of a shard's signals in the small indexes, and pass the places on with the rows. Students
fetch the signals of the samples that they use next, and write the signals that they had to ask a teacher for. An index
is written after its file, so a file that an index names is complete. Names begin with the time: of several signals of
one sample, the newest is read.

Each signal and each index ends with a crc32 of its bytes. What is damaged, cut or gone counts as not cached: the
teacher answers again, and the new signal takes the place of the damaged one.
"""

import errno
import hashlib
import json
import logging
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, cast
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from betakd_ray.batch.sample import Stored
from betakd_ray.data.shards import Shard
from betakd_ray.plugins import source_of
from betakd_ray.spec import CacheSpec, TeacherSpec
from betakd_ray.spec.base import is_plugin
from betakd_ray.storage import join, make_folder, open_store, replace_file
from betakd_ray.teacher.parts import Needs, Signal, TeacherFacts

FORMAT = 3
FILE_BYTES = 64 << 20
"""Size in bytes at which a file of signals is written; only the last file of a run is smaller."""
KEPT_BYTES = 128 << 20
"""Limit in bytes of the signals that a student worker keeps in memory.

The rows of a small set are read epochs before their signals are needed, and so before these signals are in an index.
"""
REFRESH_S = 30.0
"""Time in seconds after which a process lists the indexes again."""
GAP_BYTES = 256 << 10
"""Largest gap in bytes between two ranges of a file that are read as one: a request costs more than these bytes."""
RANGE_BYTES = 32 << 20
"""Largest size in bytes of a joined range, so that long ranges are read in parallel."""
CRC_BYTES = 4
INDEX = pa.schema(
    [
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("member", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
    ]
)

_LOG = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A serialised signal with its checksum, and the sample that it belongs to."""

    shard: str
    member: int
    content: bytes


@dataclass(frozen=True)
class SignalCache:
    """Cached signals of one teacher for one way of rendering samples."""

    location: CacheSpec
    key: str
    needs: Needs
    job: str = field(default="", compare=False)
    """A name of this start of a job: a process that has read for another one lists the indexes again."""

    @classmethod
    def of(cls, spec: TeacherSpec, facts: TeacherFacts, view: str, needs: Needs) -> "SignalCache | None":
        """Return the cache of the loaded teacher for the renderer with the fingerprint `view`.

        Returns None if the spec names no cache.
        """
        if spec.cache is None:
            return None
        content = [FORMAT, facts.fingerprint, view, spec.attn_implementation]
        if is_plugin(spec.engine):
            content += [spec.engine, source_of(spec.engine)]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
        return cls(spec.cache, key, needs, uuid4().hex)

    def locate(self, shard: Shard) -> Mapping[int, Stored]:
        """Return the places of a shard's signals, by the number of the sample in the shard's file.

        The process keeps the indexes in memory, about 20 bytes per sample, and looks for new ones every `REFRESH_S`.
        """
        found: dict[int, Stored] = {}
        # The newest last. Clocks of nodes may differ by less than the time between two answers to one sample.
        for part in sorted(_index(self).of(_name(shard), self.job), key=lambda part: part.file.rpartition("/")[2]):
            places = zip(part.offsets.tolist(), part.lengths.tolist(), strict=True)
            stored = (Stored(part.file, offset, length) for offset, length in places)
            found.update(zip(part.members.tolist(), stored, strict=True))
        return found

    def fetch(self, places: Sequence[Stored]) -> list[Signal | None]:
        """Read the signals at these places: neighbours as one range, and ranges in parallel.

        A signal is None if it is damaged, cut or gone; a warning names its file. Raises OSError if the store fails.
        """
        filesystem, root = open_store(self.location.path, self.location.storage)
        folder = join(root, self.key)
        ranges = _ranges(places)
        paths = [join(folder, each.file) for each in ranges]
        contents = filesystem.cat_ranges(
            paths, [each.start for each in ranges], [each.stop for each in ranges], on_error="return"
        )
        signals: list[Signal | None] = [None] * len(places)
        for each, path, content in zip(ranges, paths, contents, strict=True):
            if isinstance(content, Exception) and not _is_absent(content):
                raise content
            for at in each.at:
                start = places[at].offset - each.start
                try:
                    if isinstance(content, Exception):
                        raise ValueError(f"{type(content).__name__}: {content}")
                    signals[at] = loaded(content[start : start + places[at].length])
                except ValueError as error:
                    _warn_of(path, f"at byte {places[at].offset}: {error}")
        return signals

    def write(self, entries: Sequence[Entry]) -> None:
        """Write signals as a new file, and then its index. Raises OSError; OutputError if the disk is full."""
        filesystem, root = open_store(self.location.path, self.location.storage)
        folder, name = join(root, self.key, self.needs.tag), f"{time.time_ns():016x}-{uuid4().hex[:15]}"
        make_folder(filesystem, folder)
        replace_file(filesystem, join(folder, f"{name}.signals"), b"".join(entry.content for entry in entries))
        lengths = np.array([len(entry.content) for entry in entries], np.int64)
        table = pa.table(
            {
                "shard": pa.array([entry.shard for entry in entries]).dictionary_encode(),
                "member": [entry.member for entry in entries],
                "offset": np.cumsum(lengths) - lengths,
                "length": lengths,
            },
            schema=INDEX,
        )
        sink = pa.BufferOutputStream()
        with pyarrow.ipc.new_file(sink, INDEX) as writer:
            writer.write_table(table)
        replace_file(filesystem, join(folder, f"{name}.index"), _with_checksum(sink.getvalue().to_pybytes()))

    def has(self, parts: str) -> bool:
        """Return whether a folder with the name `parts` has at least the parts that are needed."""
        return set(self.needs.tag.split("+")) <= set(parts.split("+"))


class CacheWriter:
    """Writer of one student worker: collects signals and writes them in the background. Thread-safe.

    With `keep`, for samples that come again, the first `KEPT_BYTES` of signals also stay in memory.
    """

    def __init__(self, cache: SignalCache, *, keep: bool) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._held: list[Entry] = []
        self._bytes = 0
        self._kept: dict[tuple[str, int], bytes] = {}
        self._room = KEPT_BYTES if keep else 0
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cache")
        self._writing: Future[None] | None = None

    def add(self, shard: Shard, member: int, signal: Signal) -> None:
        """Add the signal of a sample. Raises what `SignalCache.write` does if earlier signals could not be written."""
        # Serialised: the arrays are views of a whole group's answer and would keep all of it in the object store.
        content = serialized(signal)
        entry = Entry(_name(shard), member, content)
        with self._lock:
            self._held.append(entry)
            self._bytes += len(content)
            if self._room >= len(content):
                self._kept[entry.shard, member] = content
                self._room -= len(content)
            if self._bytes >= FILE_BYTES:
                self._start()

    def known(self, shard: Shard, member: int) -> Signal | None:
        """Return the signal that a sample got in an earlier epoch, if it is in memory; otherwise None."""
        # Without the lock: `add` only adds entries, and never changes or removes one.
        content = self._kept.get((_name(shard), member))
        return None if content is None else loaded(content)

    def flush(self) -> None:
        """Block until everything is stored. Raises OSError if it cannot be stored.

        Call it at the end of a run, because even a few signals become a file.
        """
        with self._lock:
            self._start()
            self._finish()

    def close(self) -> None:
        """Store everything and end the writing thread."""
        try:
            self.flush()
        finally:
            self._executor.shutdown(wait=False)

    def _start(self) -> None:
        self._finish()  # bounds memory: at most one file is being written while the next is collected
        held, self._held, self._bytes = self._held, [], 0
        if held:
            self._writing = self._executor.submit(self._cache.write, held)

    def _finish(self) -> None:
        # Cleared first, so that an error is raised once, and `close` still stores what was added after it.
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


# ------------------------------------------------------------------------------------------------ checksums


def _with_checksum(content: bytes) -> bytes:
    return content + zlib.crc32(content).to_bytes(CRC_BYTES, "little")


def _checked(content: bytes) -> bytes:
    """Return the bytes before the checksum. Raises ValueError if they are not those that were written."""
    whole, checksum = content[:-CRC_BYTES], content[-CRC_BYTES:]
    if not whole or zlib.crc32(whole).to_bytes(CRC_BYTES, "little") != checksum:
        raise ValueError(f"{len(content)} bytes do not have the checksum that was written with them")
    return whole


def serialized(signal: Signal) -> bytes:
    """Return a signal as bytes that own nothing of its arrays, with a checksum."""
    arrays = {name: np.ascontiguousarray(array) for name, array in signal.items()}
    return _with_checksum(safetensors.numpy.save(arrays))


def loaded(content: bytes) -> Signal:
    """Return a serialised signal. Raises ValueError if it is not the one that was written."""
    try:
        return safetensors.numpy.load(_checked(bytes(content)))
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _is_absent(error: Exception) -> bool:
    """Return whether a file is gone or ends before a range. S3 refuses such a range with EINVAL."""
    return isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno == errno.EINVAL)


_warned: set[str] = set()


def _warn_of(path: str, why: str) -> None:
    """Log a warning about a damaged file, one for each file and process."""
    if path not in _warned:
        _warned.add(path)
        _LOG.warning(
            "teacher.cache: %s is damaged or incomplete (%s). The teacher answers these samples again.", path, why
        )


# -------------------------------------------------------------------------------------------------- reading


class _Range(NamedTuple):
    """Range of a file in bytes, and which of the requested places are in it."""

    file: str
    start: int
    stop: int
    at: list[int]


def _ranges(places: Sequence[Stored]) -> list[_Range]:
    ranges: list[_Range] = []
    for at in sorted(range(len(places)), key=lambda at: places[at]):
        place, last = places[at], ranges[-1] if ranges else None
        stop = place.offset + place.length
        if (
            last is not None
            and last.file == place.file
            and place.offset - last.stop <= GAP_BYTES
            and stop - last.start <= RANGE_BYTES
        ):
            ranges[-1] = _Range(last.file, last.start, max(last.stop, stop), [*last.at, at])
        else:
            ranges.append(_Range(place.file, place.offset, stop, [at]))
    return ranges


@dataclass(frozen=True)
class _Indexed:
    """Index of the signals that one file has of one shard."""

    file: str
    members: NDArray[np.int32]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]


class _Index:
    """All indexes of a cache that this process has read."""

    def __init__(self, cache: SignalCache) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._read: set[str] = set()
        self._by_shard: defaultdict[str, list[_Indexed]] = defaultdict(list)
        self._listed = -REFRESH_S
        self._jobs: set[str] = set()

    def of(self, shard: str, job: str) -> list[_Indexed]:
        """Return the known index entries of the shard with this name. They are listed anew for a job that is new."""
        with self._lock:
            if job not in self._jobs or time.monotonic() - self._listed >= REFRESH_S:
                self._refresh()
                # Set after the listing, so that after an error of the store the next call lists again.
                self._listed = time.monotonic()
                self._jobs.add(job)
            return list(self._by_shard.get(shard, ()))

    def _refresh(self) -> None:
        location = self._cache.location
        filesystem, root = open_store(location.path, location.storage)
        listed = cast(list[str], filesystem.glob(join(root, self._cache.key, "*", "*.index")))
        new = [path for path in listed if path not in self._read and self._cache.has(path.split("/")[-2])]
        if not new:
            return
        for path, content in cast(dict[str, bytes], filesystem.cat(new)).items():
            try:
                self._add("/".join(path.removesuffix(".index").split("/")[-2:]) + ".signals", _checked(content))
            except ValueError as error:
                _warn_of(path, str(error))
        self._read.update(new)

    def _add(self, file: str, content: bytes) -> None:
        table = pyarrow.ipc.open_file(pa.BufferReader(content)).read_all()
        shards = table["shard"].combine_chunks()
        names, owners = shards.dictionary.to_pylist(), shards.indices.to_numpy()
        members, offsets, lengths = (table[name].to_numpy() for name in ("member", "offset", "length"))
        # Sorting by shard makes the entries of each shard one slice: bounds[n] … bounds[n + 1].
        order = np.argsort(owners, kind="stable")
        bounds = np.searchsorted(owners[order], np.arange(len(names) + 1))
        for name, start, stop in zip(names, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            at = order[start:stop]
            self._by_shard[name].append(_Indexed(file, members[at], offsets[at], lengths[at]))


@lru_cache(maxsize=4)
def _index(cache: SignalCache) -> _Index:
    return _Index(cache)


@lru_cache(maxsize=4096)
def _name(shard: Shard) -> str:
    """Return a name of a shard's content. It has no folder, because the shard may be moved between jobs."""
    return f"{shard.url.rsplit('/', 1)[-1]}-{shard.samples}-{shard.bytes}-{shard.checksum}"
