"""Estimate of the device memory that a job needs, in bytes, from configurations alone.

The sizes of weights, gradients, optimizer state and buffers follow from the number of parameters and from how DeepSpeed
keeps them. No formula gives the memory of a micro-batch for every model family. So its forward and backward are run on
fake tensors, which have shapes but no data, and every storage is counted until it is freed. In this way a model of any
size runs in seconds, without its memory. The kernels are the CPU's: the workspace of a GPU kernel is not counted.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from betakd_ray.batch.inputs import ModelInputs, Pairs, most_salient
from betakd_ray.batch.normalization import Normalization
from betakd_ray.batch.processing import ImageProcessing
from betakd_ray.engine.config import deepspeed_config
from betakd_ray.forecast.allocations import AllocationCounter, counted_allocations, host_tensors
from betakd_ray.models.load import model_skeleton
from betakd_ray.models.quantization import quantization
from betakd_ray.models.split import device_bytes
from betakd_ray.models.student import student_skeleton
from betakd_ray.models.vlm import attention_heads, freeze, with_attention_weights
from betakd_ray.spec import JobSpec, TeacherSpec
from betakd_ray.teacher.answers import places
from betakd_ray.teacher.parts import PARTS, Needs, TeacherFacts
from betakd_ray.teacher.scorer import answer
from betakd_ray.train.distiller import Distiller, Selection, TeacherView

CPU = torch.device("cpu")
ADAM_BYTES = 8
"""Bytes per parameter of Adam's two float32 moments."""
MASTER_BYTES = 4
"""Bytes per parameter of the float32 copy of the weights."""


@dataclass(frozen=True)
class TeacherModel:
    """Sizes of a teacher that are known before it is loaded."""

    parameters: int
    """Number of parameters."""
    dtype: torch.dtype
    width: int
    vocab: int
    heads: int
    weights: int
    """Bytes of all weights."""
    largest_share: int
    """Bytes of weights on the teacher's fullest GPU."""
    working: int
    """Bytes that one group of samples needs at its peak, in addition to the weights."""
    quantization: str | None = None
    """Quantization of the weights, if any. The bytes here are counted as if the weights were not quantized."""

    @property
    def peak(self) -> int:
        """Return the peak in bytes on the fullest GPU, as if it held all the memory of a group of samples."""
        return self.largest_share + self.working

    def facts(self, needs: Needs) -> TeacherFacts:
        """Return the facts that such a teacher will send to its students, without the fingerprint of its weights."""
        dtype = str(self.dtype).removeprefix("torch.")
        return TeacherFacts(self.width, self.heads, dtype, top_k_vocab=needs.vocab)


@dataclass(frozen=True)
class StudentMemory:
    """Memory on one rank, in bytes. The peak is either in a micro-batch or in the optimizer's step."""

    parameters: int
    """Number of parameters."""
    trained: int
    """Number of parameters that learn, including the maps from the teacher."""
    weights: int
    """Bytes of the weights."""
    optimizer: int
    """Bytes of Adam's moments, and of DeepSpeed's float32 copy of the weights."""
    teacher_head: int
    """Bytes of the copy of the teacher's lm_head."""
    gathered: int
    """Bytes of the weights that ZeRO-3 gathers."""
    buckets: int
    """Bytes of DeepSpeed's buffers for the reduction of gradients: made when a backward begins, freed after it."""
    gradients: int
    """Bytes of the gradients while a micro-batch is at its peak."""
    activations: int
    """Bytes that the forward keeps for the backward."""
    objective: int
    """Bytes that the forward needs beyond `activations` at its peak: the logits of one chunk, and their gradient."""
    backward: int
    """Bytes that the backward needs beyond `activations` at its peak, without the buckets."""
    step: int
    """Bytes for the optimizer's step: gradients, and their float32 copy. A fused Adam needs no memory of its own."""
    checkpoint: int
    """Bytes of a checkpoint over all ranks: trained weights and optimizer state. It has no frozen weights."""

    @property
    def peak(self) -> int:
        """Return the peak in bytes."""
        held = self.weights + self.optimizer + self.teacher_head
        micro_batch = self.gathered + self.gradients + self.activations
        micro_batch += max(self.objective, self.buckets + self.backward)
        return held + max(micro_batch, self.step)


def teacher_model(spec: TeacherSpec, needs: Needs, inputs: ModelInputs, processor: Any, gpus: int = 1) -> TeacherModel:
    """Return a teacher's sizes on `gpus` GPUs; `inputs` is one group of samples. Raises ModelError."""
    with counted_allocations() as allocations:
        model: Any = freeze(model_skeleton(spec, "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype)))
        if needs.reads_attention:
            with_attention_weights(model)
        weights = allocations.live
        # The construction may have had a higher peak. Only the forward pass counts from here.
        allocations.peak = weights
        with torch.inference_mode():
            pairs = Pairs.of(inputs, CPU) if needs.reads_attention else None
            normalize = Normalization.of(getattr(processor, "image_processor", None))
            answer(model, needs, host_tensors(inputs), pairs, normalize)
        head = model.get_output_embeddings().weight
        return TeacherModel(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            dtype=head.dtype,
            width=head.shape[1],
            vocab=head.shape[0],
            heads=attention_heads(model),
            weights=weights,
            largest_share=max(device_bytes(model, [torch.device("cuda", number) for number in range(gpus)]).values()),
            working=allocations.peak - weights,
            quantization=quantization(spec, model.config),
        )


def student_memory(
    spec: JobSpec, teacher: TeacherModel | None, needs: Needs, inputs: ModelInputs, processor: Any, ranks: int
) -> StudentMemory:
    """Return the memory of one of `ranks` ranks, with `inputs` as its micro-batch. Raises ModelError."""
    dtype = torch.bfloat16 if spec.training.precision == "bf16" else torch.float32
    # Made outside of `counted_allocations()`, because an image processor needs real data.
    blank = ImageProcessing(processor).blank() if getattr(processor, "image_processor", None) else None
    with counted_allocations() as allocations:
        student = student_skeleton(spec.student, dtype)
        if spec.training.gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        if spec.objective.compares_attention:
            with_attention_weights(student)
        facts = teacher.facts(needs) if teacher else None
        teacher_head = _head(teacher) if teacher and "hidden" in needs else None
        distiller = Distiller(student, processor, spec.objective, facts, teacher_head, blank).train()
        sizes = _sizes(distiller)
        working = _Working.of(distiller, spec, teacher, needs, inputs, allocations)
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
    """Numbers of a distiller's parameters."""

    trained: int
    frozen: int
    bytes: int
    """Bytes of one parameter."""


def _sizes(distiller: Distiller) -> _Sizes:
    learning = [parameter.numel() for parameter in distiller.parameters() if parameter.requires_grad]
    frozen = sum(parameter.numel() for parameter in distiller.parameters() if not parameter.requires_grad)
    return _Sizes(sum(learning), frozen, distiller.student.dtype.itemsize)


GRADIENT_BYTES = 4
"""Bytes per parameter of the gradient sum over micro-batches, which is float32 in every precision."""


def _held(spec: JobSpec, sizes: _Sizes, ranks: int) -> StudentMemory:
    """Return the memory that DeepSpeed keeps between micro-batches, and needs for a step (deepspeed/runtime, 0.19)."""
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
    if stage == 1 and is_half:  # BF16_Optimizer keeps the whole sum on every rank, and a copy while it is reduced
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
        # The first bucket is full while most activations are still alive, unless one bucket holds all gradients.
        buckets=buckets + (copy if is_early and stage > 1 else 0),
        gradients=0,
        activations=0,
        objective=0,
        backward=0,
        step=step,
        # With ZeRO-3 only the float32 copy of the weights is saved.
        checkpoint=sizes.trained * (ADAM_BYTES + (MASTER_BYTES if has_master else 0) + (stage < 3) * sizes.bytes),
    )


def _accumulates(spec: JobSpec, ranks: int, inputs: ModelInputs) -> bool:
    """Return whether a rank has more than one such micro-batch per step."""
    return spec.training.share(ranks) > inputs.size


def _buckets(stage: int, is_half: bool, zero: dict[str, Any], sizes: _Sizes) -> tuple[int, int]:
    """Return the bytes of the buffers for the reduction of gradients, and of the float32 copy of a full buffer."""
    elements = int(float(zero.get("reduce_bucket_size", 5e8)))
    full = min(elements, sizes.trained)
    if stage == 0 or not zero.get("contiguous_gradients", True):
        return 0, 0
    if stage == 1 and is_half:
        # DeepSpeed's engine copies gradients into one buffer if they have at most 5e8 elements.
        return 0, sizes.trained * GRADIENT_BYTES if sizes.trained <= 5e8 else 0
    if stage == 3:
        return elements * GRADIENT_BYTES, full * GRADIENT_BYTES
    return elements * sizes.bytes * (1 + bool(zero.get("overlap_comm"))), full * GRADIENT_BYTES if is_half else 0


def _held_gradients(spec: JobSpec, sizes: _Sizes, ranks: int, inputs: ModelInputs) -> int:
    """Return the bytes of gradients in DeepSpeed's buffers (not in `parameter.grad`) at a micro-batch's peak."""
    stage, is_half = spec.training.zero_stage, spec.training.precision == "bf16"
    if stage == 1 and is_half:
        return sizes.trained * GRADIENT_BYTES
    if stage == 3:
        return sizes.trained * GRADIENT_BYTES // ranks
    return 0 if not _accumulates(spec, ranks, inputs) else sizes.trained * GRADIENT_BYTES // ranks


def _stay(spec: JobSpec) -> bool:
    """Return whether gradients are summed in `parameter.grad`, and not in a buffer of DeepSpeed's."""
    return spec.training.zero_stage < 2 and spec.training.precision == "fp32"


@dataclass(frozen=True)
class _Working:
    """Bytes that a micro-batch needs."""

    activations: int
    """Bytes that the forward keeps for the backward."""
    forward: int
    """Bytes at the forward's peak."""
    backward: int
    """Bytes at the backward's peak."""
    gradients: int
    """Bytes in `parameter.grad` at the higher of the two peaks."""

    @classmethod
    def of(
        cls,
        distiller: Distiller,
        spec: JobSpec,
        teacher: TeacherModel | None,
        needs: Needs,
        inputs: ModelInputs,
        allocations: "AllocationCounter",
    ) -> "_Working":
        """Run one forward and backward, and measure them; two if gradients are summed in `parameter.grad`."""
        stays = _stay(spec)
        allocations.follow_gradients(distiller, stays)
        held = allocations.live
        activations = 0

        def at_objective(*_: Any) -> None:
            nonlocal activations
            activations = max(activations, allocations.live - held - allocations.gradients)

        # When the objective begins, nothing of the forward is alive but what it keeps for the backward.
        distiller.rows.register_forward_pre_hook(at_objective)
        forward = backward = gradients = 0
        ranks = spec.training.workers.min
        for _ in range(2 if stays and _accumulates(spec, ranks, inputs) else 1):
            allocations.peak = allocations.live
            loss = distiller(
                host_tensors(inputs),
                _view(spec, teacher, needs, inputs),
                Pairs.of(inputs, CPU) if spec.objective.compares_attention else None,
                torch.ones(inputs.size, len(distiller.channels)),
                {},
            ).loss
            if allocations.peak - held > max(forward, backward):
                gradients = allocations.gradients_at_peak
            forward = max(forward, allocations.peak - held)
            allocations.peak = allocations.live
            loss.backward()
            if allocations.peak - held > max(forward, backward):
                gradients = allocations.gradients_at_peak
            backward = max(backward, allocations.peak - held)
        return cls(activations, forward, backward, gradients)


def _head(teacher: TeacherModel) -> Tensor:
    """Return a head [vocab, width] that is one element, expanded: the real one may have gigabytes."""
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
        token = most_salient(np.zeros(len(inputs.visual_sample)), inputs, spec.objective.salient_tokens)
        sample = inputs.visual_sample[token]
        salient = Selection(*map(torch.from_numpy, (token, sample, np.bincount(sample, minlength=inputs.size))))
    return TeacherView(parts, salient)
