"""What a job takes of a device's memory, known from configurations alone.

Weights, gradients, optimizer state and buffers follow from the parameters and from how DeepSpeed keeps them. What a
micro-batch takes does not follow from a formula that holds for every family: its forward and backward are run on fake
tensors, which have shapes and no data, and every storage they make is counted until it is freed. A model of any size is
so run in seconds, on no memory. Kernels are the CPU's: what a kernel takes for itself is not seen.
"""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from betakd_ray.batch.images import ImageProcessing
from betakd_ray.batch.inputs import ModelInputs, Pairs, TensorInputs, most_salient
from betakd_ray.models.load import model_skeleton
from betakd_ray.models.quantization import quantization
from betakd_ray.models.split import device_bytes
from betakd_ray.models.student import student_skeleton
from betakd_ray.models.vlm import Normalization, attention_heads, freeze, with_attention_weights
from betakd_ray.spec import AlignTopK, JobSpec, TeacherSpec
from betakd_ray.teacher.parts import PARTS, Needs, TeacherFacts, places
from betakd_ray.teacher.scorer import answer
from betakd_ray.train.distiller import ATTENTION, Distiller, Selection, TeacherView
from betakd_ray.train.optim import deepspeed_config

CPU = torch.device("cpu")
ADAM_BYTES = 8
"""Two float32 moments."""
MASTER_BYTES = 4


@dataclass(frozen=True)
class TeacherModel:
    """What can be said of a teacher before it is loaded."""

    parameters: int
    dtype: torch.dtype
    width: int
    vocab: int
    heads: int
    weights: int
    """Bytes."""
    largest_share: int
    """Bytes of weights on the teacher's fullest GPU."""
    working: int
    """Bytes that one group of samples takes at its peak."""
    quantization: str | None = None
    """How the weights will be packed: bytes are counted as if they were not."""

    @property
    def peak(self) -> int:
        """On one GPU, as if all of a group's were on the fullest."""
        return self.largest_share + self.working

    def facts(self, needs: Needs) -> TeacherFacts:
        """Return what such a teacher will tell its students, the fingerprint of its weights aside."""
        dtype = str(self.dtype).removeprefix("torch.")
        return TeacherFacts(self.width, self.heads, dtype, top_k_vocab=needs.vocab)


@dataclass(frozen=True)
class StudentMemory:
    """Bytes on one rank. While gradients are made, or while the optimizer steps: the larger of the two is the peak."""

    parameters: int
    trained: int
    """Parameters that learn, the maps from the teacher among them."""
    weights: int
    optimizer: int
    """Adam's moments, and DeepSpeed's float32 copy of the weights."""
    teacher_head: int
    """The copy of the teacher's lm_head."""
    gathered: int
    """ZeRO-3's gathered weights."""
    buckets: int
    """DeepSpeed's buffers for gradients on their way to other ranks: made when a backward begins, freed after it."""
    gradients: int
    """When a micro-batch is at its peak."""
    activations: int
    """What the forward keeps for the backward."""
    objective: int
    """What the forward takes beyond them at its peak: logits of one chunk, and the gradient that is made of them."""
    backward: int
    """What the backward takes beyond them at its peak, the buckets apart."""
    step: int
    """While the optimizer steps: gradients, and their float32 copy. Fused, Adam takes nothing for itself."""
    checkpoint: int
    """Bytes of a checkpoint, over all ranks: trained weights and optimizer state; frozen weights are not in it."""

    @property
    def peak(self) -> int:
        held = self.weights + self.optimizer + self.teacher_head
        micro_batch = self.gathered + self.gradients + self.activations
        micro_batch += max(self.objective, self.buckets + self.backward)
        return held + max(micro_batch, self.step)


def teacher_model(spec: TeacherSpec, needs: Needs, inputs: ModelInputs, processor: Any, gpus: int = 1) -> TeacherModel:
    """A teacher's sizes on so many GPUs, and what it takes to answer one group of samples. Raises ModelError."""
    with _fake() as tally:
        model: Any = freeze(model_skeleton(spec, "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype)))
        if needs.reads_attention:
            with_attention_weights(model)
        weights = tally.live
        tally.peak = weights
        with torch.inference_mode():
            pairs = Pairs.of(inputs, CPU) if needs.reads_attention else None
            normalize = Normalization.of(getattr(processor, "image_processor", None))
            answer(model, needs, _tensors(inputs), pairs, normalize)
        head = model.get_output_embeddings().weight
        return TeacherModel(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            dtype=head.dtype,
            width=head.shape[1],
            vocab=head.shape[0],
            heads=attention_heads(model),
            weights=weights,
            largest_share=max(device_bytes(model, [torch.device("cuda", number) for number in range(gpus)]).values()),
            working=tally.peak - weights,
            quantization=quantization(spec, model.config),
        )


def student_memory(
    spec: JobSpec, teacher: TeacherModel | None, needs: Needs, inputs: ModelInputs, processor: Any, ranks: int
) -> StudentMemory:
    """One rank's memory with `inputs` as its micro-batch. Raises ModelError."""
    dtype = torch.bfloat16 if spec.training.precision == "bf16" else torch.float32
    # An image processor needs data.
    blank = ImageProcessing(processor).blank() if getattr(processor, "image_processor", None) else None
    with _fake() as tally:
        student = student_skeleton(spec.student, dtype)
        if spec.training.gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        if ATTENTION in spec.objective.channels:
            with_attention_weights(student)
        facts = teacher.facts(needs) if teacher else None
        teacher_head = _head(teacher) if teacher and "hidden" in needs else None
        distiller = Distiller(student, processor, spec.objective, facts, teacher_head, blank).train()
        sizes = _sizes(distiller)
        working = _Working.of(distiller, spec, teacher, needs, inputs, tally)
    head = teacher.vocab * teacher.width * teacher.dtype.itemsize if teacher and "hidden" in needs else 0
    return replace(
        _held(spec, sizes, ranks),
        teacher_head=head,
        activations=working.activations,
        objective=working.forward - working.activations - working.gradients,
        backward=working.backward - working.activations - working.gradients,
        gradients=working.gradients or _held_gradients(spec, sizes, ranks, inputs),
    )


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a distiller's parameters, in elements."""

    trained: int
    frozen: int
    bytes: int
    """Bytes of an element."""


def _sizes(distiller: Distiller) -> _Sizes:
    learning = [parameter.numel() for parameter in distiller.parameters() if parameter.requires_grad]
    frozen = sum(parameter.numel() for parameter in distiller.parameters() if not parameter.requires_grad)
    return _Sizes(sum(learning), frozen, distiller.student.dtype.itemsize)


GRADIENT_BYTES = 4
"""Bytes of an element of the gradient's sum over micro-batches, in every precision."""


def _held(spec: JobSpec, sizes: _Sizes, ranks: int) -> StudentMemory:
    """Return what DeepSpeed keeps between micro-batches, and takes for a step (its runtime/, 0.19)."""
    stage, is_half = spec.training.zero_stage, spec.training.precision == "bf16"
    zero: dict[str, Any] = deepspeed_config(spec, ranks)["zero_optimization"]
    share = ranks if stage else 1
    every = sizes.trained + sizes.frozen
    weights, gathered = every * sizes.bytes, 0
    if stage == 3:
        weights = weights // ranks
        gathered = min(every, int(float(zero.get("stage3_max_live_parameters", 1e9)))) * sizes.bytes
    has_master = is_half or stage > 0
    part = sizes.trained // share
    buckets, copy = _buckets(stage, is_half, zero, sizes)
    gradients = part * GRADIENT_BYTES
    if stage == 1 and is_half:  # BF16_Optimizer has the whole sum on every rank, and a copy while it is reduced
        step = sizes.trained * GRADIENT_BYTES + copy
    elif stage == 3:
        group = int(float(zero.get("sub_group_size", 1e9)))
        step = gradients + buckets + max(copy, min(part, group) * GRADIENT_BYTES)
    else:
        step = gradients + buckets + copy
    is_early = sizes.trained > int(float(zero.get("reduce_bucket_size", 5e8)))
    return StudentMemory(
        parameters=every,
        trained=sizes.trained,
        weights=weights,
        optimizer=part * (ADAM_BYTES + (MASTER_BYTES if has_master else 0)),
        teacher_head=0,
        gathered=gathered,
        # The first bucket is full while most activations are still there, unless one bucket holds all gradients.
        buckets=buckets + (copy if is_early and stage > 1 else 0),
        gradients=0,
        activations=0,
        objective=0,
        backward=0,
        step=step,
        # Of ZeRO-3's weights, only the float32 copy is saved.
        checkpoint=sizes.trained * (ADAM_BYTES + (MASTER_BYTES if has_master else 0) + (stage < 3) * sizes.bytes),
    )


def _accumulates(spec: JobSpec, ranks: int, inputs: ModelInputs) -> bool:
    """Return whether a rank has more than one such micro-batch a step."""
    return spec.training.share(ranks) > inputs.size


def _buckets(stage: int, is_half: bool, zero: dict[str, Any], sizes: _Sizes) -> tuple[int, int]:
    """Return the bytes of the buffers for gradients on their way to other ranks, and of a full one's float32 copy."""
    elements = int(float(zero.get("reduce_bucket_size", 5e8)))
    full = min(elements, sizes.trained)
    if stage == 0 or not zero.get("contiguous_gradients", True):
        return 0, 0
    if stage == 1 and is_half:
        # DeepSpeed's engine joins what fits into 5e8 elements.
        return 0, sizes.trained * GRADIENT_BYTES if sizes.trained <= 5e8 else 0
    if stage == 3:
        return elements * GRADIENT_BYTES, full * GRADIENT_BYTES
    return elements * sizes.bytes * (1 + bool(zero.get("overlap_comm"))), full * GRADIENT_BYTES if is_half else 0


def _held_gradients(spec: JobSpec, sizes: _Sizes, ranks: int, inputs: ModelInputs) -> int:
    """Return the bytes of gradients that DeepSpeed, not the parameters, keeps while a micro-batch is at its peak."""
    stage, is_half = spec.training.zero_stage, spec.training.precision == "bf16"
    if stage == 1 and is_half:
        return sizes.trained * GRADIENT_BYTES
    if stage == 3:
        return sizes.trained * GRADIENT_BYTES // ranks
    return 0 if not _accumulates(spec, ranks, inputs) else sizes.trained * GRADIENT_BYTES // ranks


def _stay(spec: JobSpec) -> bool:
    """Return whether gradients add up at their parameters, and not in a buffer of DeepSpeed's."""
    return spec.training.zero_stage < 2 and spec.training.precision == "fp32"


@dataclass(frozen=True)
class _Working:
    """Bytes that a micro-batch takes."""

    activations: int
    forward: int
    """At the forward's peak."""
    backward: int
    """At the backward's."""
    gradients: int
    """At the higher of the two, of those that stay with their parameters."""

    @classmethod
    def of(
        cls,
        distiller: Distiller,
        spec: JobSpec,
        teacher: TeacherModel | None,
        needs: Needs,
        inputs: ModelInputs,
        tally: "Tally",
    ) -> "_Working":
        """One forward and backward; two where gradients add up."""
        stays = _stay(spec)
        tally.follow_gradients(distiller, stays)
        held = tally.live
        activations = 0

        def at_objective(*_: Any) -> None:
            nonlocal activations
            activations = max(activations, tally.live - held - tally.gradients)

        distiller.rows.register_forward_pre_hook(at_objective)
        forward = backward = gradients = 0
        ranks = spec.training.workers.min
        for _ in range(2 if stays and _accumulates(spec, ranks, inputs) else 1):
            tally.peak = tally.live
            loss = distiller(
                _tensors(inputs),
                _view(spec, teacher, needs, inputs),
                Pairs.of(inputs, CPU) if ATTENTION in spec.objective.channels else None,
                torch.ones(inputs.size, len(distiller.channels)),
                {},
            ).loss
            if tally.peak - held > max(forward, backward):
                gradients = tally.gradients_at_peak
            forward = max(forward, tally.peak - held)
            tally.peak = tally.live
            loss.backward()
            if tally.peak - held > max(forward, backward):
                gradients = tally.gradients_at_peak
            backward = max(backward, tally.peak - held)
        return cls(activations, forward, backward, gradients)


def _head(teacher: TeacherModel) -> Tensor:
    """Return one element that stands for all of the teacher's head: the real one has gigabytes."""
    return torch.zeros(1, 1, dtype=teacher.dtype).expand(teacher.vocab, teacher.width)


def _view(spec: JobSpec, teacher: TeacherModel | None, needs: Needs, inputs: ModelInputs) -> TeacherView | None:
    if teacher is None:
        return None
    facts, parts = teacher.facts(needs), dict[str, Tensor]()
    for name in needs.parts:
        count, dtype = int(places(name, inputs).sum()), PARTS[name].dtype or facts.dtype
        if count:
            parts[name] = torch.empty(count, *PARTS[name].shape(needs, facts), dtype=getattr(torch, dtype))
    salient = None
    if "salience" in needs:
        (energy,) = (energy for energy in spec.objective.energies if isinstance(energy, AlignTopK))
        token = most_salient(np.zeros(len(inputs.visual_sample)), inputs, energy.tokens)
        sample = inputs.visual_sample[token]
        salient = Selection(*map(torch.from_numpy, (token, sample, np.bincount(sample, minlength=inputs.size))))
    return TeacherView(parts, salient)


# ---------------------------------------------------------------------------------------------- counting


class Tally(TorchDispatchMode):
    """Bytes of the tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.gradients = self.gradients_at_peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with unset_fake_temporarily() if _has_data(func, args, kwargs) else nullcontext():
            result = func(*args, **kwargs)
        for tensor in _tensors_in(result):
            self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.live += size
        if self.live > self.peak:
            self.peak, self.gradients_at_peak = self.live, self.gradients
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.live -= size

    def follow_gradients(self, module: nn.Module, stays: bool) -> None:
        """Tell gradients from the rest; unless they stay, each is dropped as soon as it is there."""

        def made(parameter: Tensor) -> None:
            if not stays:
                parameter.grad = None
            elif parameter not in counted and parameter.grad is not None:
                counted.add(parameter)
                self.gradients += parameter.grad.nbytes

        counted: set[Tensor] = set()
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(made)


def _has_data(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation is on ids, masks or grids, or makes some: a model may ask how many image tokens they are."""
    if inputs := _tensors_in((args, kwargs)):
        return not any(isinstance(each, FakeTensor) or _is_number(each) for each in inputs)
    return not any(map(_is_number, _tensors_in(func(*args, **kwargs))))


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def _fake() -> Iterator[Tally]:
    """Tensors of numbers made in here have no data; the tally counts them as if they had."""
    # Not transformers' no_init_weights(), which would not tie weights either, and count them twice.
    unset = patch.object(PreTrainedModel, "initialize_weights", lambda _: None)
    with _unchecked(), unset, FakeTensorMode(allow_non_fake_inputs=True), Tally() as tally:
        yield tally


@contextmanager
def _unchecked() -> Iterator[None]:
    """Without transformers' checks of values, of which there are none."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _tensors(inputs: ModelInputs) -> TensorInputs:
    return TensorInputs.of(inputs, CPU)
