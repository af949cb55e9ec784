"""Valid values of a spec, and the messages for invalid ones."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import ValidationError

from betakd_ray.energies import ENERGIES
from betakd_ray.errors import SpecError
from betakd_ray.plugins import load
from betakd_ray.spec import (
    BenchmarksSpec,
    CosineProbs,
    EvaluationSpec,
    FeatureDistance,
    InstanceWeighting,
    JobSpec,
    ObjectiveSpec,
    OutputSpec,
    PackSpec,
    PluginEnergy,
    VisualEnergy,
    load_spec,
    parse_spec,
)
from betakd_ray.spec.energies import SECTIONS
from betakd_ray.teacher.parts import PARTS

JOBS = Path(__file__).parents[2] / "jobs"


def tree(**changes):
    job = {
        "name": "a-job",
        "data": {"train": "/data/{00..07}.tar"},
        "student": {"init": {"path": "org/student"}},
        "teacher": {"path": "org/teacher"},
        "objective": {"energies": ["cosine_probs", "fd"]},
    }
    job["student"]["init"]["kind"] = "checkpoint"
    for path, value in changes.items():
        *sections, field = path.split("__")
        node = job
        for section in sections:
            node = node.setdefault(section, {})
        node[field] = value
    return job


def refused(kind=JobSpec, **changes):
    with pytest.raises(SpecError) as caught:
        parse_spec(tree(**changes), kind)
    return str(caught.value)


# ---- defaults, shape ---------------------------------------------------------------------------------------------


def test_defaults_are_the_paper_s():
    job = parse_spec(tree())
    assert job.objective.weighting == InstanceWeighting(
        d=1.0, positivity="softplus", log_bound=5.0, weight_ce=False, features=("teacher_vision",), hidden_size=128
    )
    assert job.objective.ce
    assert job.objective.reduction == "sample"
    assert job.optimizer.beta_lr == 1e-3
    assert job.optimizer.lr == 4e-5
    assert job.training.global_batch_size == 128
    assert job.training.accumulation(workers=1, tokens=400.0) == 16
    assert job.data.template == "vicuna_v1"
    assert job.student.train == ("language_model", "projector")


def test_shorthands_are_the_long_form():
    job = parse_spec(tree(output="/runs", objective__weighting="task"))
    assert job.data.paths == ("/data/{00..07}.tar",)
    assert job.objective.energies == (CosineProbs(), FeatureDistance())
    assert job.objective.channels == ("cosine_probs", "fd")
    assert job.output == OutputSpec(path="/runs")
    assert job.objective.weighting.kind == "task"
    assert ObjectiveSpec(energies="fkl").channels == ("fkl",)


def test_a_type_of_gpu_is_any_name_that_ray_could_know_and_needs_a_gpu():
    for name in ("H100", "A100-80G", "GeForce-RTX-5090", "FURIOSA_RNGD"):
        assert parse_spec(tree(cluster__teacher={"accelerator_type": name})).cluster.teacher.accelerator_type == name
    assert "cluster.student.accelerator_type: " in refused(cluster__student={"accelerator_type": "NVIDIA H100"})
    message = refused(cluster__student={"accelerator_type": "H100", "gpus": 0})
    assert message.endswith(
        "cluster.student: accelerator_type is H100, but gpus is 0: ask for a GPU, or leave the type out"
    )
    assert "no such field" in refused(cluster__readers={"accelerator_type": "H100"})


@pytest.mark.parametrize("batch", [128, 100])
def test_any_number_of_elastic_workers_divides_any_batch(batch):
    elastic = {"training__workers": {"min": 1, "max": 16}, "training__global_batch_size": batch}
    slots = {"cluster__student": {"resources": {"student_slot": 1}}}
    job = parse_spec(tree(**elastic, **slots, training__micro_batch_size=2))
    assert [job.training.share(workers) for workers in (1, 3, 16)] == [batch, -(-batch // 3), -(-batch // 16)]
    assert job.training.accumulation(3, tokens=90.0) == -(-job.training.share(3) // 2)
    with pytest.raises(SpecError, match=r"less than one sample for each of up to 16 workers"):
        parse_spec(tree(**elastic | {"training__global_batch_size": 15}, **slots))
    with pytest.raises(SpecError, match=r"cluster\.student\.resources.*student_slot"):
        parse_spec(tree(**elastic, training__micro_batch_size=2))
    with pytest.raises(SpecError, match="max 1 is below min 2"):
        parse_spec(tree(training__workers={"min": 2, "max": 1}))


def test_a_spec_is_frozen():
    job = parse_spec(tree())
    with pytest.raises(ValidationError):
        job.name = "other"
    with pytest.raises(ValidationError):
        job.training.workers = 2


def test_json_keeps_everything():
    job = parse_spec(
        tree(
            objective__energies=[{"kind": "js", "mixture": 0.1}, "fd"],
            objective__weighting={"kind": "manual", "weights": {"js": 2.0, "fd": 0.5}},
            training={"global_batch_size": 8, "micro_batch_size": 2, "workers": 2},
        )
    )
    assert JobSpec.model_validate_json(job.model_dump_json()) == job


def test_paths_are_absolute_and_urls_and_hub_ids_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    job = parse_spec(tree(data__train=["a.tar", "s3://b/{0..1}.tar"], teacher__path="here"))
    assert job.data.paths == (str(tmp_path / "a.tar"), "s3://b/{0..1}.tar")
    assert job.teacher is not None
    assert job.teacher.path == str(tmp_path / "here")
    assert job.student.init.path == "org/student"
    assert job.output.path == str(tmp_path / "runs")


@pytest.mark.parametrize("section", SECTIONS)
def test_an_energy_names_its_function_and_the_parts_that_there_are(section):
    energy = section()
    function = load(energy.function, energy.name)
    assert energy.teacher_parts <= PARTS.keys()
    assert energy.reads_attention == any(PARTS[part].reads_attention for part in energy.teacher_parts)
    moving = {energy.moving} if getattr(energy, "moving", None) else set()
    if isinstance(energy, VisualEnergy):
        assert energy.teacher_parts
    else:  # every option is an argument of the function, and the other way round
        arguments = inspect.signature(getattr(function, "closed_form", function)).parameters.values()
        assert {each.name for each in arguments if each.kind is each.KEYWORD_ONLY} == {*energy.options} | moving
        assert ENERGIES[energy.name] is function


@pytest.mark.parametrize("energy", ["mse_logits", "cosine_logits", "ctkd", "taid"])
def test_an_energy_that_needs_every_logit_refuses_a_top_k_signal(energy):
    teacher = {"path": "org/teacher", "signal": "top_k"}
    with pytest.raises(SpecError, match=rf"{energy} needs all logits.*signal: hidden"):
        parse_spec(tree(teacher=teacher, objective={"energies": [energy]}))
    with pytest.raises(SpecError, match="temperature 1"):
        parse_spec(tree(teacher=teacher, objective={"energies": [{"kind": "fkl", "student_temperature": 2}]}))
    parse_spec(tree(teacher=teacher, objective={"energies": ["fkl", "fd"]}))


@pytest.mark.parametrize(
    ("deepspeed", "owner"),
    [
        ({"fp16": {"enabled": True}}, "precision"),
        ({"zero_optimization": {"stage": 3}}, "zero_stage"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "float32"),
        ({"communication_data_type": "bf16"}, "float32"),
    ],
)
def test_the_deepspeed_mapping_is_for_what_the_spec_does_not_name(deepspeed, owner):
    with pytest.raises(SpecError, match=owner):
        parse_spec(tree(training={"deepspeed": deepspeed}))
    parse_spec(tree(training={"deepspeed": {"zero_optimization": {"overlap_comm": True}}}))


def test_bf16_needs_a_zero_stage_that_sums_gradients_in_float32():
    with pytest.raises(SpecError, match=r"zero_stage is 0 and precision is bf16.*Set zero_stage to 1"):
        parse_spec(tree(training={"zero_stage": 0}))
    for training in ({"zero_stage": 1}, {"zero_stage": 0, "precision": "fp32"}):
        parse_spec(tree(training=training))


def test_every_section_is_closed():
    def sections(kind):
        yield kind
        for field in kind.model_fields.values():
            for inner in [field.annotation, *get_args(field.annotation)]:
                if isinstance(inner, type) and hasattr(inner, "model_fields"):
                    yield from sections(inner)

    for root in (JobSpec, EvaluationSpec, BenchmarksSpec, PackSpec):
        for kind in sections(root):
            # A plugin's fields are its function's arguments, which only that function knows.
            assert kind.model_config["extra"] == ("allow" if kind is PluginEnergy else "forbid"), kind
            assert kind.model_config["frozen"], kind


def test_a_spec_is_checked_without_torch_ray_or_transformers():
    code = "import sys, betakd_ray.spec; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- files and overrides -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted(set(JOBS.rglob("*.yaml")) - set(JOBS.rglob("grids/*"))), ids=lambda path: str(path.relative_to(JOBS))
)
def test_every_shipped_job_is_a_spec(path):
    assert load_spec(path).name


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree()), encoding="utf-8")
    return path


def test_overrides_are_yaml_and_make_missing_sections(file):
    job = load_spec(file, ["training.workers=2", "training.precision=fp32", "objective.energies=[fkl, rkl]"])
    assert job.training.workers.max == 2
    assert job.training.precision == "fp32"
    assert job.objective.channels == ("fkl", "rkl")
    assert load_spec(file, ["teacher=null", "objective.energies=[]"]).teacher is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.workers", "section.field=value"),
        ("=3", "section.field=value"),
        ("name.first=3", "name is 'a-job', which has no fields"),
        ("training.workers=[1", "not YAML"),
        ("training.worker=2", "did you mean 'workers'?"),
    ],
)
def test_a_bad_override_says_what_to_write(file, override, said):
    with pytest.raises(SpecError) as caught:
        load_spec(file, [override])
    assert said in str(caught.value)


@pytest.mark.parametrize(("text", "said"), [("- a", "holds a list"), ("a: [", "is not YAML"), ("", "NoneType")])
def test_a_file_that_is_no_spec_is_named(tmp_path, text, said):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"nowhere\.yaml: cannot be read"):
        load_spec(tmp_path / "nowhere.yaml")


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainig": {}}, "trainig: no such field; did you mean 'training'?"),
        ({"training__micro_batchsize": 1}, "training.micro_batchsize: no such field; did you mean 'micro_batch_size'?"),
        ({"teacher__windows": 1}, "teacher.windows: no such field; did you mean 'window'?"),
        (
            {"objective__weighting": {"kind": "instance", "hidden_sise": 1}},
            "hidden_sise: no such field; did you mean 'hidden_size'?",
        ),
        ({"objective__energies": [{"kind": "js", "mixtures": 1}]}, "no such field; did you mean 'mixture'?"),
        ({"output__zzz": 1}, "output.zzz: no such field; the fields here are if_running, path, storage"),
        ({"training__workers": "two"}, "training.workers: expected a whole number"),
        ({"training__workers": "two"}, "got 'two'"),
        ({"training__workers": 0}, "greater than or equal to 1, got 0"),
        ({"training__precision": "fp8"}, "got 'fp8'"),
        ({"objective__energies": ["fk"]}, "'fkl'"),
        ({"name": "a job"}, "name: "),
        (
            {"training__global_batch_size": 1, "training__workers": 2},
            "global_batch_size 1 is less than one sample for each of up to 2 workers",
        ),
        ({"teacher": None}, "objective.energies is ['cosine_probs', 'fd'], but there is no teacher"),
        ({"objective__energies": []}, "teacher is given, but objective.energies is empty"),
        ({"objective__energies": ["fkl", "fkl"]}, "a name is listed twice"),
        ({"objective__energies": [], "objective__ce": False}, "there is nothing to learn from"),
        (
            {"objective__weighting": {"kind": "manual", "weights": {"fd": 1.0}}},
            "weighting.weights names ['fd'], but the energies are ['cosine_probs', 'fd']",
        ),
        ({"objective__weighting": "manual", "objective__ce": False}, "ce is false"),
        ({"cluster__teacher": {"min": 3, "max": 2}}, "max 2 is below min 3"),
        ({"objective__weighting": {"kind": "task", "d": 0}}, "greater than 0, got 0"),
    ],
)
def test_an_error_says_what_was_seen_and_what_would_do(changes, said):
    assert said in refused(**changes)


def test_a_missing_field_is_named():
    job = tree()
    del job["data"]
    with pytest.raises(SpecError, match="data: is missing; add it"):
        parse_spec(job)


def test_every_wrong_field_is_told_at_once():
    message = refused(training__workers=0, nam="x")
    assert "training.workers" in message
    assert "nam: no such field; did you mean 'name'?" in message


def test_an_unknown_label_is_named():
    evaluation = {"name": "e", "models": {"a": {"path": "org/a"}}, "data": {"train": "/x.tar"}, "agreement_with": "b"}
    with pytest.raises(SpecError, match=r"agreement_with 'b' is not one of the models \['a'\]"):
        parse_spec(evaluation, EvaluationSpec)


def test_a_url_whose_store_fails_in_its_own_way_is_named(monkeypatch):
    class StoreFault(Exception):
        pass

    def failing(self, path):
        raise StoreFault("no credentials")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.cat_file", failing)
    with pytest.raises(SpecError, match=r"memory://spec\.yaml: cannot be read \(StoreFault: no credentials\)"):
        load_spec("memory://spec.yaml")


def test_a_path_with_a_nul_character_is_refused():
    assert "NUL" in refused(data__train="a\0b.tar")
