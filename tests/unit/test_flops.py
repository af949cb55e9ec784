"""The count of a step's operations equals a count by hand, and torch's count."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from betakd_ray.batch.images import PIXELS
from betakd_ray.batch.inputs import to_device
from betakd_ray.batch.normalization import Normalization
from betakd_ray.batch.processing import ImageProcessing
from betakd_ray.models.flops import Matrices, StudentFlops, peak_flops
from betakd_ray.models.vlm import part_parameters
from tests.tiny import IDS, IMAGE, IMAGE_TOKENS, VOCAB, tiny_model, tiny_processor

HIDDEN, LAYERS, VISION = 16, 2, 16
LENGTH, BATCH = 24, 2
# Llama: queries, keys, values and output; gate, up and down.
LANGUAGE = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * 2 * HIDDEN)
PROJECTOR = VISION * HIDDEN + HIDDEN * HIDDEN
HEAD = VOCAB * HIDDEN


def counted(*trained: str) -> tuple[Any, StudentFlops, dict[str, torch.Tensor]]:
    model = tiny_model().train()
    for part, parameters in part_parameters(model).items():
        for parameter in parameters:
            parameter.requires_grad_(part in trained)
    processor = tiny_processor()
    blank = {name: to_device(each, model.device) for name, each in ImageProcessing(processor).blank().items()}
    normalize = Normalization.of(processor.image_processor)
    return model, StudentFlops.of(model, normalize, blank), normalize.of_images(blank, model.dtype)


def by_hand(language_factor: int, head_factor: int, attention_factor: int) -> float:
    tokens = BATCH * LENGTH
    return (
        2 * tokens * LANGUAGE * language_factor
        + 2 * tokens * HEAD * head_factor
        + 4 * BATCH * LENGTH**2 * HIDDEN * LAYERS * attention_factor
    )


def test_weights_are_counted_as_a_hand_counts_them() -> None:
    _, flops, _ = counted("language_model", "projector")
    assert flops.language == Matrices(trained=LANGUAGE, frozen=0)
    assert flops.projector == Matrices(trained=PROJECTOR, frozen=0)
    assert flops.head == Matrices(trained=HEAD, frozen=0)
    assert not flops.tower_learns


@pytest.mark.parametrize(
    ("trained", "language", "head", "attention"),
    [
        (("language_model", "projector", "vision_tower"), 3, 3, 3),
        (("language_model",), 3, 3, 3),
        (("projector",), 2, 2, 3),  # gradients pass through, and none are of the weights
    ],
)
def test_a_step_on_text_takes_what_its_parts_take(
    trained: tuple[str, ...], language: int, head: int, attention: int
) -> None:
    _, flops, _ = counted(*trained)
    found = flops.step(BATCH * LENGTH, BATCH * LENGTH**2, BATCH * LENGTH, image_tokens=0, pixels=0)
    assert found == by_hand(language, head, attention)


@pytest.mark.parametrize("trained", [("language_model", "projector", "vision_tower"), ("language_model", "projector")])
def test_a_step_with_images_takes_what_torch_counts(trained: tuple[str, ...]) -> None:
    model, flops, images = counted(*trained)
    model.set_attn_implementation("eager")  # whose backward torch counts as what it is, not as a kernel that repeats
    pixels = images[PIXELS].repeat(BATCH, 1, 1, 1)
    ids = torch.full((BATCH, LENGTH), IDS[IMAGE] + 1)
    ids[:, 1 : 1 + IMAGE_TOKENS] = IDS[IMAGE]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=pixels).logits.sum().backward()
    found = flops.step(
        BATCH * LENGTH, BATCH * LENGTH**2, BATCH * LENGTH, image_tokens=BATCH * IMAGE_TOKENS, pixels=pixels.numel()
    )
    assert found == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", None),
        ("cpu", None),
    ],
)
def test_the_peak_is_known_by_the_devices_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
