"""Specs from YAML: read a file, apply overrides, check the result, and say what is wrong with it."""

import re
import sys
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import fsspec
import yaml
from pydantic import ValidationError

from betakd_ray.errors import SpecError, did_you_mean, shortened
from betakd_ray.spec.base import PLUGIN, Spec
from betakd_ray.spec.job import JobSpec
from betakd_ray.spec.yaml_loader import SpecLoader, fault

AnySpec = TypeVar("AnySpec", bound=Spec)


def load_spec(path: str | Path, overrides: list[str] | tuple[str, ...] = (), kind: type[AnySpec] = JobSpec) -> AnySpec:
    """Read a YAML file, apply `overrides` such as "training.workers=2", and check the result.

    Raises SpecError, which names each wrong field, the value that was seen, and what to do.
    """
    tree = read_tree(path)
    for override in overrides:
        _apply(tree, override)
    return parse_spec(tree, kind, source=str(path))


def read_tree(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, given its path or URL, or `-` for standard input. Raises SpecError."""
    try:
        tree = yaml.load(_text(str(path)), SpecLoader)
    except OSError as error:
        said = getattr(error, "strerror", None) or error
        raise SpecError(f"{path}: cannot be read ({said}). Give the path or URL of a YAML file, or -.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # from None: the original message quotes the text, which may have a password in it.
        raise SpecError(f"{path}: is not YAML: {fault(error)}") from None
    if not isinstance(tree, dict):
        raise SpecError(f"{path}: holds a {type(tree).__name__}; a spec must be a mapping.")
    return tree


def _text(location: str) -> str:
    if location == "-":
        return sys.stdin.read()
    if "://" in location:
        return _downloaded(location).decode()
    return Path(location).read_text(encoding="utf-8")


def _downloaded(url: str) -> bytes:
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        return cast(bytes, filesystem.cat_file(path))
    except Exception as error:  # each kind of store has its own errors, without a common base class
        raise OSError(f"{type(error).__name__}: {error}") from error


def parse_spec(tree: dict[str, Any], kind: type[AnySpec] = JobSpec, source: str = "spec") -> AnySpec:
    """Check a mapping against a kind of spec. Raises SpecError."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        faults = [_explain(kind, issue) for issue in error.errors()[:MAX_FAULTS]]
        more = [f"and {error.error_count() - MAX_FAULTS} more"] if error.error_count() > MAX_FAULTS else []
        raise SpecError(f"{source}: " + "; ".join(faults + more)) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise SpecError(f"override {override!r}: write it as section.field=value, e.g. training.workers=2")
    try:
        set_field(tree, path, yaml.load(text, SpecLoader))
    except yaml.YAMLError as error:
        raise SpecError(f"override {override!r}: the value is not YAML: {fault(error)}") from None


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


MAX_FAULTS = 20
"""Largest number of wrong fields that a message names."""


def _explain(kind: type[Spec], issue: Any) -> str:
    """Return one line about one wrong field: where it is, what was seen, what to do."""
    where = ".".join(str(part) for part in issue["loc"]) or "the spec"
    seen = issue.get("input")
    message = issue["msg"].removeprefix("Value error, ")
    if issue["type"] == "extra_forbidden":
        known = _fields_at(kind, issue["loc"][:-1])
        hint = _closest(str(issue["loc"][-1]), known)
        return f"{where}: no such field{hint}"
    if issue["type"] == "union_tag_invalid":
        return f"{where}: {_unknown_kind(issue['ctx'])}"
    if issue["type"] == "missing":
        return f"{where}: is missing; add it"
    if issue["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {message}, got {shortened(seen)}"


def _unknown_kind(context: dict[str, str]) -> str:
    # pydantic gives all known tags as one text: 'fkl', 'rkl', …
    tag, known = context["tag"], re.findall(r"'([^']+)'", context["expected_tags"])
    own = ", or module:name for your own" if PLUGIN in known else ""
    known = [name for name in known if name != PLUGIN]
    hint = did_you_mean(tag, known)
    return f"there is no kind {tag!r}; {hint and hint + ' '}the kinds are {', '.join(known)}{own}"


def _closest(word: str, known: list[str]) -> str:
    if hint := did_you_mean(word, known):
        return f"; {hint}"
    return f"; the fields here are {', '.join(known)}" if known else ""


def _fields_at(kind: Any, location: tuple[Any, ...]) -> list[str]:
    """Return the field names of the model that a pydantic error location points into.

    The location holds the tags of unions too.
    """
    models = [kind]
    for part in location:
        inner = [
            m for model in models if part in model.model_fields for m in _models_in(model.model_fields[part].annotation)
        ]
        tagged = [m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == part]
        models = inner or tagged or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
