"""Docstrings are sentences, or phrases that stand by themselves; ruff's pydocstyle rules check their form."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAGMENTS = {"Of", "Those", "By", "With", "From", "For", "As", "Once"}
"""First words of a docstring that continues a name instead of saying what it is."""


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of each docstring of a file, those of attributes and constants too."""
    for node in ast.walk(ast.parse(path.read_text())):
        for statement in body if isinstance(body := getattr(node, "body", None), list) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value.strip()


@pytest.mark.parametrize("folder", ["betakd_ray", "jobs", "benchmarks", "tests"])
def test_no_docstring_is_a_fragment(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in docstrings(path)
        if re.split(r"\W", text, maxsplit=1)[0] in FRAGMENTS
    ]
    assert not found, "\n".join(found)
