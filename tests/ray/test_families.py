"""Short jobs across families, with adapters, and without images; each result is used as a user would use it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from betakd_ray.data.pack import pack
from betakd_ray.job import BetaKDJob, JobResult
from betakd_ray.spec import load_spec, parse_spec
from tests.families import FAMILIES, build, save_language_model, save_llava_qwen
from tests.originals import save_mobilevlm
from tests.tiny import IMAGE, numbered_samples

pytestmark = pytest.mark.timeout(600)
REPOSITORY = Path(__file__).parents[2]
GENERATE = """
import sys
folder, kind, text = sys.argv[1:]
if kind == "mobilevlm":
    import betakd_ray.models.mobilevlm
else:
    sys.modules["betakd_ray"] = None  # as where it is not installed
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(folder)
if kind == "text":
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    inputs, tokenizer = processor(text, return_tensors="pt"), processor
else:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    inputs = processor(images=[Image.new("RGB", (40, 24), "red")], text=[text], return_tensors="pt")
    tokenizer = processor.tokenizer
assert not info["missing_keys"] and not info["unexpected_keys"], info
tokens = model.generate(**inputs, do_sample=False, min_new_tokens=4, max_new_tokens=4)
assert tokens.shape[1] == inputs["input_ids"].shape[1] + 4
print(type(model).__name__, tokenizer.decode(tokens[0, -4:]))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("families")
    samples = numbered_samples(24)
    pack(samples, str(home / "shown"))
    pack([sample for sample in samples if not sample["images"]] * 6, str(home / "told"))
    return home


def fit(home: Path, name: str, data: dict[str, Any], **sections: Any) -> JobResult:
    tree = {
        "name": name,
        "data": {"shuffle": False, **data},
        "objective": {"energies": ["fkl"], "weighting": "task"},
        "optimizer": {"lr": 1e-2, "warmup_fraction": 0},
        "training": {
            "max_steps": 2,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "precision": "fp32",
            "zero_stage": 0,
            "log_every": 1,
        },
        "cluster": {"student": {"cpus": 1}},
        "output": str(home / "runs"),
        "tracking": {"progress": False},
        **sections,
    }
    result = BetaKDJob(parse_spec(tree)).fit()
    assert result.steps == 2
    assert result.quarantined == 0
    return result


def said(result: JobResult, kind: str, text: str) -> str:
    """Return what the exported model generates in a process without this package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", GENERATE, result.model, kind, text]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_llava_next_teaches_a_llava_qwen_that_learns_by_adapters(ray_cluster: str, home: Path) -> None:
    teacher = FAMILIES["llava_next"]
    build(teacher.config(), seed=1).save_pretrained(home / "next")
    teacher.processor().save_pretrained(home / "next")
    save_llava_qwen(home / "qwen", seed=2)
    before = AutoModelForImageTextToText.from_pretrained(home / "qwen").state_dict()
    result = fit(
        home,
        "across",
        {"train": str(home / "shown/*.tar")},
        teacher={"path": str(home / "next")},
        student={"init": {"kind": "checkpoint", "path": str(home / "qwen")}, "lora": {"r": 4}},
    )
    assert "LlavaForConditionalGeneration" in said(result, "image", f"USER: {IMAGE}\nWhich? ASSISTANT:")
    after = AutoModelForImageTextToText.from_pretrained(result.model).state_dict()
    assert AutoConfig.from_pretrained(result.model).text_config.model_type == "qwen2"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert any("q_proj" in name for name in changed)
    assert any("projector" in name for name in changed)
    assert not any("embed_tokens" in name or "vision_tower" in name for name in changed)


def test_a_language_model_teaches_another_from_text_alone(ray_cluster: str, home: Path) -> None:
    teacher = save_language_model(home / "told-teacher", seed=1, hidden_size=64)
    student = save_language_model(home / "told-student", seed=2, kind="qwen2", num_hidden_layers=2)
    result = fit(
        home,
        "told",
        {"train": str(home / "told/*.tar"), "template": "chat"},
        teacher={"path": teacher},
        student={"init": {"kind": "checkpoint", "path": student}, "train": ["language_model"]},
    )
    assert "Qwen2ForCausalLM" in said(result, "text", "Which number?")


def test_a_shipped_spec_runs_with_small_models_under_the_names_of_its_own(
    ray_cluster: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    for seed, name in enumerate(("7b", "1.7b")):
        save_mobilevlm(Path(f"models/mobilevlm-{name}"), seed=seed)
    pack(numbered_samples(24), "shards/scienceqa")
    small = "training={global_batch_size: 8, micro_batch_size: 8, precision: fp32, zero_stage: 0}"
    spec = load_spec(REPOSITORY / "jobs/mobilevlm/scienceqa.yaml", [small, "cluster={teacher: {min: 1}}"])
    result = BetaKDJob(spec).fit()
    assert (result.steps, result.consumed) == (3, 24)
    assert "MobileVLM" in said(result, "mobilevlm", f"USER: {IMAGE}\nWhich? ASSISTANT:")
