"""The command line as a new user meets it: specs to start from, kinds of specs, faults with lines, narrow terminals."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

import betakd_ray
from betakd_ray.cli import app
from betakd_ray.cli.distill import tree_of_flags
from betakd_ray.cli.init import STARTERS, starter_text
from betakd_ray.errors import SpecError
from betakd_ray.spec import EvaluationSpec, JobSpec, ModelSpec, StorageSpec, load_spec
from betakd_ray.spec.faults import MAX_FAULTS
from betakd_ray.spec.loading import KINDS, kind_of, parse_options

ROOT = Path(__file__).parents[2]
JOB = """\
name: a-job
data: {train: /data/*.tar}
student:
  init:
    kind: checkpoint
    path: org/student
teacher:
  path: org/teacher
objective:
  energies: [fkl]
"""
EVALUATION = "name: e\nmodels: {a: {path: org/a}}\ndata: {train: /data/*.tar}\nmax_new_tokens: 4\n"
BENCHMARKS = "models: {m: {path: org/m}}\nbenchmarks: [gqa, pope]\ndata: /questions\n"
PACK = "conversations: train.json\noutput: shards\n"


def betakd(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def said(*arguments: object) -> str:
    """Return what a command that fails with exit code 2 says."""
    done = betakd(*arguments)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert "pydantic" not in done.output
    return done.output


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.chdir(tmp_path)
    sweep = f"name: s\ntemplate: {tmp_path / 'job.yaml'}\naxes: {{objective.weighting: [equal, task]}}\nseeds: [0, 1]\n"
    texts = {"job": JOB, "evaluation": EVALUATION, "benchmarks": BENCHMARKS, "pack": PACK, "sweep": sweep}
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return {name: tmp_path / f"{name}.yaml" for name in texts}


# ---- specs to start from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STARTERS)
def test_a_starter_is_a_valid_spec_of_its_schema_and_has_comments(name: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    done = betakd("init", name, "--out", file)
    assert done.exit_code == 0
    assert betakd("init", name).stdout == file.read_text() == starter_text(name)
    assert load_spec(file).name
    first = file.read_text().splitlines()[0]
    schema_file = re.fullmatch(r"# yaml-language-server: \$schema=(.*)", first)
    assert schema_file
    schema = json.loads((tmp_path / schema_file[1]).read_text())
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(file.read_text()))
    assert file.read_text().count("#") > 5


def test_a_spec_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("mine")
    assert "is there already" in said("init", "text", "--out", tmp_path / "job.yaml")
    assert (tmp_path / "job.yaml").read_text() == "mine"


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_spec_has_a_schema_that_takes_it_and_refuses_a_misspelt_field(
    kind: str, files: dict[str, Path]
) -> None:
    schema = json.loads(betakd("schema", kind).stdout)
    tree = yaml.safe_load(files[kind].read_text())
    jsonschema.validate(tree, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree | {"nam": 1}, schema)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("objective", {"energies": "fkll"}),
        ("objective", {"weighting": "instanse"}),
        ("training", {"workers": "two"}),
        ("data", {"train": 5}),
        ("tracking", {"trackers": "wandbb"}),
    ],
)
def test_the_schema_with_its_short_forms_still_refuses_what_is_wrong(section: str, value: Any) -> None:
    schema = json.loads(betakd("schema").stdout)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(JOB) | {section: value}, schema)


# ---- kinds of specs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_validate_tells_the_kinds_apart(kind: str, files: dict[str, Path]) -> None:
    assert kind_of(yaml.safe_load(files[kind].read_text())) == kind
    done = betakd("validate", files[kind])
    assert done.exit_code == 0, done.output
    assert f"valid ({kind}" in done.output


def test_validate_looks_at_each_cell_of_a_sweep(files: dict[str, Path]) -> None:
    assert "sweep of 4 cells" in betakd("validate", files["sweep"]).output
    files["job"].write_text(JOB.replace("[fkl]", "[fkll]"))
    text = said("validate", files["sweep"])
    assert f"cell equal_seed0: {files['job']}:10: objective.energies.0: there is no kind 'fkll'" in text
    files["job"].write_text(JOB)
    text = said("validate", files["sweep"], "--set", "axes={training.workers: [1, 0]}")
    assert "training.workers = 0: training.workers: must be greater than or equal to 1" in text


def test_a_command_that_gets_another_kind_of_spec_names_the_right_command(files: dict[str, Path]) -> None:
    assert "`betakd evaluate` takes, but a job is expected" in said("distill", files["evaluation"])
    assert "`betakd distill` takes, but a packing of data is expected" in said("pack", files["job"])
    assert "`betakd pack` takes, but a job is expected" in said("validate", "--kind", "job", files["pack"])


# ---- faults --------------------------------------------------------------------------------------------------------


def test_each_fault_is_a_line_with_its_place_in_the_order_of_the_file(files: dict[str, Path]) -> None:
    file = files["job"]
    file.write_text(
        JOB.replace("kind: checkpoint", "kind: checkpont").replace("path: org/teacher", "pth: 5") + "trainin: {}\n"
    )
    lines = said("validate", file, "--set", "training.epochs=1.5").splitlines()
    assert lines == [
        "betakd: --set training.epochs=1.5: training.epochs: expected a whole number, got 1.5",
        f"betakd: {file}:4: student.init: there is no kind 'checkpont'; did you mean 'checkpoint'? the kinds are "
        "checkpoint, config, parts",
        f"betakd: {file}:7: teacher.path: is missing; add it",
        f"betakd: {file}:8: teacher.pth: no such field; did you mean 'path'?",
        f"betakd: {file}:11: trainin: no such field; did you mean 'training'?",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("name: 2026", ":1: name: expected a text, got 2026; YAML reads an unquoted 2026 as a number"),
        ("data: {train: /x, system_prompt: no}", ":1: data.system_prompt: expected a text, got False; YAML reads"),
        ("cluster: {student: {labels: {pool: on}}}", ":1: cluster.student.labels.pool: expected a text, got True"),
        (
            "training: {epochs: 5e8}",
            "epochs: expected a whole number, got '5e8'; YAML reads 5e8 as a text",
        ),
        ("training:", ":1: training: is empty, but a mapping of fields is expected: write one, or remove the line"),
        ("training: {precision: bf61}", "expected bf16 or fp32, got 'bf61'; did you mean 'bf16'?"),
        ("data: {train: /x, template: vicuna}", "or module:name of your own, got 'vicuna'; did you mean 'vicuna_v1'?"),
        ("student: {init: {path: org/x}}", "student.init: kind is missing; the kinds are checkpoint, config, parts"),
        ("student: {init: org/x}", "student.init: expected a mapping of fields, got 'org/x'"),
        ("cluster: {student: {gpus: two}}", "cluster.student.gpus: expected a number or auto, got 'two'"),
        ("tracking: {trackers: wandbb}", "got 'wandbb'; did you mean 'wandb'?"),
        ("lr: 1", "lr: no such field; did you mean 'optimizer.lr'?"),
        ("optimizer: {lr: 50}", "optimizer.lr: must be less than or equal to 10, got 50"),
        ("student: {init: {kind: checkpoint, path: x}, train: [visoin_tower]}", "did you mean 'vision_tower'?"),
        ("data: {train: []}", "data.train: has 0 entries, but needs at least 1"),
        ("name: a b", "name: expected letters, digits and . _ -, with a letter or digit first, got 'a b'"),
        ("training: {deepspeed: {fp16: {}}}", ":1: training: deepspeed.fp16: is set by precision"),
        ("objective: {energies: [js: 1]}", "kind is missing; the kinds are fkl, "),
    ],
)
def test_no_fault_is_in_a_library_s_words(line: str, expected: str, files: dict[str, Path]) -> None:
    field = line.partition(":")[0]
    rest = yaml.safe_load(JOB)
    rest.pop(field, None)
    files["job"].write_text(f"{line}\n{yaml.safe_dump(rest)}")
    text = said("validate", files["job"])
    assert expected in text
    assert len(text.splitlines()) == 1
    assert not re.search(r"Input should|valid (string|integer|dictionary)|literal\[|constrained", text)


def test_a_merged_section_and_an_alias_have_the_line_where_they_are_written(files: dict[str, Path]) -> None:
    files["job"].write_text(JOB + "cluster:\n  student: &one\n    cpus: -1\n  readers:\n    <<: *one\n    gpus: 0\n")
    text = said("validate", files["job"])
    assert text.count(f"{files['job']}:13: ") == 2


def test_many_faults_are_cut(files: dict[str, Path]) -> None:
    files["job"].write_text(JOB + "".join(f"field{number}: 1\n" for number in range(30)))
    text = said("validate", files["job"])
    assert len(text.splitlines()) == MAX_FAULTS + 1
    assert "and 10 more" in text


def test_a_file_that_is_not_yaml_is_named_with_its_line(files: dict[str, Path]) -> None:
    files["job"].write_text(JOB + "training: [1\n")
    assert f"{files['job']}:12: is not YAML" in said("validate", files["job"])


def test_standard_input_is_named(files: dict[str, Path]) -> None:
    done = CliRunner().invoke(app, ["validate", "-"], input=JOB + "trainin: {}\n")
    assert "standard input:11: trainin: no such field" in done.output


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("inspect", "x.tar", "--template", "vicuna"), "--template 'vicuna': template: expected plain or vicuna_v1"),
        (("inspect", "x.tar", "--model", "x.gguf"), "--model 'x.gguf': path: is a file, but the folder of a model"),
        (("inspect", "x.tar", "--endpoint-url", "http://u:p@h:1"), "endpoint_url: holds a password"),
        (("index", "x.tar", "--endpoint-url", "http://u:p@h:1"), "endpoint_url: holds a password"),
        (("audit", "runs/x", "--endpoint-url", "http://u:p@h:1"), "endpoint_url: holds a password"),
        (("status", "runs/x", "--endpoint-url", "http://u:p@h:1"), "endpoint_url: holds a password"),
    ],
)
def test_an_option_is_checked_as_a_field_of_a_spec(command: tuple[str, ...], expected: str) -> None:
    text = said(*command)
    assert expected in text
    assert "u:p@" not in text


def test_an_option_that_is_fine_becomes_its_field() -> None:
    assert parse_options(StorageSpec, {"endpoint_url": ("--endpoint-url", None)}) == StorageSpec()
    assert parse_options(ModelSpec, {"path": ("--model", "org/m")}).path == "org/m"


# ---- a first run without a spec ------------------------------------------------------------------------------------


def test_flags_make_a_spec_that_is_printed_and_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--teacher", "org/Big-7B", "--student", "org/Small 1B", "--data", "s/*.tar", "--data", "t/*.tar")
    done = betakd("distill", *flags, "--print", "--max-steps", 5, "--set", "optimizer.lr=0.001")
    assert done.exit_code == 0, done.output
    (tmp_path / "job.yaml").write_text(done.stdout)
    job = load_spec(tmp_path / "job.yaml")
    assert job.name == "Small-1B-from-Big-7B"
    assert job.teacher
    assert (job.teacher.path, job.training.max_steps, job.optimizer.lr) == ("org/Big-7B", 5, 0.001)
    assert job.data.paths == (str(tmp_path / "s/*.tar"), str(tmp_path / "t/*.tar"))
    assert job.objective.channels == ("fkl",)


def test_flags_without_a_teacher_are_fine_tuning() -> None:
    given = {"name": None, "teacher.path": None, "student.init.path": "./m/", "data.train": ["a"], "training.epochs": 1}
    job = JobSpec.model_validate(tree_of_flags(given))
    assert (job.teacher, job.name) == (None, "m")


def test_a_wrong_flag_is_named() -> None:
    assert "--student and --data" in said("distill", "--teacher", "x")
    assert "--epochs 0: training.epochs: must be" in said("distill", "--student", "x", "--data", "y", "--epochs", 0)
    assert "--student is for a first run without a spec" in said("distill", "job.yaml", "--student", "x")


# ---- the program ---------------------------------------------------------------------------------------------------


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "betakd_ray", *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


def test_it_says_its_version_and_has_help_for_everything() -> None:
    assert betakd("--version").output == f"betakd {betakd_ray.__version__}\n"
    for command in ("", *(each.name or each.callback.__name__ for each in app.registered_commands)):  # type: ignore[union-attr]
        for flag in ("-h", "--help"):
            assert betakd(*command.split(), flag).exit_code == 0
    assert "--install-completion" in betakd("-h").output


def test_every_parameter_is_explained() -> None:
    import typer

    program: Any = typer.main.get_command(app)
    for name, command in program.commands.items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"betakd {name}: {parameter.name}"


def test_the_package_lists_its_public_names() -> None:
    assert {*betakd_ray.__all__, "__version__"} <= set(dir(betakd_ray))
    assert all(hasattr(betakd_ray, name) for name in ("load_spec", "errors", "JobSpec"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_a_narrow_encoding_is_no_crash(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB.replace("a-job", "β–job"), encoding="utf-8")
    for arguments in (("-h",), ("distill", "-h"), ("validate", str(tmp_path / "job.yaml"))):
        done = run(*arguments, PYTHONIOENCODING=encoding)
        assert done.returncode == (0 if "-h" in arguments else 2)
        assert "Traceback" not in done.stderr
    assert "got 'beta-job'" in done.stderr or encoding != "ascii"


def test_a_spec_s_errors_come_without_torch_and_ray(files: dict[str, Path]) -> None:
    files["job"].write_text(JOB + "trainin: {}\n")
    code = (
        "import sys\nfrom betakd_ray.cli import main\n"
        "try: main()\nexcept SystemExit as end: print(end.code)\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    for command in ("validate", "plan", "distill", "check"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, str(files["job"])],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.stdout == "2\n[]\n", (command, done.stderr)


def test_the_wheel_has_the_specs_to_start_from(tmp_path: Path) -> None:
    source, installed = tmp_path / "source", tmp_path / "installed"  # a build writes into the folder of its sources
    shutil.copytree(ROOT / "betakd_ray", source / "betakd_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "-w", tmp_path, source], check=True, timeout=200)
    (wheel,) = tmp_path.glob("betakd_ray-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", installed, wheel], check=True, timeout=200)
    for name in STARTERS:
        command = [sys.executable, "-P", "-m", "betakd_ray", "init", name]
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == starter_text(name)


def test_an_error_of_a_sweep_or_an_evaluation_is_a_line_too(files: dict[str, Path]) -> None:
    files["evaluation"].write_text(EVALUATION.replace("max_new_tokens: 4", "max_new_token: 4"))
    assert ":4: max_new_token: no such field; did you mean 'max_new_tokens'?" in said("validate", files["evaluation"])
    with pytest.raises(SpecError, match="max_new_token"):
        load_spec(files["evaluation"], (), EvaluationSpec)
