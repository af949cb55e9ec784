"""What a student worker trains on, prepared by threads of its own, at least one whole step ahead of the training.

    rows ──► reader ──► samples, their signals on the way ──► assembler ──► steps ──► (copier, `prefetch`) ──► training
             thread     as many as the measured rates ask for  thread

The reader takes rows in the order in which they arrive and asks for their signals (`teacher.signals`). The assembler
takes this rank's share of the next step, waits for its signals, cuts it into micro-batches and agrees with the other
ranks' assemblers (`agreement`). So no collective of the training waits for a teacher or for data, and what forms a step
depends on the order of the rows alone: never on who was faster.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from betakd_ray.batch.images import PIXELS
from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.packing import cut, stack
from betakd_ray.batch.sample import Rendering, Sample
from betakd_ray.errors import TeacherError
from betakd_ray.teacher.parts import Needs, Signal, TeacherFacts, empty_signal, join
from betakd_ray.teacher.signals import Pending, SignalSource
from betakd_ray.train.agreement import STOP, TAKEN, Gather, Proposal, StepCounts, TokenCounts, allot, shares

HELD_BYTES = 2 << 30
"""Limit in bytes of the samples that are read ahead, beyond the one step that there must be."""
RECENT_STEPS = 9
"""Steps over which the rate of the training is taken."""
POLL_S = 0.5
"""How often a thread that waits looks whether the job is to stop."""


@dataclass(frozen=True)
class MicroBatch:
    """Some samples of a step, as arrays on the host."""

    inputs: ModelInputs
    signal: dict[str, NDArray[Any]]
    """Part → array over the samples' places (`teacher.parts`); empty without a teacher."""
    is_empty: bool = False
    """A stand-in that takes no part, for a rank that has fewer micro-batches than another."""


@dataclass(frozen=True)
class Step:
    """One rank's part of a global batch."""

    number: int
    """Counted from 1."""
    counts: StepCounts
    micro_batches: Sequence[MicroBatch]
    samples: Sequence[Sample]
    """Samples that take part."""
    teacher_busy_s: float = 0.0
    """Seconds that teachers computed for them."""


class Refused(NamedTuple):
    """A sample that its teacher has no answer to."""

    sample: Sample
    reason: str


@dataclass(frozen=True)
class Collator:
    """Cuts a rank's share of a step into micro-batches, and makes arrays of each."""

    pad_token_id: int
    image_token_id: int
    needs: Needs
    facts: TeacherFacts | None
    """None without a teacher."""
    max_samples: int | None = None
    max_tokens: int | None = None

    def micro_batches(self, samples: Sequence[tuple[Sample, Signal]]) -> list[MicroBatch]:
        """Return the samples in batches of like lengths, the longest first."""
        lengths = [len(sample.student.input_ids) for sample, _ in samples]
        batches = cut(lengths, self.max_samples, self.max_tokens)
        return [self._batch([samples[at] for at in batch]) for batch in batches]

    def empty(self) -> MicroBatch:
        """Return a micro-batch of one text-only sample with one answer token."""
        blank = Rendering(np.zeros(2, np.int32), np.array([False, True]))
        signal = empty_signal(self.needs, self.facts, rows=1, tokens=0) if self.facts else {}
        return replace(self._made([blank], [signal]), is_empty=True)

    def _batch(self, samples: Sequence[tuple[Sample, Signal]]) -> MicroBatch:
        return self._made([sample.student for sample, _ in samples], [signal for _, signal in samples])

    def _made(self, views: Sequence[Rendering], signals: Sequence[Signal]) -> MicroBatch:
        inputs = stack(views, self.pad_token_id, self.image_token_id)
        return MicroBatch(inputs, join(signals, inputs, self.needs) if self.facts else {})


@runtime_checkable
class Control(Protocol):
    """What the cluster and the driver ask of the job, as this rank knows it."""

    @property
    def is_stopping(self) -> bool: ...

    def wants_checkpoint(self) -> bool:
        """Return whether a checkpoint is asked for that was not asked for before."""
        ...


class Activities:
    """What a thread did when, so that another that waited for it can say what it waited for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._past: deque[tuple[str, float, float]] = deque(maxlen=1000)
        self._present: tuple[str, float] | None = None

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Note that this is done until the block ends."""
        with self._lock:
            self._present = (what, time.perf_counter())
        try:
            yield
        finally:
            with self._lock:
                assert self._present is not None
                self._past.append((*self._present, time.perf_counter()))
                self._present = None

    @property
    def present(self) -> str:
        """Return what is being done now; empty if nothing is."""
        with self._lock:
            return self._present[0] if self._present else ""

    def between(self, start: float, end: float) -> dict[str, float]:
        """Return the seconds of each activity within an interval of `perf_counter`."""
        with self._lock:
            spans = [*self._past, *([(*self._present, end)] if self._present else [])]
        found: dict[str, float] = {}
        for what, begun, ended in spans:
            overlap = min(end, ended) - max(start, begun)
            if overlap > 0:
                found[what] = found.get(what, 0.0) + overlap
        return found


class Closed(Exception):
    """The feed was closed while a thread of it waited."""


class Stopping(Exception):
    """The job is to stop, and a step that waits for something is given up."""


@dataclass
class _Ahead:
    """Samples that are read and not yet part of a step."""

    pendings: deque[Pending] = field(default_factory=deque)
    bytes: int = 0
    has_ended: bool = False
    error: BaseException | None = None


class Feed:
    """One rank's steps, in order. `next_step` is for the one thread that consumes them; `close` ends the threads."""

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
        """`steps` are the numbers of the steps to make; `window_tokens` are kept with the teachers beyond one step.

        `on_refused` is told, from the assembler's thread, of samples that no teacher can answer; what it raises ends
        the feed. `activities` is where the assembler notes what it does; its own if none are given.
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
        """Whether the ranks agreed to stop before the last step."""
        self._changed = threading.Condition()
        self._ready: deque[Step | BaseException | None] = deque()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("feed-reader", self._read), ("feed-assembler", self._assemble))
        ]
        for thread in self._threads:
            thread.start()

    def next_step(self) -> Step | None:
        """Return the next step, waiting for it; None when there is no other. Raises what went wrong in a thread."""
        with self._changed:
            self._wait_for(lambda: bool(self._ready))
            step = self._ready[0]
            if isinstance(step, Step):  # the end stays, for whoever asks again
                self._ready.popleft()
                self._taken_at.append(time.perf_counter())
                self._changed.notify_all()
        if isinstance(step, BaseException):
            raise step
        return step

    def close(self) -> None:
        """End the threads; what they wait for is given up."""
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
        except BaseException as failure:  # raised again where the samples are waited for
            error = failure
        self._source.flush()  # what came before an error is asked for all the same: a step may wait for it
        with self._changed:
            self._ahead.has_ended, self._ahead.error = True, error
            self._changed.notify_all()

    def _has_room(self) -> bool:
        """Return whether the next sample is to be read. A group that is being filled must be: others wait for it."""
        count = len(self._ahead.pendings)
        if self._source.is_filling or count < max(self._wanted, self._largest_share):
            return True
        return count < self._target and self._ahead.bytes < HELD_BYTES

    @property
    def _largest_share(self) -> int:
        return -(-self._global_batch // self._ranks)

    @property
    def _target(self) -> int:
        """Samples to read ahead: a whole step, the window, and twice what the student uses up while a teacher answers.

        The last is measured. With less, the student would wait for every answer, however many teachers there are.
        Twice, so that a student whose rate was bounded by what is in flight gets more of it, until it is bounded by
        its own work or by the teachers.
        """
        during_an_answer = 2 * self._rate * self._source.latency_s
        window = self._window_tokens / max(self._mean_tokens, 1.0)
        return self._largest_share + int(window + during_an_answer)

    @property
    def _rate(self) -> float:
        """Samples that are used up a second: over several steps, as steps behind a slow teacher come in bursts."""
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
        """Collective of the feeds: make one step; None if the stream is over or the job is to stop."""
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
        if missing:
            # Some rank's rows have ended. The others fill the step with what they have left.
            everyone = self._complete(part, missing)
        if everyone is None:
            return None
        counts = StepCounts.of(everyone)
        if not counts.samples:
            raise TeacherError(
                "the teacher's answers are not finite for any sample of a global batch. In float16 it may overflow: "
                "set teacher.dtype to bfloat16 or float32"
            )
        empties = [self._collator.empty()] * (counts.micro_batches - len(part.batches))
        samples = [sample for sample, _ in part.valid]
        return Step(number, counts, [*part.batches, *empties], samples, part.busy_s)

    def _complete(self, part: "_Part", missing: int) -> NDArray[np.float64] | None:
        """Collective of the feeds: take more samples than the share, as far as ranks have any; None if too few."""
        try:
            spare = self._count_ahead(missing)
        except Stopping:
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
        """Take up to so many samples, wait for their signals and cut all that the part has. Raises Stopping."""
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
        """Return the next samples; fewer at the end of the stream. Raises Stopping."""
        self._count_ahead(count)
        with self._changed:
            ahead = self._ahead
            taken = [ahead.pendings.popleft() for _ in range(min(count, len(ahead.pendings)))]
            ahead.bytes -= sum(_bytes(pending.sample) for pending in taken)
            self._changed.notify_all()
        return taken

    def _count_ahead(self, wanted: int) -> int:
        """Return how many samples there are, up to `wanted`, once that is certain. Raises Stopping, or the reader's."""
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
                if pending.said.done():  # a TimeoutError of its own
                    raise
                self._look(may_stop=True)

    def _propose(self, part: "_Part") -> NDArray[np.float64] | None:
        """Collective of the feeds: say what this rank's part is; return every rank's, None if any asks to stop."""
        inputs = [batch.inputs for batch in part.batches]
        part.save = self._control.wants_checkpoint() or part.save
        return self._exchange(
            Proposal(
                taken=part.taken,
                valid=len(part.valid),
                micro_batches=len(inputs),
                squares=sum(int((each.attention_mask.sum(axis=1) ** 2).sum()) for each in inputs),
                pixels=sum(each.images[PIXELS].size for each in inputs if each.images),
                tokens=sum(map(_tokens, inputs), TokenCounts()),
                save=part.save,
                stop=part.stop or self._control.is_stopping,
            )
        )

    def _exchange(self, proposal: Proposal) -> NDArray[np.float64] | None:
        with self.activities.doing("agree"):
            everyone = self._gather(proposal.vector())
        self.was_stopped = bool(everyone[:, STOP].any())
        return None if self.was_stopped else everyone

    # ---------------------------------------------------------------------------------------------- waiting

    def _wait_for(self, condition: Callable[[], bool], *, may_stop: bool = False) -> None:
        """Wait, with the lock held, until something holds. Raises Closed, and Stopping where the wait `may_stop`."""
        while not condition():
            self._look(may_stop=may_stop)
            self._changed.wait(timeout=POLL_S)

    def _look(self, *, may_stop: bool) -> None:
        if self._is_closed:
            raise Closed
        if may_stop and self._control.is_stopping:
            raise Stopping


@dataclass
class _Part:
    """One rank's part of a step, while it is made."""

    taken: int = 0
    valid: list[tuple[Sample, Signal]] = field(default_factory=list)
    batches: list[MicroBatch] = field(default_factory=list)
    busy_s: float = 0.0
    save: bool = False
    stop: bool = False


def _bytes(sample: Sample) -> int:
    is_one = sample.teacher is sample.student
    return sample.student.nbytes + (0 if is_one else sample.teacher.nbytes)


def _tokens(inputs: ModelInputs) -> TokenCounts:
    real, image, answer = int(inputs.attention_mask.sum()), len(inputs.visual_sample), len(inputs.targets)
    return TokenCounts(real - image - answer, image, answer, inputs.input_ids.size - real)
