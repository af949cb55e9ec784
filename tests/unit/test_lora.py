"""Adapters: what learns, what is saved, and what comes out, with the real engine at every ZeRO stage."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from betakd_ray.data.pack import pack
from betakd_ray.errors import ModelError, SpecError
from betakd_ray.forecast.forecast import forecast
from betakd_ray.job import BetaKDJob
from betakd_ray.models.load import load_model
from betakd_ray.models.student import build_student
from betakd_ray.run.lease import Permit
from betakd_ray.spec import JobSpec, ModelSpec, StorageSpec, parse_spec
from betakd_ray.train.export import export_student
from tests.learning import Study, spawned
from tests.tiny import IDS, IMAGE, IMAGE_SIZE, IMAGE_TOKENS, numbered_samples, raw_sample, save_tiny

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Case:
    """Training settings of adapters, and their export."""

    zero: int = 2
    precision: str = "fp32"
    merge: bool = True
    dropout: float = 0.0
    gradient_checkpointing: bool = False


CASES = [
    *(Case(zero=zero) for zero in range(4)),
    Case(zero=3, precision="bf16"),
    Case(merge=False, gradient_checkpointing=True),
    Case(dropout=0.5),
]


def spec(home: Path, case: Case, **lora: Any) -> JobSpec:
    return parse_spec(
        {
            "name": "-".join(map(str, vars(case).values())),
            "data": {"train": str(home / "shards/*.tar")},
            "teacher": {"path": str(home / "teacher")},
            "student": {
                "init": {"kind": "checkpoint", "path": str(home / "student")},
                "lora": {"r": 4, "alpha": 6, "dropout": case.dropout, "merge": case.merge, **lora},
            },
            "objective": {"energies": ["fkl", "align_attention"] if case.zero == 2 and case.merge else ["fkl"]},
            "optimizer": {"lr": 3e-2, "warmup_fraction": 0},
            "training": {
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "zero_stage": case.zero,
                "precision": case.precision,
                "gradient_checkpointing": case.gradient_checkpointing,
            },
            "output": str(home / "runs"),
        }
    )


@dataclass(frozen=True)
class Found:
    """Results of a case."""

    losses: list[float]
    resumed: list[float]
    """Losses of the last steps, run again from a checkpoint before them."""
    learned: set[str]
    stored: int
    """Bytes of the engine's checkpoint."""
    logits: torch.Tensor | None
    """Logits of the student with its adapters; None if ZeRO-3 has split its weights."""


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, *[IDS[IMAGE]] * IMAGE_TOKENS, 40, 50, 60, 70]])
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "pixel_values": pixels}


def learn(home: Path, cases: list[Case]) -> dict[Case, Found]:
    return {case: _learn(home, case) for case in cases}


def _learn(home: Path, case: Case) -> Found:
    job = spec(home, case)
    samples = [raw_sample(number, f"It is {number}.", has_image=number != 2) for number in range(4)]
    study = Study.of(job, samples)
    losses = study.steps(4)
    folder = home / f"checkpoint-{job.name}"
    folder.mkdir()
    study.learner.save(folder)
    losses += study.steps(2)
    learned = {name for name, each in study.learner.distiller.student.named_parameters() if each.requires_grad}
    run = home / "runs" / job.name
    export_student(study.learner.engine, job, Permit(str(run), StorageSpec()), {})
    logits = None
    if case.zero < 3:
        with torch.no_grad():
            logits = study.learner.distiller.student.eval()(**inputs()).logits
    again = Study.of(job, samples)
    again.learner.load(folder)
    stored = sum(file.stat().st_size for file in (folder / "deepspeed").glob("*.pt"))
    return Found(losses, again.steps(2), learned, stored, logits)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("lora")
    save_tiny(home / "teacher", hidden=32, seed=1)
    save_tiny(home / "student", hidden=16, seed=2)
    pack(numbered_samples(8), str(home / "shards"))
    return home


@pytest.fixture(scope="module")
def found(home: Path) -> dict[Case, Found]:
    return spawned(learn, home, home, CASES)


def exported(home: Path, case: Case) -> Any:
    return AutoModelForImageTextToText.from_pretrained(home / "runs" / spec(home, case).name / "model").eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


@pytest.mark.parametrize("case", CASES, ids=str)
def test_adapters_learn_and_go_on_from_a_checkpoint_that_holds_them_alone(case, found, home):
    of_case = found[case]
    assert of_case.losses[-1] < of_case.losses[0]
    assert of_case.resumed == pytest.approx(of_case.losses[-2:], rel=1e-5)
    assert all(".lora_" in name or "multi_modal_projector" in name for name in of_case.learned)
    adapted = {name.split(".")[-4] for name in of_case.learned if ".lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any("vision_tower" in name or "lm_head" in name for name in of_case.learned)
    assert any("multi_modal_projector" in name for name in of_case.learned)


@pytest.mark.parametrize("case", [case for case in CASES if case.merge and case.precision == "fp32"], ids=str)
def test_a_merged_student_is_a_plain_model_that_computes_the_same(case, found, home):
    model, before = exported(home, case), load_model(ModelSpec(path=str(home / "student")))
    assert model.state_dict().keys() == before.state_dict().keys()
    assert type(model) is type(before)
    if found[case].logits is not None:
        torch.testing.assert_close(logits_of(model), found[case].logits, rtol=1e-5, atol=1e-6)
    for name, weight in model.state_dict().items():
        is_same = "vision_tower" in name or "norm" in name or "embed" in name or "lm_head" in name
        assert torch.equal(weight, before.state_dict()[name]) == is_same, name


def test_zero_3_makes_the_student_that_stage_0_makes(found, home):
    torch.testing.assert_close(
        logits_of(exported(home, Case(zero=3))), logits_of(exported(home, Case(zero=0))), rtol=1e-3, atol=1e-4
    )


def test_adapters_that_are_kept_are_loaded_by_peft_and_by_transformers(found, home, tmp_path):
    case = Case(merge=False, gradient_checkpointing=True)
    folder = home / "runs" / spec(home, case).name / "model"
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("adapter_*"))
    bare, before = (AutoModelForImageTextToText.from_pretrained(each) for each in (tmp_path / "bare", home / "student"))
    torch.testing.assert_close(bare.model.language_model.state_dict(), before.model.language_model.state_dict())
    by_peft = PeftModel.from_pretrained(bare, str(folder)).eval()
    for model in (by_peft, exported(home, case), load_model(ModelSpec(path=str(folder)))):
        torch.testing.assert_close(logits_of(model), found[case].logits, rtol=1e-5, atol=1e-6)
    assert "without peft, transformers does not load them" in (folder / "README.md").read_text()


@pytest.mark.parametrize("case", [Case(zero=2), Case(zero=3, precision="bf16")], ids=str)
def test_the_plan_counts_what_learns(case, found, home):
    job = spec(home, case)
    planned = forecast(BetaKDJob(job)).student
    built = build_student(job.student, torch.float32)
    maps = planned.trained - sum(each.numel() for each in built.parameters() if each.requires_grad)
    assert planned.parameters - maps == sum(each.numel() for each in built.parameters())
    assert 0 <= maps <= 10  # align_attention's, from two heads to two
    assert planned.checkpoint < found[case].stored < 2 * planned.checkpoint + 150_000  # names, at this size


def test_what_cannot_be_adapted_is_an_error_that_names_its_field(home):
    with pytest.raises(
        ModelError, match=r"student\.lora\.target_modules: the language model has no linear layer w1; .*q_proj"
    ):
        BetaKDJob(spec(home, Case(), target_modules=["q_proj", "w1"])).check()
    only = build_student(spec(home, Case(), target_modules=["q_proj"]).student, torch.float32)
    assert {name.split(".")[-4] for name, _ in only.named_parameters() if ".lora_" in name} == {"q_proj"}
    tree = spec(home, Case()).model_dump()
    tree["student"]["train"] = ["projector"]
    with pytest.raises(SpecError, match="add language_model"):
        parse_spec(tree)
