"""Micro-batches on their way to the device: copied ahead of their use, through a stream of their own.

On a GPU the copies run beside the training's kernels; the training's stream waits for a micro-batch's copy, and the
host waits for nothing. On the CPU there is nothing to copy, and the same code runs.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from betakd_ray.batch.inputs import ModelInputs, Pairs, TensorInputs, most_salient, to_device, used_by
from betakd_ray.teacher.parts import to_tensor
from betakd_ray.train.distiller import Selection, TeacherView
from betakd_ray.train.feed import POLL_S, Feed, MicroBatch, Step

AHEAD = 2
"""Micro-batches that wait on the device."""


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch of B samples on the device."""

    inputs: TensorInputs
    teacher: TeacherView | None
    valid: Tensor
    """[B] bool, false for a stand-in that takes no part."""
    pairs: Pairs | None
    """Every (answer row, image token); where an energy compares attention."""


@dataclass(frozen=True)
class Loader:
    """Makes tensors of a micro-batch."""

    device: torch.device
    salient_tokens: int = 0
    """Image tokens of a sample that `align_topk` compares; 0 without it."""
    compares_attention: bool = False

    def __call__(self, batch: MicroBatch) -> DeviceBatch:
        """Return the micro-batch on the device. Copies are queued on the current stream, from pinned memory."""
        inputs = batch.inputs
        parts = {name: to_tensor(array, self.device) for name, array in batch.signal.items()}
        salient = None
        if self.salient_tokens and "salience" in batch.signal:
            salient = self._selection(batch.signal["salience"], inputs)
        return DeviceBatch(
            TensorInputs.of(inputs, self.device),
            TeacherView(parts, salient) if parts else None,
            to_device(np.full(inputs.size, not batch.is_empty), self.device),
            Pairs.of(inputs, self.device) if self.compares_attention else None,
        )

    def _selection(self, salience: Any, inputs: ModelInputs) -> Selection:
        token = most_salient(salience, inputs, self.salient_tokens)
        sample = inputs.visual_sample[token]
        counts = np.bincount(sample, minlength=inputs.size)
        return Selection(*(to_device(array, self.device) for array in (token, sample, counts)))


class Prefetch:
    """The steps of a feed with their micro-batches on the device. For one consuming thread.

    A step's micro-batches are to be used up before the next step is asked for.
    """

    def __init__(self, feed: Feed, loader: Loader) -> None:
        self._feed, self._loader = feed, loader
        self._stream = torch.cuda.Stream() if loader.device.type == "cuda" else None
        self._changed = threading.Condition()
        self._queue: deque[Any] = deque()
        self._batches = 0
        self._is_closed = False
        self._stalls: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="feed-copier", daemon=True)
        self._thread.start()

    def steps(self) -> Iterator[tuple[Step, Iterator[DeviceBatch]]]:
        """Yield each step with its micro-batches. Raises what went wrong in the feed."""
        while True:
            item = self._pop()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item, self._micro_batches(len(item.micro_batches))

    def take_stalls(self) -> dict[str, float]:
        """Return the seconds that the consumer waited since the last call, by what it waited for."""
        stalls, self._stalls = self._stalls, {}
        return stalls

    def close(self) -> None:
        """End the feed's threads and this one's."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._feed.close()
        self._thread.join(timeout=5)

    def _micro_batches(self, count: int) -> Iterator[DeviceBatch]:
        for _ in range(count):
            item = self._pop()
            if isinstance(item, BaseException):
                raise item
            batch, copied = item
            if copied is not None:
                stream = torch.cuda.current_stream()
                stream.wait_event(copied)
                teacher = batch.teacher
                used_by(stream, batch.inputs, batch.pairs, batch.valid)
                if teacher:
                    used_by(stream, dict(teacher.parts), teacher.salient)
            yield batch

    def _pop(self) -> Any:
        begun = time.perf_counter()
        with self._changed:
            has_waited = not self._queue
            while not self._queue:
                self._changed.wait(timeout=POLL_S)
            item = self._queue.popleft()
            self._batches -= isinstance(item, tuple)
            self._changed.notify_all()
        if has_waited:
            self._note(begun, time.perf_counter())
        return item

    def _note(self, begun: float, ended: float) -> None:
        """Divide a wait among what the feed was doing meanwhile; the rest of it was copying."""
        causes = self._feed.activities.between(begun, ended)
        rest = ended - begun - sum(causes.values())
        for cause, seconds in {**causes, "copy": max(0.0, rest)}.items():
            self._stalls[cause] = self._stalls.get(cause, 0.0) + seconds

    def _run(self) -> None:
        try:
            while (step := self._feed.next_step()) is not None:
                self._push(step)
                for batch in step.micro_batches:
                    self._push(self._copied(batch))
            self._push(None)
        except BaseException as error:  # raised again in the consumer's thread
            self._push(error)

    def _copied(self, batch: MicroBatch) -> tuple[DeviceBatch, torch.cuda.Event | None]:
        if self._stream is None:
            return self._loader(batch), None
        with torch.cuda.stream(self._stream):
            made = self._loader(batch)
            event = torch.cuda.Event()
            event.record(self._stream)
        return made, event

    def _push(self, item: Any) -> None:
        with self._changed:
            while isinstance(item, tuple) and self._batches >= AHEAD and not self._is_closed:
                self._changed.wait(timeout=POLL_S)
            self._batches += isinstance(item, tuple)
            self._queue.append(item)
            self._changed.notify_all()
