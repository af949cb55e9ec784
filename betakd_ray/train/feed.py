"""The feed of a student worker: threads that prepare its steps, at least one whole step ahead of the training.

    rows ──► reader ──► samples, their signals requested ──► assembler ──► steps ──► (copier, `prefetch`) ──► training
             thread     as many as the measured rates need   thread

The reader takes rows in the order in which they arrive, and requests their signals (`teacher.signals`). The assembler
takes this rank's share of the next step, waits for its signals, cuts it into micro-batches and agrees with the other
ranks' assemblers (`agreement`). So no collective of the training waits for a teacher or for data. The samples of a step
depend only on the order of the rows, never on the speed of a rank or a teacher.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from betakd_ray.batch.images import PIXELS
from betakd_ray.batch.sample import Sample
from betakd_ray.errors import TeacherError
from betakd_ray.teacher.parts import Signal
from betakd_ray.teacher.signals import Pending, SignalSource
from betakd_ray.train.activities import Activities
from betakd_ray.train.agreement import STOP, TAKEN, Gather, Proposal, StepCounts, TokenCounts, allot, shares
from betakd_ray.train.micro_batches import Collator, MicroBatch, Refused, Step, token_counts

HELD_BYTES = 2 << 30
"""Limit in bytes of the samples that are read ahead. One whole step is always read, even if it is larger."""
RECENT_STEPS = 9
"""Number of steps over which the training's rate is measured."""
POLL_S = 0.5
"""Seconds between two checks of a waiting thread whether the job is to stop."""


@runtime_checkable
class Control(Protocol):
    """Requests of the cluster and the driver to the job, as this rank knows them."""

    @property
    def is_stopping(self) -> bool: ...

    def wants_checkpoint(self) -> bool:
        """Return whether there is a new request for a checkpoint since the last call."""
        ...


class Closed(Exception):
    """The feed was closed while a thread of it waited."""


class Stopping(Exception):
    """The job is to stop, so a step that waits for data or for a teacher is given up."""


@dataclass
class _Ahead:
    """Samples that are read but not yet part of a step."""

    pendings: deque[Pending] = field(default_factory=deque)
    bytes: int = 0
    has_ended: bool = False
    error: BaseException | None = None


class Feed:
    """One rank's steps, in order. One thread may call `next_step`; `close` ends the feed's own threads."""

    def __init__(
        self,
        samples: Iterator[Sample],
        source: SignalSource,
        collator: Collator,
        gather: Gather,
        *,
        rank: int,
        ranks: int,
        global_batch: int,
        steps: range,
        control: Control,
        activities: Activities | None = None,
        window_tokens: int = 0,
        on_refused: Callable[[list[Refused]], None] = lambda refused: None,
    ) -> None:
        """Start the threads that make the steps whose numbers are in `steps`.

        `window_tokens` is the number of tokens that are kept with the teachers beyond one step. `on_refused` is called
        in the assembler's thread with samples that no teacher can answer; an error that it raises ends the feed. The
        assembler notes what it does in `activities` (by default an object of its own).
        """
        self._rows, self._source, self._collator, self._gather = samples, source, collator, gather
        self._rank, self._ranks, self._global_batch, self._steps = rank, ranks, global_batch, steps
        self._control, self._window_tokens, self._on_refused = control, window_tokens, on_refused
        self.activities = activities or Activities()
        self._ahead = _Ahead()
        self._wanted = 0
        self._mean_tokens = 0.0
        self._taken_at: deque[float] = deque(maxlen=RECENT_STEPS)
        self.was_stopped = False
        """True if the ranks agreed to stop before the last step."""
        self._changed = threading.Condition()
        self._ready: deque[Step | BaseException | None] = deque()
        self._is_closed = False
        # Daemons, and `close` does not join them: the assembler may be in a collective with a rank that has died.
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("feed-reader", self._read), ("feed-assembler", self._assemble))
        ]
        for thread in self._threads:
            thread.start()

    def next_step(self) -> Step | None:
        """Wait for the next step and return it; None after the last one. Raises the error that ended a thread."""
        with self._changed:
            # Not with `may_stop`: only the assembler ends the steps, after all ranks have agreed to stop.
            self._wait_for(lambda: bool(self._ready))
            step = self._ready[0]
            if isinstance(step, Step):  # the end (None or an error) stays in the queue: every later call must see it
                self._ready.popleft()
                self._taken_at.append(time.perf_counter())
                self._changed.notify_all()
        if isinstance(step, BaseException):
            raise step
        return step

    def close(self) -> None:
        """End the threads, also while they wait."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._source.close()

    # --------------------------------------------------------------------------------------------- the reader

    def _read(self) -> None:
        error: BaseException | None = None
        try:
            for sample in self._rows:
                with self._changed:
                    self._wait_for(self._has_room)
                pending = self._source.add(sample)
                length = len(sample.teacher.input_ids)
                self._mean_tokens = 0.98 * self._mean_tokens + 0.02 * length if self._mean_tokens else float(length)
                with self._changed:
                    self._ahead.pendings.append(pending)
                    self._ahead.bytes += _bytes(sample)
                    self._changed.notify_all()
        except Closed:
            return
        except BaseException as failure:  # raised again in the assembler, when it needs a sample that is not there
            error = failure
        self._source.flush()  # also after an error: a step may wait for the signals of the samples before it
        with self._changed:
            self._ahead.has_ended, self._ahead.error = True, error
            self._changed.notify_all()

    def _has_room(self) -> bool:
        """Return whether the next sample is to be read now."""
        count = len(self._ahead.pendings)
        # A group for the teacher that is being filled is always completed: the samples already in it wait for the rest.
        # To fill the last step, the assembler may want more than a share. Without `_wanted`, each of the two threads
        # would then wait for the other.
        if self._source.is_filling or count < max(self._wanted, self._largest_share):
            return True
        return count < self._target and self._ahead.bytes < HELD_BYTES

    @property
    def _largest_share(self) -> int:
        return -(-self._global_batch // self._ranks)

    @property
    def _target(self) -> int:
        """Return the number of samples to read ahead.

        It is a whole step, plus the window, plus twice the samples that the student uses up while a teacher answers
        (measured). With fewer, the student would wait for every answer, however many teachers there are. Twice, because
        too few samples in flight would limit the measured rate itself. The number then grows until the student's own
        work, or the teachers, limit the rate.
        """
        during_an_answer = 2 * self._rate * self._source.latency_s
        window = self._window_tokens / max(self._mean_tokens, 1.0)
        return self._largest_share + int(window + during_an_answer)

    @property
    def _rate(self) -> float:
        """Return the samples that this rank uses up per second.

        The mean is over several steps, because steps come in bursts if the teacher is slow.
        """
        taken = self._taken_at
        return (len(taken) - 1) * self._largest_share / (taken[-1] - taken[0]) if len(taken) > 1 else 0.0

    # ------------------------------------------------------------------------------------------ the assembler

    def _assemble(self) -> None:
        end: BaseException | None = None
        try:
            for number in self._steps:
                step = self._step(number)
                if step is None:
                    break
                with self._changed:
                    # At most one finished step waits, so what is read ahead stays in the reader's bounds.
                    # Not with `may_stop`: all ranks have agreed on this step, so this rank must train on it too.
                    self._wait_for(lambda: not self._ready)
                    self._ready.append(step)
                    self._changed.notify_all()
        except Closed:
            pass
        except BaseException as error:  # raised again in the training's thread
            end = error
        with self._changed:
            self._ready.append(end)
            self._changed.notify_all()

    def _step(self, number: int) -> Step | None:
        """Return the next step; None if the stream is over or the job is to stop. Collective of the feeds.

        A rank that is to stop still takes part in the exchange, and says so there. So all ranks leave at the same step,
        and none waits for a rank that has left.
        """
        share = shares(self._global_batch, self._ranks, number)[self._rank]
        part = _Part()
        try:
            self._fill(part, share)
        except Stopping:
            part.stop = True
        everyone = self._propose(part)
        if everyone is None:
            return None
        missing = self._global_batch - int(everyone[:, TAKEN].sum())
        # Every rank sees the same `everyone`, so all ranks take the same branch, and their collectives match.
        if missing:
            # The rows of some rank have ended. The other ranks fill the step with rows that they have left.
            everyone = self._complete(part, missing)
        if everyone is None:
            return None
        counts = StepCounts.of(everyone)
        if not counts.samples:
            raise TeacherError(
                "the teacher gave no finite answer for any sample of a global batch. A teacher in float16 may "
                "overflow: set teacher.dtype to bfloat16 or float32"
            )
        # Every rank must run as many micro-batches: the backward passes of ZeRO are collectives.
        empties = [self._collator.empty()] * (counts.micro_batches - len(part.batches))
        samples = [sample for sample, _ in part.valid]
        return Step(number, counts, [*part.batches, *empties], samples, part.busy_s)

    def _complete(self, part: "_Part", missing: int) -> NDArray[np.float64] | None:
        """Fill the last step: take more samples than the share. Collective of the feeds.

        The first exchange says how many samples each rank has left; `allot` then divides the missing ones in the same
        way on every rank. Return None if all ranks together have too few, or if any rank is to stop.
        """
        try:
            spare = self._count_ahead(missing)
        except Stopping:
            # The exchange below still takes place: the other ranks wait in it.
            part.stop, spare = True, 0
        everyone = self._exchange(Proposal(taken=spare, stop=part.stop))
        given = None if everyone is None else allot(missing, everyone[:, TAKEN].astype(int).tolist())
        if given is None:
            return None
        try:
            self._fill(part, given[self._rank])
        except Stopping:
            part.stop = True
        return self._propose(part)

    def _fill(self, part: "_Part", count: int) -> None:
        """Take up to `count` samples, wait for their signals, and cut the whole part into micro-batches.

        Raises Stopping.
        """
        taken = self._take(count)
        part.taken += len(taken)
        refused = []
        with self.activities.doing("teacher_wait"):
            for pending in taken:
                said = self._said(pending)
                part.busy_s += said.busy_s
                if said.signal is None:
                    refused.append(Refused(pending.sample, said.reason))
                else:
                    part.valid.append((pending.sample, said.signal))
        if refused:
            self._on_refused(refused)
        with self.activities.doing("collate"):
            part.batches = self._collator.micro_batches(part.valid)

    def _take(self, count: int) -> list[Pending]:
        """Return the next `count` samples; fewer at the end of the stream. Raises Stopping."""
        self._count_ahead(count)
        with self._changed:
            ahead = self._ahead
            taken = [ahead.pendings.popleft() for _ in range(min(count, len(ahead.pendings)))]
            ahead.bytes -= sum(_bytes(pending.sample) for pending in taken)
            self._changed.notify_all()
        return taken

    def _count_ahead(self, wanted: int) -> int:
        """Wait until `wanted` samples are read or the stream has ended; return how many there are, up to `wanted`.

        Raises Stopping, or the reader's error.
        """
        ahead = self._ahead
        with self.activities.doing("data_wait"), self._changed:
            self._wanted = wanted
            self._changed.notify_all()
            self._wait_for(lambda: len(ahead.pendings) >= wanted or ahead.has_ended, may_stop=True)
            if len(ahead.pendings) < wanted and ahead.error:
                raise ahead.error
            return min(wanted, len(ahead.pendings))

    def _said(self, pending: Pending) -> Any:
        while True:
            try:
                return pending.said.result(timeout=POLL_S)
            except FutureTimeout:
                if pending.said.done():  # the result itself is a TimeoutError; it is not this wait that ran out
                    raise
                self._poll_control(may_stop=True)

    def _propose(self, part: "_Part") -> NDArray[np.float64] | None:
        """Send this rank's part to all ranks; return every rank's numbers [ranks, COLUMNS]. Collective of the feeds.

        Return None if any rank asks to stop.
        """
        inputs = [batch.inputs for batch in part.batches]
        # The request is kept in `part`: if the step has a second exchange, the first one's request is not lost.
        part.save = self._control.wants_checkpoint() or part.save
        return self._exchange(
            Proposal(
                taken=part.taken,
                valid=len(part.valid),
                micro_batches=len(inputs),
                squares=sum(int((each.attention_mask.sum(axis=1) ** 2).sum()) for each in inputs),
                pixels=sum(each.images[PIXELS].size for each in inputs if each.images),
                tokens=sum(map(token_counts, inputs), TokenCounts()),
                save=part.save,
                stop=part.stop or self._control.is_stopping,
            )
        )

    def _exchange(self, proposal: Proposal) -> NDArray[np.float64] | None:
        with self.activities.doing("agree"):
            everyone = self._gather(proposal.vector())
        # One rank that asks is enough. All ranks see the same numbers, so all stop at the same step.
        self.was_stopped = bool(everyone[:, STOP].any())
        return None if self.was_stopped else everyone

    # ---------------------------------------------------------------------------------------------- waiting

    def _wait_for(self, condition: Callable[[], bool], *, may_stop: bool = False) -> None:
        """Wait until `condition` is true; the caller holds the lock. Raises Closed, and Stopping if `may_stop`."""
        while not condition():
            self._poll_control(may_stop=may_stop)
            self._changed.wait(timeout=POLL_S)

    def _poll_control(self, *, may_stop: bool) -> None:
        if self._is_closed:
            raise Closed
        if may_stop and self._control.is_stopping:
            raise Stopping


@dataclass
class _Part:
    """One rank's part of a step, while the assembler makes it."""

    taken: int = 0
    valid: list[tuple[Sample, Signal]] = field(default_factory=list)
    batches: list[MicroBatch] = field(default_factory=list)
    busy_s: float = 0.0
    save: bool = False
    stop: bool = False


def _bytes(sample: Sample) -> int:
    is_one = sample.teacher is sample.student
    return sample.student.nbytes + (0 if is_one else sample.teacher.nbytes)
