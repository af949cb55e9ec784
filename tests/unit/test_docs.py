"""What the documents show is so: their Python runs, their YAML is valid, and the defaults they print are the spec's."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from betakd_ray.cli import app
from betakd_ray.energies import ENERGIES
from betakd_ray.spec import VISUAL_ENERGIES, ObjectiveSpec, SweepSpec
from betakd_ray.sweep import Sweep

ROOT = Path(__file__).parents[2]
OBJECTIVE = ROOT / "docs/objective.md"
SCALE = (ROOT / "docs/scale.md").read_text()


def blocks(path, language, mark=""):
    """Return (name, text) of each fenced block; with `mark`, only of the blocks right after it."""
    found = re.finditer(rf"{mark}^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [pytest.param(match[1], id=f"{path.name}-{at}") for at, match in enumerate(found)]


EXAMPLES = [block for path in (ROOT / "README.md", OBJECTIVE) for block in blocks(path, "python", "^<!-- test -->\n")]
SECTIONS = blocks(OBJECTIVE, "yaml")


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(example):
    exec(compile(example, "example", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_is_valid_and_one_that_lists_options_lists_all_with_their_defaults(section, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = yaml.safe_load(section)
    if "axes" in shown:
        assert len(Sweep(SweepSpec(**shown)).cells) == 24
        return
    if "objective" in shown:
        ObjectiveSpec(**shown["objective"])
        return
    objective = ObjectiveSpec(**shown)
    listed = objective.energies[0] if "energies" in shown else objective.weighting
    options = shown["energies"][0] if "energies" in shown else shown["weighting"]
    assert options == type(listed)().model_dump(mode="json")


COMMAND = re.compile(r"^```\n\$ (betakd .*?)(?: \| grep (?:-E )?(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def printed():
    """Return the commands of docs/scale.md → the output that the page shows, and the output that they print."""
    shown = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for command, pattern, output in COMMAND.findall(SCALE):
            said = CliRunner().invoke(app, shlex.split(command)[1:]).stdout
            found = "".join(line for line in said.splitlines(keepends=True) if re.search(pattern, line))
            shown[f"{command} | {pattern}"] = (output, found)
    return shown


def test_the_plan_of_512_gpus_shows_what_its_commands_print(printed):
    assert len(printed) == SCALE.count("$ betakd") > 1
    for command, (output, said) in printed.items():
        assert output == said, command


def test_every_figure_of_that_page_is_in_what_is_printed(printed):
    figures = re.findall(r"\*\*([\d.]+(?: [^\d*]+)?)\*\*", SCALE)
    text = "".join(said for _, said in printed.values())
    assert len(figures) > 15
    assert not [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]\d)", text)]


def test_every_energy_and_weighting_has_a_section():
    headings = re.findall(r"^### (\w+)", OBJECTIVE.read_text(), re.MULTILINE)
    assert {*ENERGIES, *VISUAL_ENERGIES, "equal", "manual", "task", "instance"} <= set(headings)


def test_the_marked_example_is_found():
    assert EXAMPLES


ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()


def test_every_file_that_the_architecture_names_is_there():
    named = set(re.findall(r"`((?:betakd_ray|benchmarks|tests)/[\w./-]+)`", ARCHITECTURE))
    assert len(named) > 20
    assert not {name for name in named if not (ROOT / name).exists()}


def test_the_architecture_names_every_room_and_every_module_beside_them():
    rooms = {path.parent.name for path in (ROOT / "betakd_ray").glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"betakd_ray/(\w+)/", ARCHITECTURE))
    modules = {path.stem for path in (ROOT / "betakd_ray").glob("*.py")} - {"__init__", "__main__"}
    assert modules <= set(re.findall(r"betakd_ray/(\w+)\.py", ARCHITECTURE))
