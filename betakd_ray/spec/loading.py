"""Specs from YAML: read a file, apply overrides, check the result, and say what is wrong with it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import ValidationError

from betakd_ray.errors import SpecError, shortened
from betakd_ray.spec.base import Spec
from betakd_ray.spec.faults import faults_of
from betakd_ray.spec.job import JobSpec
from betakd_ray.spec.origin import FieldPath, Origin
from betakd_ray.spec.tasks import BenchmarksSpec, EvaluationSpec, PackSpec, SweepSpec
from betakd_ray.spec.yaml_loader import SpecLoader, fault

AnySpec = TypeVar("AnySpec", bound=Spec)
KINDS: dict[str, type[Spec]] = {
    "job": JobSpec,
    "evaluation": EvaluationSpec,
    "benchmarks": BenchmarksSpec,
    "sweep": SweepSpec,
    "pack": PackSpec,
}
"""Name → kind of spec."""
COMMANDS = {"job": "distill", "evaluation": "evaluate", "benchmarks": "evaluate", "sweep": "sweep", "pack": "pack"}
"""Name of a kind of spec → the command that runs it."""


def load_spec(path: str | Path, overrides: Sequence[str] = (), kind: type[AnySpec] = JobSpec) -> AnySpec:
    """Read a YAML file, apply `overrides` such as "training.workers=2", and check the result.

    Raises SpecError: one line for each wrong field, with the line of the file, what was seen, and what to do.
    """
    tree, origin = read_spec(path, overrides)
    return parse_spec(tree, kind, origin)


def read_spec(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Origin]:
    """Return the mapping in a YAML file after `overrides`, and where each value was written. Raises SpecError."""
    tree, origin = _read(str(path))
    return tree, apply_overrides(tree, overrides, origin)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str], origin: Origin) -> Origin:
    """Set the fields that overrides such as "training.workers=2" name; return the origin of the values then."""
    options: dict[FieldPath, str] = {}
    for override in overrides:
        path = apply_override(tree, override)
        options[tuple(path.split("."))] = f"--set {override if override.isprintable() else repr(override)}"
    return replace(origin, options={**origin.options, **options})


def read_tree(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, given its path or URL, or `-` for standard input. Raises SpecError."""
    return _read(str(path))[0]


def _read(path: str) -> tuple[dict[str, Any], Origin]:
    name = "standard input" if path == "-" else path
    try:
        loader = SpecLoader(_text(path))
        node = loader.get_single_node()
        tree = None if node is None else loader.construct_document(node)
    except OSError as error:
        said = getattr(error, "strerror", None) or error
        raise SpecError(f"{path}: cannot be read ({said}). Give the path or URL of a YAML file, or -.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # from None: the original message quotes the text, which may have a password in it.
        raise SpecError(f"{name}{_line(error)}: is not YAML: {fault(error)}") from None
    if not isinstance(tree, dict):
        raise SpecError(f"{name}: holds a {type(tree).__name__}; a spec must be a mapping.")
    return tree, Origin(name, node)


def _line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark else ""


def _text(location: str) -> str:
    if location == "-":
        return sys.stdin.read()
    if "://" in location:
        return _downloaded(location).decode()
    return Path(location).read_text(encoding="utf-8")


def _downloaded(url: str) -> bytes:
    import fsspec  # here, because most specs are files, and the import takes 40 ms

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        return cast(bytes, filesystem.cat_file(path))
    except Exception as error:  # each kind of store has its own errors, without a common base class
        raise OSError(f"{type(error).__name__}: {error}") from error


def parse_spec(tree: dict[str, Any], kind: type[AnySpec] = JobSpec, source: str | Origin = "spec") -> AnySpec:
    """Check a mapping against a kind of spec. Raises SpecError."""
    origin = source if isinstance(source, Origin) else Origin(source)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = faults_of(kind, tree, error.errors(), origin)
    raise SpecError("\n".join([*_other_kind(tree, kind, origin), *lines]))


def parse_options(kind: type[AnySpec], options: Mapping[str, tuple[str, Any]]) -> AnySpec:
    """Check options of a command line as the fields of a section: field → (name of its option, value).

    Raises SpecError, which names the option.
    """
    typed: dict[FieldPath, str] = {
        (field,): f"{option} {shortened(value)}" for field, (option, value) in options.items()
    }
    tree = {field: value for field, (_, value) in options.items()}
    return parse_spec(tree, kind, Origin(next(iter(typed.values()), "options"), options=typed))


def kind_of(tree: Mapping[str, Any]) -> str:
    """Return the name of the kind of spec that a mapping is, by its fields: the kind that knows most of them."""
    known = {name: len(tree.keys() & kind.model_fields.keys()) for name, kind in KINDS.items()}
    needed = {
        name: sum(field.is_required() and key in tree for key, field in kind.model_fields.items())
        for name, kind in KINDS.items()
    }
    return max(KINDS, key=lambda name: (known[name], needed[name]))


def _other_kind(tree: dict[str, Any], kind: type[Spec], origin: Origin) -> list[str]:
    """Return a line that says that this is another kind of spec, if it is one."""
    asked = next((name for name, known in KINDS.items() if known is kind), None)
    found = kind_of(tree)
    if asked is None or found == asked:
        return []
    return [
        f"{origin.name}: looks like the spec of {_A[found]}, which `betakd {COMMANDS[found]}` takes, but {_A[asked]} "
        "is expected"
    ]


_A = {
    "job": "a job",
    "evaluation": "an evaluation on packed questions",
    "benchmarks": "an evaluation on benchmarks",
    "sweep": "a sweep",
    "pack": "a packing of data",
}


def apply_override(tree: dict[str, Any], override: str) -> str:
    """Set what an override such as "training.workers=2" says; return the path of its field. Raises SpecError."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise SpecError(f"override {override!r}: write it as section.field=value, e.g. training.workers=2")
    try:
        set_field(tree, path, yaml.load(text, SpecLoader))
    except yaml.YAMLError as error:
        raise SpecError(f"override {override!r}: the value is not YAML: {fault(error)}") from None
    return path


def set_field(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set section.field in a spec's mapping. Raises SpecError if a section on the path is a plain value."""
    *sections, field = path.split(".")
    node = tree
    for section in sections:
        inner = node.get(section, {})
        if not isinstance(inner, dict):
            raise SpecError(f"override {path}: {section} is {shortened(inner)}, which has no fields")
        node[section] = dict(inner)  # a copy: through a YAML alias, the same mapping may be in another section
        node = node[section]
    node[field] = value
