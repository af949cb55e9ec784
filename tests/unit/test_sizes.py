"""Files and functions of the package stay short enough to be read."""

import ast
from pathlib import Path
from statistics import median

PACKAGE = Path(__file__).parents[2] / "betakd_ray"
LONGEST_FILE, LONGEST_FUNCTION, MEDIAN_FUNCTION = 400, 50, 10
"""Limits in lines, docstrings included."""


def test_files_and_functions_are_short() -> None:
    files, functions = {}, {}
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        files[path.name] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                functions[f"{path.name}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
    assert not {name: lines for name, lines in files.items() if lines > LONGEST_FILE}
    assert not {name: lines for name, lines in functions.items() if lines > LONGEST_FUNCTION}
    assert median(functions.values()) <= MEDIAN_FUNCTION
