"""A micro-batch as one model sees it: as numpy arrays, which Ray sends without a copy, and as tensors on a device."""

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
    """[B, L] 1 on tokens, 0 on padding."""
    images: Images
    """Inputs of the vision tower for the images of all samples; empty if no sample has an image."""
    answer_rows: NDArray[np.int64]
    """[R] flat positions b·L + n of the tokens whose *next* token is an answer token."""
    row_sample: NDArray[np.int64]
    """[R] the sample that each answer row belongs to, ascending."""
    targets: NDArray[np.int64]
    """[R] the answer tokens, one for each answer row."""
    visual_sample: NDArray[np.int64]
    """[T] the sample that each image token belongs to, ascending."""
    visual_position: NDArray[np.int64]
    """[T] the position of each image token in its sample, 0 … L - 1."""

    @property
    def size(self) -> int:
        return self.input_ids.shape[0]

    @property
    def rows_per_sample(self) -> NDArray[np.int64]:
        """Return [B] the number of answer rows of each sample."""
        return np.bincount(self.row_sample, minlength=self.size)

    @property
    def visual_per_sample(self) -> NDArray[np.int64]:
        """Return [B] the number of image tokens of each sample."""
        return np.bincount(self.visual_sample, minlength=self.size)

    @property
    def visual_slot(self) -> NDArray[np.int64]:
        """Return [T] the flat place of each image token in a table of shape [B, most_visual]."""
        return self.visual_sample * self.most_visual + _within(self.visual_per_sample)

    @property
    def most_visual(self) -> int:
        """Return the largest number of image tokens that a sample has."""
        return int(self.visual_per_sample.max(initial=0))

    @property
    def has_image(self) -> NDArray[np.bool_]:
        """Return [B] whether each sample has an image."""
        return self.visual_per_sample > 0

    def blank(self) -> "ModelInputs":
        """Return a batch of the same shapes without content.

        Every token but the image tokens is token 0, and every image has one colour.
        """
        is_image = np.zeros_like(self.input_ids, dtype=bool)
        is_image[self.visual_sample, self.visual_position] = True
        images = dict(self.images)
        if images:
            # Zero pixels stay zero: they may be padding, and a model may count images by their padding.
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
    """[B, L], padded on the right."""
    attention_mask: Tensor
    """[B, L] 1 on tokens, 0 on padding."""
    images: dict[str, Tensor]
    """Inputs of the vision tower: [images, crops or patches of all samples, …]; empty if no sample has an image."""
    answer_rows: Tensor
    """[R] flat positions b·L + n of the tokens whose *next* token is an answer token."""
    row_sample: Tensor
    """[R] the sample that each answer row belongs to, ascending."""
    targets: Tensor
    """[R] the answer tokens, one for each answer row."""
    visual_sample: Tensor
    """[T] the sample that each image token belongs to, ascending."""
    visual_position: Tensor
    """[T] the position of each image token in its sample, 0 … L - 1."""
    rows_per_sample: Tensor
    """[B] the number of answer rows of each sample."""
    visual_per_sample: Tensor
    """[B] the number of image tokens of each sample."""
    visual_slot: Tensor
    """[T] the flat place of each image token in a table of shape [B, most_visual]."""
    most_visual: int
    """Largest number of image tokens that a sample has. A number on the host, so that no shape waits for the device."""
    has_image: Tensor
    """[B] whether each sample has an image."""

    @classmethod
    def of(cls, inputs: ModelInputs, device: torch.device) -> "TensorInputs":
        """Copy a micro-batch to `device`."""
        moved = {name: _moved(getattr(inputs, name), device) for name in cls.__dataclass_fields__}
        return cls(**moved)


def used_by(stream: "torch.cuda.Stream", *held: Any) -> None:
    """Tell torch that `stream` reads the tensors in these dataclasses and mappings, which another stream copied.

    Their memory belongs to the copying stream. Without this call that stream could reuse it before `stream` reads it.
    """
    for leaf in tree_leaves([vars(each) if is_dataclass(each) else each for each in held]):
        if isinstance(leaf, Tensor):
            leaf.record_stream(stream)


def most_salient(salience: NDArray[np.floating], inputs: ModelInputs, k: int) -> NDArray[np.int64]:
    """Return the indexes into T of each sample's k image tokens with the largest `salience` [T], sample by sample.

    A sample with fewer than k image tokens keeps all of them.
    """
    # lexsort is stable: image tokens of equal salience keep their order, so the choice is the same at every run.
    order = np.lexsort((-salience, inputs.visual_sample))
    return order[_within(inputs.visual_per_sample) < k]


def _within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers 0 … count - 1 for each count, concatenated: counts (2, 3) give 0 1 0 1 2."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


@dataclass(frozen=True)
class Pairs:
    """Every pair (answer row, image token) of the same sample, sample by sample. P pairs in all."""

    row: Tensor
    """[P] the index of each pair's row in the R answer rows."""
    token: Tensor
    """[P] the index of each pair's token in the T image tokens."""
    sample: Tensor
    """[P] the sample that each pair belongs to, ascending."""
    per_sample: Tensor
    """[B] the number of pairs of each sample."""

    @classmethod
    def of(cls, inputs: ModelInputs, device: torch.device) -> "Pairs":
        """Make the pairs of a micro-batch, on `device`."""
        # Each answer row is repeated once for each image token of its sample; the tokens start anew with each row.
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
    """Return a numpy array as a tensor on `device`.

    On a GPU the copy goes through pinned memory, so that it overlaps with compute. On the CPU the tensor is a view,
    also of the read-only memory of Ray's object store. That is safe because nothing in this package writes to inputs.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
