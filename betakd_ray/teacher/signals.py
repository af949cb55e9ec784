"""Samples of a student worker → signals of the teacher. Samples are added ahead of their use.

A sample's signal is read from the cache if it is there; otherwise a teacher is asked. Samples for the teachers are put
into groups of similar length, up to the teacher's token budget, regardless of the student's micro-batches. The groups
depend on the order of the samples and on the content of the cache, and never on timing.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple, Protocol, runtime_checkable

from betakd_ray.batch.packing import cut
from betakd_ray.batch.sample import Rendering, Sample
from betakd_ray.data.shards import Shard
from betakd_ray.errors import TeacherError
from betakd_ray.teacher.answers import Answer
from betakd_ray.teacher.cache import CacheWriter, SignalCache
from betakd_ray.teacher.compare import differs
from betakd_ray.teacher.parts import Signal

CHUNK_GROUPS = 2
"""Number of groups' worth of consecutive samples that are divided together, to find samples of similar length."""
MAX_IN_FLIGHT = 64
"""Largest number of groups that one student worker has with the teachers at a time."""
FETCH_AT_A_TIME = 32
"""Number of samples whose stored signals are read together, so that neighbours in a file become one range."""
COMPARED = 4
"""Number of stored signals that are compared with live answers at the start of a run."""
RECENT = 32
"""Number of recent answers over which a teacher's time per group is averaged."""


class Said(NamedTuple):
    """Result for one sample: its signal, or the reason why it has none."""

    signal: Signal | None
    """Signal of the sample; None if the teacher cannot score it."""
    reason: str = ""
    """Reason why there is no signal; empty if there is one."""
    busy_s: float = 0.0
    """Seconds that its teacher computed the group, divided by the samples of the group; 0.0 if read from the cache."""


@dataclass
class Pending:
    """Sample whose signal may not have arrived yet."""

    sample: Sample
    said: "Future[Said]" = field(default_factory=Future)


@runtime_checkable
class Scores(Protocol):
    """Method of `TeacherClient` that is used here."""

    def score(self, group: Sequence[Rendering]) -> Answer: ...


class SignalSource:
    """Source of the signals of one rank's samples. Without a teacher (`client` None) every signal is empty.

    Call `add` from one thread only. Other threads resolve the futures that it returns.
    """

    def __init__(
        self,
        client: Scores | None,
        batch_tokens: int = 0,
        cache: SignalCache | None = None,
        writer: CacheWriter | None = None,
        shards: Sequence[Shard] = (),
        dtype: str = "float32",
    ) -> None:
        """Start the threads. `dtype` is the dtype that the teacher computes in (`TeacherFacts.dtype`).

        Stored signals may differ from live ones by the rounding of `dtype`.
        """
        self._client, self._dtype = client, dtype
        self._batch_tokens = batch_tokens
        self._cache, self._writer, self._shards = cache, writer, shards
        self._scorers = ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="score")
        self._readers = ThreadPoolExecutor(8, thread_name_prefix="fetch")
        self._unknown: list[Pending] = []
        self._unknown_tokens = 0
        self._stored: list[Pending] = []
        self._to_compare = COMPARED
        self._lock = threading.Lock()
        self._busy_s: deque[float] = deque(maxlen=RECENT)
        self._transfer_s = math.inf
        """Seconds that the quickest answer took in addition to the teacher's computation."""

    @property
    def is_filling(self) -> bool:
        """Return whether samples wait here for more samples to form a group. Then add more, or call `flush`."""
        return bool(self._unknown or self._stored)

    @property
    def latency_s(self) -> float:
        """Return the seconds that an idle teacher takes to answer a group; 0.0 before the first answer.

        Time in a teacher's queue does not count. It grows with the number of requests, and the caller makes more
        requests ahead if the latency is longer, so both would grow without limit.
        """
        with self._lock:
            return self._transfer_s + fmean(self._busy_s) if self._busy_s else 0.0

    def add(self, sample: Sample) -> Pending:
        """Take the next sample of the stream; return it with the future of its signal."""
        pending = Pending(sample)
        if self._client is None:
            pending.said.set_result(Said({}))
        elif (known := self._kept(sample)) is not None:
            pending.said.set_result(Said(known))
        elif sample.stored is not None and self._cache is not None:
            self._stored.append(pending)
            if len(self._stored) >= FETCH_AT_A_TIME:
                self._fetch_stored()
        else:
            self._unknown.append(pending)
            self._unknown_tokens += len(sample.teacher.input_ids)
            if self._unknown_tokens >= CHUNK_GROUPS * self._batch_tokens:
                self._send_unknown()
        return pending

    def flush(self) -> None:
        """Send and fetch the samples that wait for more samples."""
        self._fetch_stored()
        self._send_unknown()

    def close(self) -> None:
        """Start nothing more. Does not wait for groups that are with teachers."""
        # Futures of cancelled samples stay open for ever. The feed waits for them in short intervals, and notices its
        # own end.
        self._scorers.shutdown(wait=False, cancel_futures=True)
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _kept(self, sample: Sample) -> Signal | None:
        if self._writer is None:
            return None
        return self._writer.known(self._shards[sample.shard], sample.member)

    def _send_unknown(self) -> None:
        waiting, self._unknown, self._unknown_tokens = self._unknown, [], 0
        self._send(waiting)

    def _send(self, waiting: list[Pending]) -> None:
        lengths = [len(pending.sample.teacher.input_ids) for pending in waiting]
        for group in cut(lengths, max_tokens=self._batch_tokens):
            self._scorers.submit(self._score, [waiting[at] for at in group])

    def _score(self, group: list[Pending]) -> None:
        assert self._client is not None
        start = time.monotonic()
        try:
            answer = self._client.score([pending.sample.teacher for pending in group])
            with self._lock:
                self._busy_s.append(answer.busy_s)
                self._transfer_s = max(0.0, min(self._transfer_s, time.monotonic() - start - answer.busy_s))
            for at, (pending, signal) in enumerate(zip(group, answer.signals, strict=True)):
                # Before the result is set: an error of the cache can reach the job only through an open future.
                if signal is not None and self._writer is not None:
                    self._writer.add(self._shards[pending.sample.shard], pending.sample.member, signal)
                reason = "" if signal is not None else answer.reasons.get(at, "the teacher's output is not finite")
                pending.said.set_result(Said(signal, reason, answer.busy_s / len(group)))
        except BaseException as error:  # raised again where the signal is used, so that it ends the job
            _fail(group, error)

    def _fetch_stored(self) -> None:
        waiting, self._stored = self._stored, []
        if waiting:
            self._readers.submit(self._fetch, waiting)

    def _fetch(self, waiting: list[Pending]) -> None:
        assert self._cache is not None
        try:
            places = [pending.sample.stored for pending in waiting]
            signals = self._cache.fetch([place for place in places if place is not None])
            read = [(pending, signal) for pending, signal in zip(waiting, signals, strict=True) if signal is not None]
            self._compare(read)
            for pending, signal in read:
                pending.said.set_result(Said(signal))
            # Damaged in the cache: as if it were not there. The writer stores the new answers.
            self._send([pending for pending, signal in zip(waiting, signals, strict=True) if signal is None])
        except BaseException as error:  # as above
            _fail(waiting, error)

    def _compare(self, read: Sequence[tuple[Pending, Signal]]) -> None:
        """Ask the teachers for a few samples with stored signals. Raises TeacherError if the two differ.

        The fingerprint does not show some changes of a teacher: other kernels, another quantisation library, a damaged
        device. Without this check such a change would go unnoticed as long as old signals are read.
        """
        with self._lock:
            count = min(self._to_compare, len(read))
            self._to_compare -= count
        if not count:
            return
        assert self._client is not None
        assert self._cache is not None
        answer = self._client.score([pending.sample.teacher for pending, _ in read[:count]])
        for (pending, stored), live in zip(read, answer.signals, strict=False):
            difference = None if live is None else differs(live, stored, self._dtype)
            if difference:
                raise TeacherError(
                    f"teacher.cache: the stored answer to sample {pending.sample.key} differs from the teacher's "
                    f"answer now ({difference}); the cache's key is {self._cache.key}. Remove that folder of the "
                    "cache, or find out what changed: the teacher's weights, its kernels or its dtype."
                )


def _fail(pendings: Sequence[Pending], error: BaseException) -> None:
    for pending in pendings:
        # The error may come in the middle of a group, whose first samples have their results.
        if not pending.said.done():
            pending.said.set_exception(error)
