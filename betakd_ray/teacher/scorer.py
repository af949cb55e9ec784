"""One teacher: a frozen model that scores groups of samples. A plain class; the pool runs it as an actor.

Several groups are in hand at a time, each in its own thread. While one is computed, the next is copied to the device,
and the answer of the previous one is copied to the host and pickled. Only the computation is serialised.
"""

import hashlib
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from betakd_ray.batch.inputs import ModelInputs, Pairs, TensorInputs, used_by
from betakd_ray.batch.normalization import Normalization
from betakd_ray.models.device import find_devices
from betakd_ray.models.load import load_model, load_processor
from betakd_ray.models.vlm import attention_heads, freeze, hidden_rows, lm_head, with_attention_weights
from betakd_ray.objective import segment_mean
from betakd_ray.plugins import load_class
from betakd_ray.spec import TeacherSpec
from betakd_ray.spec.base import is_plugin
from betakd_ray.teacher.answers import GroupAnswer, to_wire
from betakd_ray.teacher.parts import PARTS, Forward, Needs, TeacherFacts

QUIET_POLL_S = 0.1
"""Seconds between two checks of whether the teacher is idle."""


class TeacherScorer:
    """Teacher model on the devices of this process; split over all GPUs if there are several (`models.split`).

    Raises ModelError if the model cannot be loaded. Every method may be called from any thread.
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
        self.processor = load_processor(spec)
        self.normalize = Normalization.of(getattr(self.processor, "image_processor", None))
        self.lm_head: Tensor = lm_head(self.model).weight
        # A teacher split over n GPUs is a pipeline of layers, so n groups can be computed at once, each on its GPU.
        self._permits = threading.Semaphore(len(devices))
        self._work = Work()
        self._local = threading.local()
        self._head_lock = threading.Lock()
        self._head_reference: Any = None

    def facts(self) -> TeacherFacts:
        """Return the facts that each student fetches once."""
        return TeacherFacts(
            width=self.lm_head.shape[1],
            heads=attention_heads(self.model),
            dtype=str(self.lm_head.dtype).removeprefix("torch."),
            fingerprint=_fingerprint(self.model) if self.is_cached else "",
            top_k_vocab=self.needs.vocab,
        )

    def head(self) -> NDArray[Any] | None:
        """Return the lm_head's weight [V_t, H_t] in wire format; None if no hidden states are asked for."""
        return to_wire(self.lm_head) if "hidden" in self.needs else None

    def head_reference(self) -> list[Any]:
        """Return [reference to the head in Ray's object store]. It is stored once and copied to each node once."""
        import ray  # imported here because everything else in this module runs without Ray

        with self._head_lock:
            if self._head_reference is None:
                self._head_reference = ray.put(self.head())
        return [self._head_reference]  # in a list, because Ray replaces a bare reference by its value

    def apply(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(self, *arguments)`: a check that has to run where the model is."""
        return function(self, *arguments)

    def health(self) -> float:
        """Return the seconds that the teacher has computed its present group; 0.0 while it computes none.

        The time in which a group waits for its turn or is copied does not count.
        """
        return self._work.seconds()

    def drain(self, quiet_s: float) -> None:
        """Block until no group has been in hand for `quiet_s` seconds. By then all students know that it leaves."""
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < quiet_s:
            if self._work.in_hand:
                quiet_since = time.monotonic()
            time.sleep(min(QUIET_POLL_S, quiet_s))

    def score(self, inputs: ModelInputs) -> GroupAnswer:
        """Run the teacher on a group of samples and return the parts that the job needs."""
        try:
            with self._work.taken():
                return self._score(inputs)
        except RuntimeError:
            # After some errors the GPU cannot be used any more. The pool keeps a teacher that raises, so exit here.
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
        # The permit is released before this group is done, so that the next group's kernels queue behind its kernels.
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
        """Copy a group to the device; return its inputs, its pairs, and a CUDA event that marks the end of the copy.

        On a GPU the copy overlaps with the computation of another group. The event is None on other devices.
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
        """Copy a computed answer to the host; from a GPU all parts at once, to pinned memory."""
        if self.device.type != "cuda":
            return is_finite, values
        # The caller has waited for the computation on the host, so this stream needs no event to wait for.
        stream = self._copies()
        with torch.cuda.stream(stream):
            copied = {name: _to_pinned(value, stream) for name, value in {**values, "": is_finite}.items()}
        stream.synchronize()
        return copied.pop(""), copied

    def _copies(self) -> "torch.cuda.Stream":
        """Return the CUDA stream on which this thread copies."""
        # One stream for each thread: on a common stream, an answer would wait behind the copy of the next group.
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self.device)
        return self._local.stream


def answer(
    model: Any, needs: Needs, inputs: TensorInputs, pairs: Pairs | None, normalize: Normalization
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a teacher on a group of B samples.

    Returns [B] whether the output for each sample is finite, and the needed parts. The values of a sample that is not
    finite have no meaning; they do not influence the other samples.
    """
    hidden = hidden_rows(model, inputs, normalize, pairs=pairs, layer=needs.layer or None)
    forward = Forward(hidden, inputs, pairs, model.get_output_embeddings().weight, needs)
    is_finite = torch.ones(len(inputs.input_ids), dtype=torch.bool, device=inputs.input_ids.device)
    for part in PARTS.values():
        # Also parts that the job does not need: all other parts are computed from these.
        if not part.must_be_finite or (values := part.compute(forward)) is None:
            continue
        if part.axis == "row":
            is_finite &= _all_finite(values, inputs.row_sample, inputs.rows_per_sample)
        else:
            is_finite &= _all_finite(values, inputs.visual_sample, inputs.visual_per_sample) | ~inputs.has_image
    values = {name: PARTS[name].compute(forward) for name in PARTS if name in needs}
    return is_finite, {name: value for name, value in values.items() if value is not None}


def _all_finite(values: Tensor, sample: Tensor, counts: Tensor) -> Tensor:
    """Return [B] whether all rows of each sample are finite; false for a sample without rows."""
    # The comparison with 1 is exact: float32 has every whole number up to 2**24, and n / n is 1.
    return segment_mean(values.isfinite().all(dim=1, keepdim=True).float(), sample, counts)[:, 0] == 1


def _to_pinned(tensor: Tensor, stream: "torch.cuda.Stream") -> Tensor:
    tensor = tensor.contiguous()
    tensor.record_stream(stream)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def engine_of(spec: TeacherSpec) -> type[TeacherScorer]:
    """Return the class that runs the teacher. Raises SpecError if the spec names none that can."""
    return load_class(spec.engine, TeacherScorer, "teacher.engine") if is_plugin(spec.engine) else TeacherScorer


class Work:
    """Counter of the groups that a teacher has in hand, and timer of the group that it computes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._computing = 0
        self._since = 0.0
        self.in_hand = 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Count a group as in hand during the block."""
        with self._lock:
            self.in_hand += 1
        try:
            yield
        finally:
            with self._lock:
                self.in_hand -= 1

    def begin(self) -> None:
        """Record that a group is being computed, or is queued on the device behind such a group."""
        with self._lock:
            if not self._computing:
                self._since = time.monotonic()
            self._computing += 1

    def end(self) -> float:
        """Record that a group is done; return the seconds since it began, or since the group before it was done."""
        with self._lock:
            now = time.monotonic()
            busy_s, self._since = now - self._since, now
            self._computing -= 1
            return busy_s

    def seconds(self) -> float:
        """Return the seconds that the present group has been computed; 0.0 without a group."""
        with self._lock:
            return time.monotonic() - self._since if self._computing else 0.0


def _fingerprint(model: Any) -> str:
    """Return a hash of a model: its configuration with quantisation, its code, and all its tensors.

    The code is included because it may come with the checkpoint. Of a tensor, name, dtype, shape and bytes are hashed.
    """
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
    except (OSError, TypeError, KeyError):  # a compiled module, or one without a file
        return module


def _plain(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor); a quantised tensor is replaced by the plain tensors that it consists of."""
    for name, tensor in tensors.items():
        if is_traceable_wrapper_subclass(tensor):
            inner, _ = tensor.__tensor_flatten__()
            yield from _plain({f"{name}.{part}": getattr(tensor, part) for part in inner})
        else:
            yield name, tensor
