"""One teacher: a frozen model that answers groups of samples. A plain class; the pool makes it an actor.

Several groups are in hand at a time, each in a thread of its own: while one is computed, the next is copied to the
device and the last one's answer is copied back and pickled. Only the computing takes turns.
"""

import hashlib
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from betakd_ray.batch.inputs import ModelInputs, Pairs, TensorInputs, used_by
from betakd_ray.models.device import find_devices
from betakd_ray.models.load import load_model, load_processor
from betakd_ray.models.vlm import (
    Normalization,
    attention_heads,
    freeze,
    hidden_rows,
    lm_head,
    with_attention_weights,
)
from betakd_ray.objective import segment_mean
from betakd_ray.spec import TeacherSpec
from betakd_ray.teacher.parts import PARTS, Forward, GroupAnswer, Needs, TeacherFacts, to_wire

QUIET_POLL_S = 0.1


class TeacherScorer:
    """Holds the teacher on this process's devices, over all GPUs if it has several (`models.split`).

    Raises ModelError if it cannot be loaded. Every method may be called from any thread.
    """

    def __init__(self, spec: TeacherSpec, needs: Needs) -> None:
        self.needs = needs
        self.is_cached = spec.cache is not None
        devices = find_devices()
        self.device = devices[0]
        dtype = spec.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype)
        self.model: Any = freeze(load_model(spec, dtype, devices))
        if needs.reads_attention:
            with_attention_weights(self.model)
        self.normalize = Normalization.of(getattr(load_processor(spec), "image_processor", None))
        self.lm_head: Tensor = lm_head(self.model).weight
        # A teacher over n GPUs has its layers in a row, so that n groups can be under way, each on another GPU.
        self._permits = threading.Semaphore(len(devices))
        self._work = Work()
        self._local = threading.local()
        self._head_lock = threading.Lock()
        self._head_reference: Any = None

    def facts(self) -> TeacherFacts:
        """Return what students fetch once."""
        return TeacherFacts(
            width=self.lm_head.shape[1],
            heads=attention_heads(self.model),
            dtype=str(self.lm_head.dtype).removeprefix("torch."),
            fingerprint=_fingerprint(self.model) if self.is_cached else "",
            top_k_vocab=self.needs.vocab,
        )

    def head(self) -> NDArray[Any] | None:
        """Return the lm_head's weight [V_t, H_t] as it travels; None where no hidden states are asked for."""
        return to_wire(self.lm_head) if "hidden" in self.needs else None

    def head_reference(self) -> list[Any]:
        """Return [the head in Ray's object store], put there once: it goes to each node once, and past no third one."""
        import ray  # only in an actor: all else here runs without it

        with self._head_lock:
            if self._head_reference is None:
                self._head_reference = ray.put(self.head())
        return [self._head_reference]  # in a list, or Ray would send what it refers to

    def health(self) -> float:
        """Return the seconds for which the teacher has worked on the group that it computes; 0.0 while there is none.

        What waits for its turn does not count, and neither does a group's way in and out.
        """
        return self._work.seconds()

    def drain(self, quiet_s: float) -> None:
        """Return once no group has been in hand for so long, by when every student has heard that it is leaving."""
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < quiet_s:
            if self._work.in_hand:
                quiet_since = time.monotonic()
            time.sleep(min(QUIET_POLL_S, quiet_s))

    def score(self, inputs: ModelInputs) -> GroupAnswer:
        """Return what the job needs of the teacher's forward on a group of samples."""
        try:
            with self._work.taken():
                return self._score(inputs)
        except RuntimeError:
            # After some errors a GPU answers no more. A process that raises is taken for well: this one ends, then.
            try:
                torch.ones(1, device=self.device).sum().item()
            except RuntimeError:
                os._exit(1)
            raise

    @torch.inference_mode()
    def _score(self, inputs: ModelInputs) -> GroupAnswer:
        tensors, pairs, copied = self._receive(inputs)
        with self._permits:
            self._work.begin()
            try:
                if copied is not None:
                    copied.wait()  # the device waits for the copy, and the host does not
                is_finite, values = answer(self.model, self.needs, tensors, pairs, self.normalize)
                computed = torch.cuda.current_stream(self.device).record_event() if copied is not None else None
            except BaseException:
                self._work.end()
                raise
        # The next group's kernels are queued from here on, behind this one's.
        if computed is not None:
            computed.synchronize()
        busy_s = self._work.end()
        is_finite, values = self._send(is_finite, values)
        return GroupAnswer(
            {name: to_wire(value) for name, value in values.items()},
            inputs.rows_per_sample,
            inputs.visual_per_sample,
            is_finite.numpy(),
            busy_s,
        )

    def _receive(self, inputs: ModelInputs) -> tuple[TensorInputs, Pairs | None, Any]:
        """Copy a group to the device.

        On a GPU that is done beside the computing of another, and a CUDA event says when it is finished; else None.
        """
        if self.device.type != "cuda":
            return *self._tensors(inputs), None
        stream, computing = self._copies(), torch.cuda.current_stream(self.device)
        with torch.cuda.stream(stream):
            tensors, pairs = self._tensors(inputs)
            used_by(computing, tensors, pairs)
            return tensors, pairs, stream.record_event()

    def _tensors(self, inputs: ModelInputs) -> tuple[TensorInputs, Pairs | None]:
        pairs = Pairs.of(inputs, self.device) if self.needs.reads_attention else None
        return TensorInputs.of(inputs, self.device), pairs

    def _send(self, is_finite: Tensor, values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Copy an answer that is computed to the host: from a GPU through pinned memory, all parts at once."""
        if self.device.type != "cuda":
            return is_finite, values
        stream = self._copies()
        with torch.cuda.stream(stream):
            copied = {name: _to_pinned(value, stream) for name, value in {**values, "": is_finite}.items()}
        stream.synchronize()
        return copied.pop(""), copied

    def _copies(self) -> "torch.cuda.Stream":
        """Return this thread's stream for copies."""
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self.device)
        return self._local.stream


def answer(
    model: Any, needs: Needs, inputs: TensorInputs, pairs: Pairs | None, normalize: Normalization
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a teacher on a group of B samples.

    Returns [B] whether what it said of a sample is finite, and the parts that are needed. What it said of other samples
    does not depend on one that is not finite, whose values mean nothing.
    """
    hidden = hidden_rows(model, inputs, normalize, pairs=pairs, layer=needs.layer or None)
    forward = Forward(hidden, inputs, pairs, model.get_output_embeddings().weight, needs)
    is_finite = torch.ones(len(inputs.input_ids), dtype=torch.bool, device=inputs.input_ids.device)
    for part in PARTS.values():
        if not part.must_be_finite or (values := part.compute(forward)) is None:
            continue
        if part.axis == "row":
            is_finite &= _all_finite(values, inputs.row_sample, inputs.rows_per_sample)
        else:
            is_finite &= _all_finite(values, inputs.visual_sample, inputs.visual_per_sample) | ~inputs.has_image
    values = {name: PARTS[name].compute(forward) for name in PARTS if name in needs}
    return is_finite, {name: value for name, value in values.items() if value is not None}


def _all_finite(values: Tensor, sample: Tensor, counts: Tensor) -> Tensor:
    """Return [B] whether every row of a sample is finite; false for a sample without rows."""
    return segment_mean(values.isfinite().all(dim=1, keepdim=True).float(), sample, counts)[:, 0] == 1


def _to_pinned(tensor: Tensor, stream: "torch.cuda.Stream") -> Tensor:
    tensor = tensor.contiguous()
    tensor.record_stream(stream)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class Work:
    """What a teacher has in hand, and for how long it has worked on what it computes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._computing = 0
        self._since = 0.0
        self.in_hand = 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Count a group as in hand."""
        with self._lock:
            self.in_hand += 1
        try:
            yield
        finally:
            with self._lock:
                self.in_hand -= 1

    def begin(self) -> None:
        """Note that a group is computed, or queued on the device behind others that are."""
        with self._lock:
            if not self._computing:
                self._since = time.monotonic()
            self._computing += 1

    def end(self) -> float:
        """Note that a group is done; return the seconds since it began, or since the one before it was done."""
        with self._lock:
            now = time.monotonic()
            busy_s, self._since = now - self._since, now
            self._computing -= 1
            return busy_s

    def seconds(self) -> float:
        """Return the seconds since the group that is computed began; 0.0 without one."""
        with self._lock:
            return time.monotonic() - self._since if self._computing else 0.0


def _fingerprint(model: Any) -> str:
    """A hash of the configuration, quantisation and all, of the code, which may have come with the checkpoint, and of
    names, dtypes and bytes of what the model holds."""
    config = model.config.to_dict()
    for of_this_copy in ("_name_or_path", "transformers_version"):
        config.pop(of_this_copy, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name in sorted({type(module).__module__ for module in model.modules()}):
        if not name.startswith("torch."):
            digest.update(_source(name).encode())
    for name, tensor in _plain(model.state_dict()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):  # compiled, or made on the spot
        return module


def _plain(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor), with the tensors that make up a quantised one in its place."""
    for name, tensor in tensors.items():
        if is_traceable_wrapper_subclass(tensor):
            inner, _ = tensor.__tensor_flatten__()
            yield from _plain({f"{name}.{part}": getattr(tensor, part) for part in inner})
        else:
            yield name, tensor
