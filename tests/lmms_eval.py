"""The scoring functions of lmms-eval, read from its files: its package imports far more than they need.

Install it beside this package with `pip install --no-deps lmms-eval==0.7.3`, or name a folder that has it in LMMS_EVAL.
"""

import ast
import importlib
import importlib.util
import os
import re
import string
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np

_NOT_NEEDED = ("loguru", "datasets", "tqdm", "requests")
"""Modules that the files import, but that no scoring function calls."""


def root() -> Path | None:
    """Return the package's folder; None if it is not there."""
    if folder := os.environ.get("LMMS_EVAL"):
        return Path(folder) / "lmms_eval"
    found = importlib.util.find_spec("lmms_eval")
    return Path(found.origin).parent if found and found.origin else None


def module(path: str) -> ModuleType:
    """Return a file of the package as a module, without the packages that it is in."""
    where = _root() / path
    spec = importlib.util.spec_from_file_location("lmms_" + re.sub(r"\W", "_", path), where)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, _imports()):
        spec.loader.exec_module(found)
    return found


def evaluator() -> Any:
    """Return the evaluator of MMBench, without a judge model."""
    with patch.dict(sys.modules, _imports()):
        return module("tasks/mmbench/mmbench_evals.py").MMBench_Evaluator()


def without_judge() -> Any:
    """Return a context in which the evaluator finds the module that it imports while it works."""
    name = "lmms_eval.tasks._task_utils.mcq_extract"
    return patch.dict(sys.modules, _imports() | {name: module("tasks/_task_utils/mcq_extract.py")})


def exact_match() -> Any:
    """Return the metric `exact_match` as a function; the rest of its file needs many packages."""
    tree = ast.parse((_root() / "api/metrics.py").read_text())
    wanted = [node for node in tree.body if getattr(node, "name", "") == "exact_match_hf_evaluate"]
    names: dict[str, Any] = {"re": re, "np": np, "string": string}
    exec(compile(ast.Module(wanted, []), "metrics.py", "exec"), names)
    return names["exact_match_hf_evaluate"]


def _root() -> Path:
    found = root()
    assert found is not None
    return found


def _imports() -> dict[str, ModuleType]:
    for name in ("pandas", "pyarrow.compute"):  # first: what is imported while modules are replaced is forgotten again
        importlib.import_module(name)
    packages = ("lmms_eval", "lmms_eval.tasks", "lmms_eval.tasks._task_utils")
    imports: dict[str, Any] = {name: MagicMock() for name in (*_NOT_NEEDED, *packages)}
    for name in ("file_utils", "vqa_eval_metric"):
        spec = importlib.util.spec_from_file_location(name, _root() / f"tasks/_task_utils/{name}.py")
        assert spec is not None
        assert spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        imports[f"lmms_eval.tasks._task_utils.{name}"] = found
    return imports
