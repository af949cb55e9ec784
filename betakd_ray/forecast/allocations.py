"""Bytes that a model would allocate, counted on tensors without data."""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from betakd_ray.batch.inputs import ModelInputs, TensorInputs


class AllocationCounter(TorchDispatchMode):
    """Counter of the bytes of tensors that operations make: those alive now, and their peak."""

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
            # By storage: a view has that of its base, and takes no memory.
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
        """Count gradients apart from other tensors. Unless `stays`, drop each one as soon as it is made."""

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
    """Return whether an operation takes or makes ids, masks or grids.

    These need real data, because a model may read them, e.g. to count image tokens.
    """
    if inputs := _tensors_in((args, kwargs)):
        return not any(isinstance(each, FakeTensor) or _is_number(each) for each in inputs)
    # No tensor goes in, as for arange: only the result says of which kind it is.
    return not any(map(_is_number, _tensors_in(func(*args, **kwargs))))


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def counted_allocations() -> Iterator[AllocationCounter]:
    """Make floating-point tensors of the block fake, so that they have no data. The tally counts their full size."""
    # Not transformers' no_init_weights(): it would not tie weights either, so tied weights would be counted twice.
    unset = patch.object(PreTrainedModel, "initialize_weights", lambda _: None)
    # allow_non_fake_inputs: ids, masks and grids are real (`_has_data`), and meet fake tensors in one operation.
    with _unchecked(), unset, FakeTensorMode(allow_non_fake_inputs=True), AllocationCounter() as tally:
        yield tally


@contextmanager
def _unchecked() -> Iterator[None]:
    """Switch off transformers' checks of tensor values, because fake tensors have no values."""
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


def host_tensors(inputs: ModelInputs) -> TensorInputs:
    return TensorInputs.of(inputs, torch.device("cpu"))
