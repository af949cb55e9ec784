"""A teacher on several GPUs: its placement, its equal results, and no operation with tensors of two GPUs."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from multiprocessing import get_context
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel
from transformers.integrations.accelerate import expand_device_map

from betakd_ray.batch.inputs import Pairs, TensorInputs
from betakd_ray.batch.normalization import Normalization
from betakd_ray.batch.packing import stack
from betakd_ray.data.render import Renderer
from betakd_ray.models.load import load_processor
from betakd_ray.models.split import device_bytes, device_map
from betakd_ray.models.vlm import freeze, hidden_rows, language_model, lm_head, with_attention_weights
from betakd_ray.spec import DataSpec, ModelSpec, TeacherSpec
from betakd_ray.teacher import scorer
from betakd_ray.teacher.parts import Needs
from betakd_ray.teacher.scorer import TeacherScorer
from tests.families import FAMILIES, HIDDEN, build
from tests.tiny import VOCAB, raw_sample, save_tiny, tiny_model
from tests.unit.test_families import sample

CPU = torch.device("cpu")
GPUS = [torch.device("cuda", number) for number in range(3)]


def test_layers_are_dealt_out_in_runs_of_about_as_many_bytes_and_the_rest_is_first() -> None:
    model = tiny_model(layers=24)
    names = {module: name for name, module in model.named_modules()}
    placed, held = device_map(model, GPUS), device_bytes(model, GPUS)
    runs = [placed[names[layer]].index for layer in language_model(model).layers]
    assert runs == sorted(runs)
    assert set(runs) == {0, 1, 2}
    largest = max(sum(each.nbytes for each in layer.parameters()) for layer in language_model(model).layers)
    assert max(held.values()) - min(held.values()) <= 2 * largest
    assert sum(held.values()) == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    elsewhere = {name for name, device in placed.items() if device != GPUS[0]}
    assert all(".layers." in name for name in elsewhere)


@pytest.mark.parametrize(
    "needs",
    [
        Needs(frozenset({"hidden", "visual", "teacher_vision", "teacher_answer", "teacher_entropy"})),
        Needs(frozenset({"attention", "salience"})),
        Needs(frozenset({"top_ids", "top_log_probs"}), top_k=4, vocab=VOCAB),
        Needs(frozenset({"visual_layer"}), layer=3),
    ],
    ids=lambda needs: needs.tag,
)
def test_a_teacher_in_parts_says_what_it_says_in_one(tmp_path, monkeypatch, needs) -> None:
    spec = TeacherSpec(path=save_tiny(tmp_path, layers=4))
    renderer = Renderer(load_processor(ModelSpec(path=spec.path)), DataSpec(train=("unused",)))
    samples = [renderer.render(raw_sample(number, "It is so.", has_image=number != 1)) for number in range(3)]
    inputs = stack(samples, renderer.pad_token_id, renderer.image_token_id)
    whole = TeacherScorer(spec, needs)
    # To accelerate the CPU and its number 0 are two devices; they are one memory, so no weight has to move.
    monkeypatch.setattr(scorer, "find_devices", lambda: [CPU, torch.device("cpu", 0)])
    with mock.patch("accelerate.hooks.set_module_tensor_to_device"):
        parts = TeacherScorer(spec, needs)
    assert set(parts.model.hf_device_map.values()) == {CPU, torch.device("cpu", 0)}
    assert all(hasattr(layer, "_hf_hook") for layer in language_model(parts.model).layers)
    one, other = whole.score(inputs), parts.score(inputs)
    assert one.arrays.keys() == other.arrays.keys() == needs.parts
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])
    if "hidden" in needs:
        head, expected = (each.head() for each in (parts, whole))
        assert head is not None
        np.testing.assert_array_equal(head, expected)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    """Yield a separate process, because it registers a device type with three devices, which no other test may see."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_setup_privateuseone_for_python_backend) as pool:
        yield pool


@pytest.mark.parametrize("name", FAMILIES)
def test_no_operation_of_a_language_model_has_tensors_of_two_gpus(name, elsewhere: ProcessPoolExecutor) -> None:
    """Fake tensors have a device but no data, and an operation on tensors of two devices fails."""
    weights, outputs = elsewhere.submit(_language_model, name).result()
    assert weights >= {0, 2}
    assert outputs == {0}


@pytest.mark.parametrize("name", ["llava", "internvl"])  # others ask for data: the grid of an image, its padding
def test_nor_does_the_way_from_pixels_to_answer_rows(name, elsewhere: ProcessPoolExecutor) -> None:
    weights, outputs = elsewhere.submit(_whole_model, name).result()
    assert weights >= {0, 2}
    assert outputs == {0}


Devices = tuple[set[int | None], set[int | None]]
"""Indices of the devices that have weights, and of those that have the outputs."""


def _language_model(name: str) -> Devices:
    with _split(build(FAMILIES[name].config())) as (model, moved), torch.inference_mode():
        embedded = moved(torch.zeros(2, 5, HIDDEN))
        mask = moved(torch.ones(2, 5, dtype=torch.long))
        output = language_model(model)(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
        return _devices(model, output.last_hidden_state)


def _whole_model(name: str) -> Devices:
    family = FAMILIES[name]
    prompt = "" if family.template != "chat" else None
    data = {"train": "unused", "template": family.template, "system_prompt": prompt, "pad_to_square": False}
    renderer = Renderer(family.processor(), DataSpec.model_validate(data))
    samples = [renderer.render(sample(each)) for each in ("one", "text", "several turns")]
    inputs = stack(samples, renderer.pad_token_id, renderer.image_token_id)
    with _split(build(family.config())) as (model, moved), torch.inference_mode():
        tensors, pairs = (
            type(held)(**{each.name: tree_map(moved, getattr(held, each.name)) for each in fields(held)})
            for held in (TensorInputs.of(inputs, CPU), Pairs.of(inputs, CPU))
        )
        hidden = hidden_rows(model, tensors, Normalization.of(renderer.image_processor), pairs=pairs)
        assert hidden.visual is not None
        assert hidden.attention is not None
        return _devices(model, hidden.rows, hidden.visual, hidden.attention)


def _devices(model: PreTrainedModel, *outputs: Tensor) -> Devices:
    held = {each.device.index for each in model.parameters()}
    return held, {each.device.index for each in (*outputs, lm_head(model).weight)}


@contextmanager
def _split(model: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, Callable[..., Any]]]:
    """Yield a model split over three devices, with fake tensors, and a function that moves tensors to the first one."""
    gpus = [torch.device("privateuseone", number) for number in range(3)]
    with_attention_weights(freeze(model))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def moved(value: Any, device: torch.device = gpus[0]) -> Any:
            return mode.from_tensor(value).to(device) if isinstance(value, Tensor) else value

        places = device_map(model, gpus)
        _put(model, places, moved)
        with mock.patch("accelerate.hooks.set_module_tensor_to_device"):  # all is where it belongs
            dispatch_model(model, places, skip_keys=model._skip_keys_device_placement)
        made = torch.tensor  # which asks a backend that is not there
        with (
            mock.patch("torch.tensor", lambda values, device=CPU, **options: moved(made(values, **options), device)),
            mock.patch.dict("os.environ", {"TRANSFORMERS_DISABLE_TORCH_CHECK": "1"}),
        ):
            yield model, moved


def _put(model: PreTrainedModel, places: dict[str, torch.device], moved: Callable[..., Any]) -> None:
    """Replace the weights by fake tensors, each on its device, as after loading."""
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, device in expand_device_map(places, list(held)).items():
        module, _, leaf = name.rpartition(".")
        owner, there = model.get_submodule(module), moved(held[name].detach(), device)
        if leaf in owner._parameters:
            owner._parameters[leaf] = torch.nn.Parameter(there, requires_grad=False)
        else:
            owner._buffers[leaf] = there
