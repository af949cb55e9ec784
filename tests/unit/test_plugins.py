"""A user's own energy, template, benchmark and engine: docs/extending.md works as printed, and faults are named."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from betakd_ray.data.render import Renderer
from betakd_ray.errors import SpecError
from betakd_ray.evaluation.exact_match import ModelAnswer
from betakd_ray.evaluation.run import Evaluation
from betakd_ray.objective import RowObjective, TeacherRows, check_plugins
from betakd_ray.spec import DataSpec, EvaluationSpec, ObjectiveSpec, TeacherSpec, parse_spec
from betakd_ray.teacher.scorer import TeacherScorer, engine_of
from tests.tiny import raw_sample, tiny_processor

PAGE = (Path(__file__).parents[2] / "docs/extending.md").read_text()
FILES = dict(re.findall(r"^<!-- file: (\w+\.py) -->\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
ENERGY, TEMPLATE, BENCHMARK = map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))

BROKEN = """
import torch
CONSTANT = 3
def mean(teacher, student): return (teacher - student).square().mean()
def signed(teacher, student): return (teacher - student).sum(-1)
def apart(teacher, student): return 1 + (teacher - student).square().sum(-1)
def detached(teacher, student): return (teacher - student).square().sum(-1).detach()
def fkl(teacher, student): return (teacher - student).square().sum(-1)
def silent(turns, system, eos): return [("".join(turn["value"] for turn in turns), False)]
def raising(turns, system, eos): return turns[9]
"""

ENGINE = """
from betakd_ray.teacher.scorer import TeacherScorer
class Recording(TeacherScorer): pass
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the page's modules and a faulty one, and make them importable."""
    for name, code in {**FILES, "broken.py": BROKEN, "my_engines.py": ENGINE, "unimportable.py": "1 / 0"}.items():
        (tmp_path / name).write_text(code)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))


def objective(*energies: object) -> ObjectiveSpec:
    return parse_spec({"energies": [*energies], "weighting": "equal"}, ObjectiveSpec)


def test_each_example_is_as_short_as_the_page_promises() -> None:
    assert len(FILES) == 3
    assert max(len(code.splitlines()) for code in FILES.values()) <= 20


def test_an_energy_of_the_page_is_a_channel_like_any_other() -> None:
    spec = parse_spec(ENERGY["objective"], ObjectiveSpec)
    check_plugins(spec)
    assert spec.channels == ("fkl", "huber")
    assert ObjectiveSpec.model_validate_json(spec.model_dump_json()) == spec
    torch.manual_seed(0)
    rows = torch.randn(5, 8, requires_grad=True)
    head, teacher_head = torch.nn.Linear(8, 11), torch.randn(11, 4)
    losses = RowObjective(spec, head, teacher_head)(
        rows, TeacherRows(torch.randn(5, 4)), torch.randint(0, 11, (5,)), torch.ones(5, 3)
    )
    assert losses.values.shape == (5, 3)
    (losses.total).backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()


@pytest.mark.parametrize(
    ("energy", "said"),
    [
        ("broken:mean", r"broken:mean .*returns \[\] for logits of \[4, 11\]"),
        ("broken:signed", "never negative"),
        ("broken:apart", "zero there"),
        ("broken:detached", "no finite gradient"),
        ({"kind": "broken:signed", "scale": 2}, "raises TypeError: .*scale"),
        ("broken:huber", "broken has no huber"),
        ("broken:CONSTANT", "raises TypeError"),
        ("no_such_module:huber", "no_such_module cannot be imported .*on every node"),
        ("unimportable:huber", "ZeroDivisionError"),
    ],
)
def test_a_faulty_energy_is_refused_before_anything_starts(energy: object, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        check_plugins(objective(energy))


@pytest.mark.parametrize(
    ("energy", "said"),
    [
        ("broken:fkl", "fkl is a channel of this package"),
        ("broken:not a name", "expected module:name of your own"),
        ("hubre", "there is no kind 'hubre'; .*module:name for your own"),
        ("fkll", "did you mean 'fkl'"),
    ],
)
def test_a_name_that_cannot_be_is_refused_with_the_spec(energy: object, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        objective(energy)


def test_a_template_of_the_page_renders() -> None:
    renderer = Renderer(tiny_processor(), DataSpec(train=("x",), **TEMPLATE["data"]))  # type: ignore[arg-type]
    rendering = renderer.render(raw_sample(0, "red", has_image=True))
    answer = renderer.tokenizer.decode(rendering.input_ids[rendering.answer_mask])
    assert answer.replace(" ", "") == f"red{renderer.tokenizer.eos_token}"


def test_a_template_is_known_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint() -> str:
        monkeypatch.delitem(sys.modules, "my_templates", raising=False)
        return Renderer(tiny_processor(), DataSpec(train=("x",), **TEMPLATE["data"])).fingerprint  # type: ignore[arg-type]

    before = fingerprint()
    assert fingerprint() == before
    (tmp_path / "my_templates.py").write_text(FILES["my_templates.py"] + "\n# Another version.\n")
    assert fingerprint() != before


@pytest.mark.parametrize(
    ("template", "said"), [("broken:silent", "must return the prompt"), ("broken:raising", "raises IndexError")]
)
def test_a_faulty_template_is_refused(template: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Renderer(tiny_processor(), DataSpec(train=("x",), template=template))  # type: ignore[arg-type]


def test_a_benchmark_of_the_page_scores(tmp_path: Path) -> None:
    tree = {"name": "yes-no", "data": {"train": "x"}, "models": {"one": {"path": "m"}}, "output": str(tmp_path)}
    spec = parse_spec({**tree, **BENCHMARK}, EvaluationSpec)
    answers = [ModelAnswer("Yes.", "yes"), ModelAnswer("no", "yes"), ModelAnswer(None, "no")]
    assert Evaluation(spec).benchmark(answers) == {"accuracy": 2 / 3, "f1": 2 / 3}
    with pytest.raises(SpecError, match="benchmark: broken:no_such: broken has no no_such"):
        Evaluation(parse_spec({**tree, "benchmark": "broken:no_such"}, EvaluationSpec))


def test_an_engine_is_a_subclass_of_ours() -> None:
    assert engine_of(TeacherSpec(path="x")) is TeacherScorer
    assert engine_of(TeacherSpec(path="x", engine="my_engines:Recording")).__mro__[1] is TeacherScorer
    with pytest.raises(SpecError, match=r"teacher.engine: broken:signed is not a subclass of .*TeacherScorer"):
        engine_of(TeacherSpec(path="x", engine="broken:signed"))


def test_a_module_in_the_folder_of_the_command_is_found(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    spec = {
        "name": "mine",
        "data": {"train": "shards/*.tar"},
        "models": {"one": {"path": "org/model"}},
        "benchmark": "my_benchmarks:no_such",
    }
    (tmp_path / "evaluation.yaml").write_text(yaml.safe_dump(spec))
    command = [str(Path(sys.executable).with_name("betakd")), "evaluate", "evaluation.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "benchmark: my_benchmarks:no_such: my_benchmarks has no no_such" in done.stderr
