"""Further options for loading a teacher: keywords of transformers, and quantised weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration
from transformers.quantizers.auto import AutoQuantizationConfig

from betakd_ray.batch.packing import stack
from betakd_ray.data.pack import pack
from betakd_ray.data.render import Renderer
from betakd_ray.errors import ModelError
from betakd_ray.forecast.forecast import forecast
from betakd_ray.job import BetaKDJob
from betakd_ray.models.load import load_config, load_model, load_processor
from betakd_ray.models.options import check_options, loading_keywords
from betakd_ray.models.student import student_config
from betakd_ray.models.vlm import lm_head
from betakd_ray.spec import DataSpec, ModelSpec, StudentSpec, TeacherSpec, parse_spec
from betakd_ray.teacher.answers import GroupAnswer, to_tensor
from betakd_ray.teacher.parts import Needs
from betakd_ray.teacher.scorer import TeacherScorer
from tests.tiny import numbered_samples, raw_sample, save_tiny

CPU = torch.device("cpu")
INT8 = {"quant_method": "quanto", "weights": "int8"}
TORCHAO = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
}
METHODS = {"optimum.quanto": INT8, "torchao": TORCHAO}
"""Package → the quantisation settings that need it."""
WITH_HEAD = {
    "optimum.quanto": INT8 | {"modules_to_not_convert": []},
    "torchao": TORCHAO | {"include_input_output_embeddings": True},
}
NEEDS = Needs(frozenset({"hidden", "visual", "teacher_entropy"}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("teacher"), seed=4)


@pytest.fixture
def empty(folder, tmp_path) -> str:
    """Return a copy of the folder without weights."""
    shutil.copytree(folder, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    return str(tmp_path / "empty")


def teacher(path: str, **options: Any) -> TeacherSpec:
    return TeacherSpec(path=path, options=options)


def check(spec: TeacherSpec) -> None:
    check_options(spec, load_config(spec))


# ------------------------------------------------------------------------------------------ keywords


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("no_such_option", r"is not a keyword.*not a setting of a 'llava'.*Leave it out"),
        ("max_memmory", "Did you mean max_memory"),
        ("quantisation_config", "Did you mean quantization_config"),
        ("vision_feature_layr", "Did you mean vision_feature_layer"),
    ],
)
def test_a_keyword_that_nobody_knows_is_found_without_weights(empty, option, said):
    with pytest.raises(ModelError, match=rf"teacher\.options\.{option}: .*{said}"):
        check(teacher(empty, **{option: 1}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vision_feature_layer": -1},
        {"device_map": "cpu", "max_memory": {"cpu": "1GB"}, "offload_folder": "/tmp"},
        {"subfolder": "", "variant": None, "local_files_only": True, "ignore_mismatched_sizes": True},
        {"low_cpu_mem_usage": True, "use_kernels": False, "experts_implementation": "eager"},
    ],
    ids=str,
)
def test_keywords_of_transformers_and_settings_of_the_model_pass(folder, empty, options):
    check(teacher(empty, **options))
    load_model(teacher(folder, **options))


def test_a_setting_of_another_type_is_named(empty):
    with pytest.raises(ModelError, match=r"teacher\.options: .*'vision_feature_layer' with value 'last'"):
        check(teacher(empty, vision_feature_layer="last"))


@pytest.mark.parametrize("name", ["spec", "return_unused_kwargs"])
def test_a_name_that_this_code_uses_itself_is_no_option(empty, name):
    with pytest.raises(ModelError, match=rf"teacher\.options: .*{name}"):
        check(teacher(empty, **{name: 1}))


def test_transformers_refuses_when_it_loads_what_is_refused_before(folder):
    with pytest.raises(ModelError, match="no_such_option"):
        load_model(teacher(folder, no_such_option=1))


def test_the_keywords_are_those_of_from_pretrained_s_signature_and_body():
    assert {"dtype", "device_map", "quantization_config", "max_memory", "use_safetensors"} <= loading_keywords()


# ------------------------------------------------------------------------------------------ quantisation


def _job(tmp_path: Path, folder: str, student: str, **options: Any) -> BetaKDJob:
    pack(numbered_samples(8), str(tmp_path / "shards"), samples_per_shard=4)
    tree = {
        "name": "quantised",
        "data": {"train": str(tmp_path / "shards/*.tar")},
        "teacher": {"path": folder, "options": options},
        "student": {"init": {"kind": "checkpoint", "path": student}},
        "training": {"global_batch_size": 2, "micro_batch_size": 2},
        "objective": {"energies": ["fkl"]},
        "output": {"path": str(tmp_path / "runs")},
    }
    return BetaKDJob(parse_spec(tree))


def test_a_job_s_check_finds_a_wrong_option(tmp_path, folder):
    with pytest.raises(ModelError, match=r"teacher\.options\.no_such_option"):
        _job(tmp_path, folder, folder, no_such_option=1).check()


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "no_such_method"}, "cannot read it.*no_such_method"),
        ({"bits": 4}, "cannot read it.*quant_method"),
    ],
    ids=["method", "nameless"],
)
def test_a_quantisation_that_transformers_cannot_read_is_found_without_weights(empty, quantization, said):
    with pytest.raises(ModelError, match=rf"teacher\.options\.quantization_config: .*{said}"):
        check(teacher(empty, quantization_config=quantization))


def test_a_quantisation_whose_package_is_missing_is_found_without_weights(empty, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_8bit.is_bitsandbytes_available", lambda *_: False)
    with pytest.raises(ModelError, match=r"teacher\.options\.quantization_config: .*bitsandbytes"):
        check(teacher(empty, quantization_config={"load_in_8bit": True}))


def test_a_quantisation_is_a_mapping():
    with pytest.raises(ValidationError, match=r"options\.quantization_config: 'int8' is not a mapping"):
        teacher("org/model", quantization_config="int8")


def need(package: str) -> None:
    pytest.importorskip(package, reason=f"{package} quantises on the CPU, and is not installed")


@pytest.fixture(scope="module")
def stored(folder, tmp_path_factory) -> str:
    """Return a folder with quantised weights as transformers saves them; it cannot save those of quanto."""
    need("torchao")
    target = tmp_path_factory.mktemp("stored")
    load_model(teacher(folder, quantization_config=TORCHAO)).save_pretrained(target)
    load_processor(ModelSpec(path=folder)).save_pretrained(target)
    return str(target)


@pytest.fixture
def declared(empty) -> str:
    """Return a folder whose configuration declares quantised weights."""
    file = Path(empty, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": INT8}))
    return empty


@pytest.fixture(scope="module")
def answered(folder):
    """Return a function from a teacher's spec to its answer for three samples."""
    renderer = Renderer(load_processor(ModelSpec(path=folder)), DataSpec(train=("unused",)))
    samples = [renderer.render(raw_sample(number, "It is so.", has_image=number != 1)) for number in range(3)]
    inputs = stack(samples, renderer.pad_token_id, renderer.image_token_id)

    def score(spec: TeacherSpec) -> tuple[GroupAnswer, torch.Tensor]:
        scorer = TeacherScorer(spec, NEEDS)
        answer, head = scorer.score(inputs), scorer.head()
        assert head is not None
        return answer, to_tensor(answer.arrays["hidden"], CPU).float() @ to_tensor(head, CPU).float().t()

    return score


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("package", METHODS)
def test_a_teacher_quantised_as_it_loads_says_what_transformers_own_would(folder, answered, package, dtype):
    need(package)
    spec = TeacherSpec(path=folder, dtype=dtype, options={"quantization_config": METHODS[package]})
    check(spec)
    answer, logits = answered(spec)
    assert answer.is_finite.all()
    asked = AutoQuantizationConfig.from_dict(METHODS[package])
    own = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, dtype), quantization_config=asked, device_map="cpu"
    )
    model = load_model(spec, getattr(torch, dtype))
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, own(ids).logits, rtol=0, atol=0)
    _, plain = answered(TeacherSpec(path=folder))
    error = (logits - plain).abs().max() / plain.abs().max()
    assert 0 < error < 0.02


def test_a_teacher_whose_weights_are_stored_quantised_says_the_same(folder, stored, answered):
    check(teacher(stored))
    _, expected = answered(teacher(folder, quantization_config=TORCHAO))
    _, logits = answered(teacher(stored))
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("package", WITH_HEAD)
def test_a_quantised_head_is_refused(folder, answered, package):
    need(package)
    with pytest.raises(ModelError, match=r"lm_head in torch\.float32 \(\w+Tensor\).*leaves the head as it is"):
        answered(teacher(folder, quantization_config=WITH_HEAD[package]))


def test_a_head_in_eight_bits_or_under_another_name_is_refused(folder):
    model = load_model(ModelSpec(path=folder))
    model.lm_head.weight.data = model.lm_head.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match=r"lm_head in torch\.float8_e4m3fn"):
        lm_head(model)
    del model.lm_head.weight
    with pytest.raises(ModelError, match="lm_head packed"):
        lm_head(model)


@pytest.fixture(scope="module")
def fingerprint(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))

    def of(path: str, **options: Any) -> str:
        spec = TeacherSpec(path=path, options=options, cache=cache)  # type: ignore[arg-type]
        return TeacherScorer(spec, NEEDS).facts().fingerprint

    return of


@pytest.mark.parametrize("package", METHODS)
def test_to_the_cache_a_quantised_teacher_is_another(folder, tmp_path, fingerprint, package):
    need(package)
    other = save_tiny(tmp_path, seed=5)
    first, again, another = (
        fingerprint(path, quantization_config=METHODS[package]) for path in (folder, folder, other)
    )
    assert first == again
    assert len({first, another, fingerprint(folder)}) == 3


def test_one_bit_of_a_packed_number_makes_another_teacher(stored, tmp_path, fingerprint):
    changed = shutil.copytree(stored, tmp_path / "changed")
    file = changed / "model.safetensors"
    weights = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    name = next(name for name, each in weights.items() if each.dtype == torch.int8)
    weights[name].view(-1)[0] ^= 1
    save_file(weights, file, metadata=metadata)
    assert fingerprint(stored) == fingerprint(stored) != fingerprint(str(changed))


def test_a_student_cannot_start_from_quantised_weights(declared):
    with pytest.raises(ModelError, match=r"student\.init\.path: .*quantised \(quanto\).*made from"):
        student_config(StudentSpec.model_validate({"init": {"kind": "checkpoint", "path": declared}}))


def test_a_plan_says_that_it_counts_weights_as_if_they_were_not_quantised(tmp_path, folder, declared):
    need("optimum.quanto")
    plain = _weights(_job(tmp_path, folder, folder))
    assert list(plain) == ["weights"]
    for path, options in ((declared, {}), (folder, {"quantization_config": INT8})):
        packed = _weights(_job(tmp_path, path, folder, **options))
        assert packed == {"weights, as if quanto did not pack them": plain["weights"]}


def _weights(job: BetaKDJob) -> dict[str, str]:
    rows = forecast(job).rows()
    return {name: value for section, name, value in rows if section == "memory of a teacher" and "weights" in name}
