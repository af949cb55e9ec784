"""A result's image processor gives the very pixels of training, padding included."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from betakd_ray.data.render import Renderer
from betakd_ray.models.padding import backend, with_padding
from betakd_ray.spec import DataSpec
from tests.families import FAMILIES
from tests.tiny import tiny_tokenizer

SIDE = {"height": 24, "width": 24}
PROCESSORS = {
    "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=SIDE),
    "clip, exact size": lambda: CLIPImageProcessorPil(size=SIDE, crop_size=SIDE),
    "siglip": lambda: SiglipImageProcessorPil(size=SIDE, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    "dino": lambda: BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIDE),
    "not normalised": lambda: CLIPImageProcessorPil(size=SIDE, crop_size=SIDE, do_normalize=False),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_padding_is_a_setting_and_changes_no_pixel(name: str) -> None:
    own = PROCESSORS[name]()
    processor = LlavaProcessor(own, tiny_tokenizer(), patch_size=8, vision_feature_select_strategy="full")
    renderer = Renderer(processor, DataSpec.model_validate({"train": "/x.tar"}))
    assert renderer.pad_to_square
    made = with_padding(own, renderer.framed, {})
    assert made is not None
    generator = np.random.default_rng(3)
    for width, height in ((50, 20), (20, 50), (33, 33), (7, 90), (640, 480)):
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3)).astype(np.uint8))
        expected = own([renderer.framed(image)], return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(made([image], return_tensors="np")["pixel_values"], expected)
    assert with_padding(made, renderer.framed, {}) is made


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3", "llava_next"])
def test_there_is_none_for_an_image_processor_that_cuts_into_patches(name: str) -> None:
    processor: Any = FAMILIES[name].processor()
    data = DataSpec.model_validate({"train": "/x.tar", "template": FAMILIES[name].template, "pad_to_square": True})
    assert with_padding(processor.image_processor, Renderer(processor, data).framed, {}) is None


def test_the_backend_is_that_of_the_class() -> None:
    assert backend(PROCESSORS["clip"]()) == "pil"
