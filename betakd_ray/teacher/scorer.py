"""One teacher: a frozen model that answers micro-batches. A plain class; the pool makes it an actor."""

import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from betakd_ray.batch.inputs import ModelInputs, Pairs, TensorInputs
from betakd_ray.energies import entropy
from betakd_ray.models.device import find_devices
from betakd_ray.models.load import load_model, load_processor
from betakd_ray.models.vlm import (
    Hidden,
    Normalization,
    attention_heads,
    freeze,
    hidden_rows,
    lm_head,
    with_attention_weights,
)
from betakd_ray.objective import project, segment_mean, top_k
from betakd_ray.spec import Feature, TeacherSpec
from betakd_ray.teacher.signal import Needs, Signal, TeacherFacts, Wire

CHUNK_ROWS = 1024
"""Rows whose teacher logits exist at a time, for what is made of logits here."""


class TeacherScorer:
    """Holds the teacher on this process's devices, over all GPUs if it has several (`models.split`).

    Raises ModelError if it cannot be loaded.
    """

    def __init__(self, spec: TeacherSpec, needs: Needs) -> None:
        self.needs = needs
        self.is_cached = spec.cache is not None
        devices = find_devices()
        self.device = devices[0]
        dtype = spec.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype)
        self.model: Any = freeze(load_model(spec, dtype, devices))
        self.reads_attention = needs.attention or needs.salience
        if self.reads_attention:
            with_attention_weights(self.model)
        self.normalize = Normalization.of(getattr(load_processor(spec), "image_processor", None))
        self.head: Tensor = lm_head(self.model).weight

    def facts(self) -> TeacherFacts:
        """What students fetch once."""
        width = self.head.shape[1]
        sizes: dict[Feature, int] = {"teacher_vision": width, "teacher_answer": width, "teacher_entropy": 2}
        fingerprint = _fingerprint(self.model) if self.is_cached else ""
        head = Wire.of(self.head) if self.needs.hidden else None
        return TeacherFacts(
            head,
            visual_size=width,
            heads=attention_heads(self.model),
            feature_sizes=sizes,
            fingerprint=fingerprint,
            top_k_vocab=self.needs.vocab,
        )

    def score(self, inputs: ModelInputs) -> Signal:
        """The teacher's forward on one micro-batch, reduced to what the objective needs."""
        try:
            return self._score(inputs)
        except RuntimeError:
            # After some errors a GPU answers no more. A process that raises is taken for well: this one ends, then.
            try:
                torch.ones(1, device=self.device).sum().item()
            except RuntimeError:
                os._exit(1)
            raise

    @torch.inference_mode()
    def _score(self, inputs: ModelInputs) -> Signal:
        start = time.perf_counter()
        tensors = TensorInputs.of(inputs, self.device)
        pairs = Pairs.of(inputs, self.device) if self.reads_attention else None
        hidden = hidden_rows(self.model, tensors, self.normalize, pairs=pairs, layer=self.needs.visual_layer or None)
        valid = _finite(hidden.rows, tensors.row_sample, tensors.rows_per_sample)
        for features in (hidden.visual, hidden.visual_layer):
            if features is not None:
                valid &= _finite(features, tensors.visual_sample, tensors.visual_per_sample) | ~tensors.has_image
        hidden = _without(hidden, ~valid, tensors, pairs)
        top_ids, top_log_probs = self._top_k(hidden.rows) if self.needs.top_k else (None, None)
        return Signal(
            valid=valid.cpu().numpy(),
            hidden=Wire.of(hidden.rows) if self.needs.hidden else None,
            top_ids=top_ids,
            top_log_probs=top_log_probs,
            visual=Wire.of(hidden.visual) if self.needs.visual and hidden.visual is not None else None,
            visual_layer=Wire.of(hidden.visual_layer) if hidden.visual_layer is not None else None,
            attention=Wire.of(hidden.attention) if self.needs.attention and hidden.attention is not None else None,
            salience=Wire.of(_salience(hidden, pairs, tensors)) if self.needs.salience and pairs else None,
            features={name: self._feature(name, hidden, tensors) for name in self.needs.features},
            busy_s=time.perf_counter() - start,
        )

    def _feature(self, name: Feature, hidden: Hidden, inputs: TensorInputs) -> np.ndarray:
        """h(x): one vector a sample, float32."""
        if name == "teacher_entropy":
            feature = self._entropies(hidden, inputs)
        elif name == "teacher_answer":
            feature = segment_mean(hidden.rows.float(), inputs.row_sample, inputs.rows_per_sample)
        elif hidden.visual is None:
            feature = hidden.rows.new_zeros((len(inputs.input_ids), self.head.shape[1]), dtype=torch.float32)
        else:
            feature = segment_mean(hidden.visual.float(), inputs.visual_sample, inputs.visual_per_sample)
        return feature.cpu().numpy()

    def _top_k(self, rows: Tensor) -> tuple[Wire, Wire]:
        """[R, k] ids and [R, k + 1] log-probabilities, the last of all the rest."""
        ids, log_probs = [], []
        for chunk in rows.split(CHUNK_ROWS):
            top, at, rest = top_k(project(chunk, self.head)[:, : self.needs.vocab].log_softmax(1), self.needs.top_k)
            ids.append(at.int())
            log_probs.append(torch.cat([top, rest], dim=1))
        return Wire.of(torch.cat(ids)), Wire.of(torch.cat(log_probs))

    def _entropies(self, hidden: Hidden, inputs: TensorInputs) -> Tensor:
        """[B, 2] mean and maximum of H(p), in nats, over each sample's answer rows."""
        rows = torch.cat([entropy(project(chunk, self.head)) for chunk in hidden.rows.split(CHUNK_ROWS)])
        mean = segment_mean(rows[:, None], inputs.row_sample, inputs.rows_per_sample)
        top = rows.new_zeros(len(inputs.input_ids)).scatter_reduce(0, inputs.row_sample, rows, "amax")
        return torch.cat([mean, top[:, None]], dim=1)


def _finite(values: Tensor, sample: Tensor, counts: Tensor) -> Tensor:
    """[B] whether every row of a sample is finite; false for a sample without rows."""
    return segment_mean(values.isfinite().all(dim=1, keepdim=True).float(), sample, counts)[:, 0] == 1


def _without(hidden: Hidden, invalid: Tensor, inputs: TensorInputs, pairs: Pairs | None) -> Hidden:
    """Zero in place of what an invalid sample has: weights of zero cannot silence what is not finite."""

    def cleared(values: Tensor | None, sample: Tensor | None) -> Tensor | None:
        if values is None or sample is None:
            return values
        return values.masked_fill(invalid[sample][:, None], 0.0)

    rows = cleared(hidden.rows, inputs.row_sample)
    assert rows is not None
    visual, layer = (cleared(each, inputs.visual_sample) for each in (hidden.visual, hidden.visual_layer))
    return Hidden(rows, visual, layer, cleared(hidden.attention, pairs.sample if pairs else None))


def _salience(hidden: Hidden, pairs: Pairs, inputs: TensorInputs) -> Tensor:
    """[T] mean attention to each image token, over heads and the answer rows of its sample."""
    assert hidden.attention is not None
    received = torch.zeros(len(inputs.visual_sample), device=inputs.visual_sample.device)
    received.index_add_(0, pairs.token, hidden.attention.float().mean(dim=1))
    return received / inputs.rows_per_sample[inputs.visual_sample].clamp_min(1)


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
    """With those that a quantised tensor is made of in its place."""
    for name, tensor in tensors.items():
        if is_traceable_wrapper_subclass(tensor):
            inner, _ = tensor.__tensor_flatten__()
            yield from _plain({f"{name}.{part}": getattr(tensor, part) for part in inner})
        else:
            yield name, tensor
