"""Copy of micro-batches to the device ahead of their use, on a CUDA stream of its own.

On a GPU the copies run at the same time as the training's kernels. The training's stream waits for the copy of a
micro-batch; the host does not wait. On the CPU the same code runs, and there is nothing to copy.
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
from betakd_ray.teacher.answers import to_tensor
from betakd_ray.train.distiller import Selection, TeacherView
from betakd_ray.train.feed import POLL_S, Feed
from betakd_ray.train.micro_batches import MicroBatch, Step

AHEAD = 2
"""Number of micro-batches that may wait on the device."""


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch of B samples on the device."""

    inputs: TensorInputs
    teacher: TeacherView | None
    valid: Tensor
    """Bool [B]; false in a placeholder micro-batch of weight zero."""
    pairs: Pairs | None
    """Every pair (answer row, image token); None unless an energy compares attention."""


@dataclass(frozen=True)
class Loader:
    """Function object that turns a micro-batch into tensors on the device."""

    device: torch.device
    salient_tokens: int = 0
    """Number of image tokens per sample that `align_topk` compares; 0 without it."""
    compares_attention: bool = False

    def __call__(self, batch: MicroBatch) -> DeviceBatch:
        """Return the micro-batch on the device. The copies are queued on the current stream, from pinned memory."""
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
    """The steps of a feed, with their micro-batches on the device. Only one thread may consume them.

    It must use up a step's micro-batches before it asks for the next step.
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
        """Yield each step with its micro-batches. Raises the error that ended the feed."""
        while True:
            item = self._pop()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item, self._micro_batches(len(item.micro_batches))

    def take_stalls(self) -> dict[str, float]:
        """Return cause → seconds that the consumer waited for it since the last call."""
        stalls, self._stalls = self._stalls, {}
        return stalls

    def close(self) -> None:
        """End the feed's threads and the copying thread."""
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
                # The tensors were allocated on the copying stream. Without this, their memory could be reused for the
                # next copy while the training's stream still reads it.
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
        """Divide a wait among the feed's activities in that time; the rest of it counts as copying."""
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
            # Only a micro-batch, which is a tuple, needs memory of the device. After `close` nobody takes one, so
            # nothing may wait here: this thread must get to the feed, which then ends it.
            while isinstance(item, tuple) and self._batches >= AHEAD and not self._is_closed:
                self._changed.wait(timeout=POLL_S)
            self._batches += isinstance(item, tuple)
            self._queue.append(item)
            self._changed.notify_all()
