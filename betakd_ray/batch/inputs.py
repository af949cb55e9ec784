"""A micro-batch as one model sees it: as numpy arrays, which travel without a copy, and as tensors on a device."""

import warnings
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from betakd_ray.batch.images import PIXELS, Images


@dataclass(frozen=True)
class ModelInputs:
    """A micro-batch as one model sees it. B samples, L tokens, R answer rows, T image tokens."""

    input_ids: NDArray[np.int64]
    """[B, L], padded on the right."""
    attention_mask: NDArray[np.int64]
    """[B, L]"""
    images: Images
    """What the vision tower takes, of all samples; empty if none has an image."""
    answer_rows: NDArray[np.int64]
    """[R] flat positions b·L + n whose *next* token is an answer token."""
    row_sample: NDArray[np.int64]
    """[R] the sample each answer row belongs to, ascending."""
    targets: NDArray[np.int64]
    """[R] the answer tokens."""
    visual_sample: NDArray[np.int64]
    """[T] the sample each image token belongs to, ascending."""
    visual_position: NDArray[np.int64]
    """[T] where in its sample."""

    @property
    def size(self) -> int:
        return self.input_ids.shape[0]

    @property
    def rows_per_sample(self) -> NDArray[np.int64]:
        """[B]"""
        return np.bincount(self.row_sample, minlength=self.size)

    @property
    def visual_per_sample(self) -> NDArray[np.int64]:
        """[B]"""
        return np.bincount(self.visual_sample, minlength=self.size)

    @property
    def visual_slot(self) -> NDArray[np.int64]:
        """[T] places in a [B, most image tokens of a sample] table, flattened."""
        return self.visual_sample * self.most_visual + _within(self.visual_per_sample)

    @property
    def most_visual(self) -> int:
        """Image tokens of the sample that has most."""
        return int(self.visual_per_sample.max(initial=0))

    @property
    def has_image(self) -> NDArray[np.bool_]:
        """[B]"""
        return self.visual_per_sample > 0

    def blank(self) -> "ModelInputs":
        """The same shapes with nothing in them: one token throughout, image tokens aside, and images of one colour."""
        is_image = np.zeros_like(self.input_ids, dtype=bool)
        is_image[self.visual_sample, self.visual_position] = True
        images = dict(self.images)
        if images:
            # What is zero may be padding, by which a model counts images.
            images[PIXELS] = (images[PIXELS] != 0).astype(images[PIXELS].dtype)
        return replace(
            self,
            input_ids=np.where(is_image, self.input_ids, 0),
            images=images,
            targets=np.zeros_like(self.targets),
        )


@dataclass(frozen=True)
class TensorInputs:
    """`ModelInputs` on a device, field by field."""

    input_ids: Tensor
    attention_mask: Tensor
    images: dict[str, Tensor]
    answer_rows: Tensor
    row_sample: Tensor
    targets: Tensor
    visual_sample: Tensor
    visual_position: Tensor
    rows_per_sample: Tensor
    visual_per_sample: Tensor
    visual_slot: Tensor
    most_visual: int
    """On the host, as are all shapes: the device is never asked for one."""
    has_image: Tensor

    @classmethod
    def of(cls, inputs: ModelInputs, device: torch.device) -> "TensorInputs":
        """The same micro-batch on `device`."""
        moved = {name: _moved(getattr(inputs, name), device) for name in cls.__dataclass_fields__}
        return cls(**moved)


def used_by(stream: "torch.cuda.Stream", *held: Any) -> None:
    """Tell torch that `stream` reads the tensors of dataclasses and mappings that another stream's copies made.

    Their memory belongs to the copying stream, which would else use it again before it was read.
    """
    for leaf in tree_leaves([vars(each) if is_dataclass(each) else each for each in held]):
        if isinstance(leaf, Tensor):
            leaf.record_stream(stream)


def most_salient(salience: NDArray[np.floating], inputs: ModelInputs, k: int) -> NDArray[np.int64]:
    """The k image tokens of each sample that have most `salience` [T] (all, where a sample has fewer), by sample."""
    order = np.lexsort((-salience, inputs.visual_sample))
    return order[_within(inputs.visual_per_sample) < k]


def _within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, 2 … within each of several runs, of `counts` elements."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


@dataclass(frozen=True)
class Pairs:
    """Every (answer row, image token) of the same sample, sample by sample; P in all."""

    row: Tensor
    """[P] index into the R answer rows."""
    token: Tensor
    """[P] index into the T image tokens."""
    sample: Tensor
    """[P]"""
    per_sample: Tensor
    """[B]"""

    @classmethod
    def of(cls, inputs: ModelInputs, device: torch.device) -> "Pairs":
        """Make the pairs of a micro-batch, on `device`."""
        tokens = inputs.visual_per_sample
        of_each_row = tokens[inputs.row_sample]
        row = np.repeat(np.arange(len(of_each_row)), of_each_row)
        sample = inputs.row_sample[row]
        token = (np.cumsum(tokens) - tokens)[sample] + _within(of_each_row)
        per_sample = inputs.rows_per_sample * tokens
        return cls(*(to_device(array, device) for array in (row, token, sample, per_sample)))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: to_device(array, device) for name, array in value.items()}
    return to_device(value, device) if isinstance(value, np.ndarray) else value


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A numpy array as a tensor; through pinned memory where there is a GPU, so that the copy overlaps with compute.

    On the CPU it is a view, also of the read-only memory that Ray's object store gives: nothing here writes to inputs.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
