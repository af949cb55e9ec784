"""Mappings of a spec that belong to other libraries, and what YAML 1.1 makes of numbers and texts."""

from pathlib import Path

import pytest
import yaml

from betakd_ray.check.open_mappings import check_open_mappings
from betakd_ray.engine.check import check_deepspeed
from betakd_ray.errors import ModelError, SpecError
from betakd_ray.models.compatibility import check_processor
from betakd_ray.models.source import local_folder
from betakd_ray.models.student import student_config
from betakd_ray.spec import ConfigInit, JobSpec, StorageSpec, StudentSpec, load_spec, parse_spec, read_tree
from betakd_ray.spec.hints import yaml_hint
from betakd_ray.spec.loading import kind_of
from betakd_ray.spec.yaml_loader import SpecLoader
from tests.tiny import tiny_config, tiny_processor

JOBS = Path(__file__).parents[2] / "jobs"
SPECS = [file for file in sorted(JOBS.glob("*/*.yaml")) if kind_of(read_tree(file)) == "job"]
"""The shipped specs of jobs; the others are of evaluations, packings and sweeps."""


def job(text="", **changes):
    tree = {
        "name": "j",
        "data": {"train": "/x/*.tar"},
        "student": {"init": {"kind": "checkpoint", "path": "/x/student"}},
        "output": "/x/runs",
    }
    if "teacher" in changes:
        tree["objective"] = {"energies": ["fkl"]}
    return parse_spec({**tree, **yaml.load(text or "{}", SpecLoader), **changes}, JobSpec)


def training(deepspeed):
    return job(f"training: {{deepspeed: {deepspeed}}}")


@pytest.mark.parametrize(
    ("deepspeed", "said"),
    [
        ("{zero_optimization: {reduce_bucket_size: 5e8}}", r"zero_optimization\.reduce_bucket_size.*write 5\.0e\+8"),
        ("{zero_optimization: {reduce_bucket_size: 5e-1}}", r"zero_optimization\.reduce_bucket_size.*5e-1"),
        ("{zero_optimization: {redce_bucket_size: 5}}", r"zero_optimization\.redce_bucket_size: .*no such key"),
        ("{zero_optimization: {offload_optimizer: {device: gpu}}}", r"zero_optimization\.offload_optimizer"),
        ("{wall_clock_brekdown: true}", r"wall_clock_brekdown: .*did you mean 'wall_clock_breakdown'"),
        ("{activation_checkpoint: {}}", r"activation_checkpoint: DeepSpeed has no such key"),
    ],
)
def test_what_deepspeed_refuses_or_ignores_is_named_by_its_field(deepspeed, said):
    with pytest.raises(SpecError, match=rf"(?s)training\.deepspeed\.{said}"):
        check_deepspeed(training(deepspeed))


@pytest.mark.parametrize(
    "deepspeed",
    [
        "{}",
        "{zero_optimization: {reduce_bucket_size: auto}}",
        "{zero_optimization: {reduce_bucket_size: 5.0e+8}}",
        "{wall_clock_breakdown: true}",
    ],
)
def test_what_deepspeed_takes_is_taken(deepspeed):
    check_deepspeed(training(deepspeed))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{model_type: llama, rms_norm_eps: 1e-5}", r"config\.rms_norm_eps: is the text '1e-5'; .*write 1\.0e-5"),
        ("{model_type: llama, hiden_size: 64}", r"config\.hiden_size: a 'llama' has no .* did you mean 'hidden_size'"),
        ("{model_type: llava, text_config: {model_type: llama, num_hiden_layers: 2}}", r"xt_config\.num_hiden_layers"),
        ("{model_type: lama}", "lama"),
    ],
)  # fmt: skip
def test_a_configuration_is_checked_by_transformers(config, said):
    student = {"init": {"kind": "config", "config": yaml.load(config, SpecLoader), "processor": "/x/p"}}
    with pytest.raises(ModelError, match=said):
        check_open_mappings(job(student=student))


def test_a_right_configuration_is_taken():
    config = {"model_type": "llama", "hidden_size": 64, "rms_norm_eps": 1.0e-5, "my_own_note": "x"}
    check_open_mappings(job(student={"init": {"kind": "config", "config": config, "processor": "/x/p"}}))


@pytest.mark.parametrize(
    ("value", "wanted", "said"),
    [
        ("5e8", "number", "write 5.0e+8 or 500000000"),
        ("1e-5", "number", "write 1.0e-5"),
        ("1.5E3", "number", "write 1.5e+3 or 1500"),
        ("auto", "number", ""),
        (True, "text", "on, off, true or false as True: quote it"),
        (2026, "text", 'quote it, "2026"'),
        (None, "text", "quote it"),
        ("x", "text", ""),
    ],
)
def test_a_surprise_of_yaml_is_explained(value, wanted, said):
    hint = yaml_hint(value, wanted=wanted)
    assert said in hint
    assert bool(said) == bool(hint)


@pytest.mark.parametrize("text", ["name: 2026", "name: on", "teacher: {path: /t, revision: 1234567}"])
def test_a_text_that_yaml_reads_as_another_kind_is_to_be_quoted(text):
    with pytest.raises(SpecError, match="quote it"):
        job(text)


@pytest.mark.parametrize("text", ["010", "1:30", "-007", "1:30:00"])
def test_a_number_of_another_base_is_refused(text):
    with pytest.raises(yaml.YAMLError, match="base 8 or 60"):
        yaml.load(f"training: {{seed: {text}}}", SpecLoader)
    assert yaml.load(f"a: '{text}'", SpecLoader) == {"a": text}


def test_numbers_of_base_10_are_read():
    assert yaml.load("[0, 10, 1.5, 0.5, -3, 1_000, 00.5]", SpecLoader)[:6] == [0, 10, 1.5, 0.5, -3, 1000]


# ---- places ------------------------------------------------------------------------------------------------------


def test_a_variable_of_the_environment_is_expanded_or_refused(monkeypatch):
    monkeypatch.setenv("MY_DATA", "/data")
    monkeypatch.delenv("NOT_SET", raising=False)
    assert job(data={"train": "${MY_DATA}/{0..1}.tar"}).data.paths == ("/data/{0..1}.tar",)
    for path, said in (("${NOT_SET}/a.tar", "NOT_SET is not set"), ("${HF_TOKEN}/a.tar", "a secret")):
        with pytest.raises(SpecError, match=said):
            job(data={"train": path})
    monkeypatch.setenv("MY_DATA", "s3://key:secret@bucket")
    with pytest.raises(SpecError, match="holds a password"):
        job(data={"train": "${MY_DATA}/a.tar"})


def test_a_folder_that_is_not_there_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("/nowhere/model", "./model", "models/org/model", "../model"):
        location = job(teacher={"path": path}).teacher.path
        assert location.startswith("/")
        with pytest.raises(ModelError, match="there is no such folder"):
            local_folder(location, StorageSpec())
    assert job(teacher={"path": "org/model"}).teacher.path == "org/model"


def test_a_processor_without_its_patch_size_and_ids_beyond_the_embedding_are_errors():
    processor, config = tiny_processor(), tiny_config()
    check_processor("m", config, processor)
    with pytest.raises(ModelError, match=r"m: the tokenizer has ids up to \d+ .*embedding has 300 rows"):
        check_processor("m", tiny_config(vocab=300), processor)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<nobody>"]})
    rows = max(processor.tokenizer.get_vocab().values())
    check_processor("m", tiny_config(vocab=rows), processor)
    processor.chat_template = "{{ '<nobody>' }}"
    with pytest.raises(ModelError, match=rf"ids up to {rows} .'<nobody>'."):
        check_processor("m", tiny_config(vocab=rows), processor)
    processor = tiny_processor()
    processor.patch_size = None
    with pytest.raises(ModelError, match=r"no patch_size.*Add .patch_size.: 8 to processor_config\.json"):
        check_processor("m", config, processor)


@pytest.mark.parametrize("file", SPECS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_no_shipped_spec_has_a_key_that_is_taken_for_misspelt(file, monkeypatch):
    monkeypatch.chdir(JOBS.parent)
    init = load_spec(file).student.init
    if isinstance(init, ConfigInit):
        student_config(StudentSpec(init=init.model_copy(update={"vision_tower": None})))


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_key_that_models_read_of_any_part_is_taken(key):
    """LLaVA's projector reads the width of its tower, which a LeViT calls hidden_sizes."""
    vision = {"model_type": "levit", key: 96}
    student_config(
        StudentSpec(
            init={"kind": "config", "processor": "/x", "config": {"model_type": "llava", "vision_config": vision}}
        )
    )


def test_a_misspelt_key_of_a_part_is_named():
    vision = {"model_type": "levit", "hiden_sizes": [32, 64, 96]}
    init = {"kind": "config", "processor": "/x", "config": {"model_type": "llava", "vision_config": vision}}
    with pytest.raises(ModelError, match=r"vision_config\.hiden_sizes: .* did you mean 'hidden_sizes'"):
        student_config(StudentSpec(init=init))
