"""The shipped specs of the paper's models: each parses, plans and, with small models where its own would be, learns."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoProcessor, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from betakd_ray.forecast.forecast import forecast
from betakd_ray.forecast.samples import AssumedData
from betakd_ray.job import BetaKDJob
from betakd_ray.spec import JobSpec, load_spec
from tests.families import FAMILIES, build, save_language_model, save_llava_qwen, vision_config
from tests.learning import Study, spawned
from tests.originals import save_mobilevlm
from tests.tiny import raw_sample
from tests.unit.test_parts import save_tower

JOBS = Path(__file__).parents[2] / "jobs"
SPECS = [
    file for family in ("mobilevlm", "llava_qwen", "qwen2_5_vl") for file in sorted((JOBS / family).glob("*.yaml"))
]
SMALL = "training={global_batch_size: 4, micro_batch_size: 2, precision: fp32}"
"""The models need no override: a path in a shipped spec is that of a folder here, before it is one on a hub."""
QWEN = FAMILIES["qwen2_5_vl"]


def save_all() -> None:
    """Save a small model under every path that the specs name, relative to the working directory."""
    for seed, folder in enumerate(("models/mobilevlm-7b", "models/mobilevlm-1.7b", "runs/mobilevlm-stage1/model")):
        save_mobilevlm(Path(folder), seed=seed)
    save_language_model("mtgv/MobileLLaMA-1.4B-Chat")
    size = {"height": 96, "width": 96}  # LDPv2 makes 144 tokens, of as many patches or more
    vision = vision_config("clip_vision_model", image_size=96)
    CLIPModel(CLIPConfig(vision_config=vision, projection_dim=16)).save_pretrained("openai/clip-vit-large-patch14-336")
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained("openai/clip-vit-large-patch14-336")
    save_language_model("Qwen/Qwen2.5-3B", kind="qwen2")
    save_tower(Path("google/siglip-so400m-patch14-384"), "siglip")
    for seed, name in enumerate(("3b", "3b-stage1", "1.5b-stage1", "0.5b-stage1")):
        save_llava_qwen(f"runs/llava-qwen-{name}/model", seed=seed)
    for seed, name in enumerate(("7B", "3B")):
        folder = f"Qwen/Qwen2.5-VL-{name}-Instruct"
        build(QWEN.config(), seed=seed).save_pretrained(folder)


@contextmanager
def processors(spec: JobSpec) -> Iterator[None]:
    """Without torchvision, transformers does not load a processor that also takes videos."""
    if "qwen2.5-vl" not in spec.name:
        yield
        return
    with mock.patch.object(AutoProcessor, "from_pretrained", return_value=QWEN.processor()):
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        save_all()
        yield home


def learn(home: Path) -> dict[str, tuple[list[float], int]]:
    os.chdir(home)
    return {str(file): _learn(load_spec(file, [SMALL])) for file in SPECS}


def _learn(spec: JobSpec) -> tuple[list[float], int]:
    """Return the losses of two steps, and the number of trained parameters."""
    with processors(spec):
        study = Study.of(spec, [raw_sample(at, f"It is {at}.", has_image=at < 3) for at in range(4)])
    losses = study.steps(2)
    return losses, sum(each.numel() for each in study.learner.distiller.student.parameters() if each.requires_grad)


@pytest.fixture(scope="module")
def learned(home: Path) -> Any:
    return spawned(learn, home, home)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", SPECS, ids=lambda file: str(file.relative_to(JOBS)))
def test_a_shipped_spec_plans_and_learns_with_small_models(file: Path, home: Path, learned: Any) -> None:
    spec = load_spec(file, [SMALL])
    with processors(spec):
        planned = forecast(BetaKDJob(spec), AssumedData(samples=100, prompt_tokens=10, answer_tokens=10))
    assert planned.total_steps == 25
    losses, trained = learned[str(file)]
    assert all(torch.tensor(losses).isfinite())
    assert losses[0] != losses[1]
    maps = planned.student.trained - trained
    assert maps == 0 or spec.objective.reads_attention


def test_the_recipe_is_the_papers() -> None:
    """The values are those of the paper; where it gives none, the default is the one here."""
    recipe = {file.stem: load_spec(file) for file in (JOBS / "mobilevlm").glob("*.yaml")}
    for name, spec in recipe.items():
        optimizer, training = spec.optimizer, spec.training
        assert (optimizer.adam_betas, optimizer.weight_decay) == ((0.9, 0.999), 0)
        assert (optimizer.schedule, optimizer.warmup_fraction) == ("cosine", 0.03)
        assert (training.epochs, training.precision, training.zero_stage) == (1, "bf16", 2)
        assert spec.student.train == ("language_model", "projector")
        is_first = name == "stage1"
        assert (optimizer.lr, optimizer.projector_lr) == ((2e-5, 1e-3) if is_first else (4e-5, None))
        assert (spec.data.template, spec.data.max_length) == (("plain", 512) if is_first else ("vicuna_v1", 2048))
        assert training.global_batch_size == (32 if name == "scienceqa" else 128)
    assert 6218 // recipe["scienceqa"].training.global_batch_size == 194
