"""What is wrong with a spec, in words: one line a fault, from pydantic's list of errors."""

import re
from collections.abc import Iterator
from typing import Any, get_args

from betakd_ray.errors import did_you_mean, shortened
from betakd_ray.spec.base import PATTERNS, PLUGIN, Spec
from betakd_ray.spec.hints import yaml_hint
from betakd_ray.spec.origin import FieldPath, Origin

MAX_FAULTS = 20
"""Largest number of wrong fields that a message names."""
_EXPECTED = {
    "bool": "true or false",
    "date": "a date such as 2024-07-26",
    "datetime": "a date such as 2024-07-26",
    "dict": "a mapping",
    "finite_number": "a finite number",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "mapping": "a mapping",
    "model": "a mapping of fields",
    "string": "a text",
    "tuple": "a list",
}
"""Start of a pydantic error's type → what was expected."""
_LIMITS = {
    "greater_than": "greater than {gt}",
    "greater_than_equal": "greater than or equal to {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "less than or equal to {le}",
}
_OF_A_WHOLE = ("literal_error", "too_short", "too_long", "tuple_type", "list_type", "dict_type", "model_type")
"""Errors about a whole value that say nothing more if a part of it is wrong."""


def faults_of(kind: type[Spec], tree: Any, issues: list[Any], origin: Origin) -> list[str]:
    """Return a line for each wrong field: where it is, what was seen, what was expected. In the order of the file."""
    at: dict[FieldPath, list[Any]] = {}
    for issue in issues:
        at.setdefault(_path(tree, issue), []).append(issue)
    lines: dict[str, int] = {}
    for path, there in at.items():
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in at)
        said = [issue for issue in there if not (deeper and issue["type"] in _OF_A_WHOLE)]
        for text in _explained(kind, tree, path, said):
            place = (*path, *_field_named_in(text))
            where = ".".join(map(_shown, path)) or "the spec"
            lines.setdefault(f"{origin.of(place)}: {where}: {text}", origin.line(place))
    ordered = sorted(lines, key=lambda line: lines[line])
    more = [f"{origin.name}: and {len(ordered) - MAX_FAULTS} more"] if len(ordered) > MAX_FAULTS else []
    return ordered[:MAX_FAULTS] + more


def _shown(part: str | int) -> str:
    """Return a field as it is written; one that would break the line, or not be seen, as Python writes it."""
    text = str(part)
    return text if text and text.isprintable() else repr(text)


def _path(tree: Any, issue: Any) -> FieldPath:
    """Return the way to the value in the file. pydantic's also names kinds, types, and what a short form stands for."""
    path: list[str | int] = []
    if not issue["loc"]:
        return ()
    *inner, last = issue["loc"]
    for part in inner:
        if _has(tree, part):
            path.append(part)
            tree = tree[part]
    is_named = issue["type"] in ("missing", "extra_forbidden") or _has(tree, last)
    return tuple([*path, last] if is_named else path)


def _has(tree: Any, part: str | int) -> bool:
    if isinstance(tree, dict):
        return part in tree
    return isinstance(tree, list | tuple) and isinstance(part, int) and part < len(tree)


def _field_named_in(text: str) -> FieldPath:
    """Return the field that the text of a check over several fields begins with, e.g. `deepspeed.fp16: is …`."""
    named = re.match(r"[a-z_]\w*(?:\.\w+)*(?=:| )", text)
    return tuple(named[0].split(".")) if named else ()


def _explained(kind: type[Spec], tree: Any, path: FieldPath, issues: list[Any]) -> Iterator[str]:
    """Yield the texts about one value. What the branches of a union expect becomes one text."""
    expected = [_expectation(issue) for issue in issues]
    wanted = [text for text in expected if text]
    if wanted:
        first = next(issue for issue, text in zip(issues, expected, strict=True) if text)
        yield _unexpected(_at(tree, path, first.get("input")), wanted, [_choices(issue) for issue in issues])
    for issue, text in zip(issues, expected, strict=True):
        if not text:
            yield _said(kind, tree, path, issue)


def _expectation(issue: Any) -> str:
    """Return what was expected in place of a value of another type; empty for other errors."""
    name = issue["type"]
    if name == "literal_error":
        return " or ".join(_choices(issue))
    if name == "string_pattern_mismatch":
        return PATTERNS.get(issue["ctx"]["pattern"], f"a text like {issue['ctx']['pattern']}")
    for start, words in _EXPECTED.items():
        if name == start or re.fullmatch(rf"{start}_(\w*_)?(type|parsing|parsing_size|from_float)", name):
            return words
    return ""


def _choices(issue: Any) -> list[str]:
    # pydantic gives all of them as one text: 'bf16' or 'fp32'
    return re.findall(r"'([^']*)'", issue["ctx"]["expected"]) if issue["type"] == "literal_error" else []


def _unexpected(seen: Any, wanted: list[str], choices: list[list[str]]) -> str:
    if seen is None:
        return f"is empty, but {_either(wanted)} is expected: write one, or remove the line"
    known = [name for each in choices for name in each]
    hint = did_you_mean(seen, known) if isinstance(seen, str) else ""
    surprise = yaml_hint(seen, wanted="text" if "a text" in wanted else "number")
    return f"expected {_either(wanted)}, got {shortened(seen)}{hint and f'; {hint}'}{surprise}"


def _either(wanted: list[str]) -> str:
    return " or ".join(dict.fromkeys(wanted))


def _said(kind: type[Spec], tree: Any, path: FieldPath, issue: Any) -> str:
    name, context = issue["type"], issue.get("ctx", {})
    seen = _at(tree, path, issue.get("input"))
    if name == "extra_forbidden":
        return f"no such field{_closest(str(path[-1]), _models_at(kind, tree, path[:-1]), kind)}"
    if name == "union_tag_invalid":
        return _unknown_kind(context["tag"], re.findall(r"'([^']+)'", context["expected_tags"]))
    if name == "union_tag_not_found":
        return f"kind is missing; the kinds are {', '.join(_kinds(_models_at(kind, tree, path)))}"
    if name == "missing":
        return "is missing; add it"
    if name == "value_error":
        return issue["msg"].removeprefix("Value error, ")
    if name in _LIMITS:
        limits = {key: f"{value:g}" if isinstance(value, float) else value for key, value in context.items()}
        return f"must be {_LIMITS[name].format(**limits)}, got {shortened(seen)}"
    if name in ("too_short", "string_too_short"):
        return f"has {context.get('actual_length', 0)} entries, but needs at least {context['min_length']}"
    if name in ("too_long", "string_too_long"):
        return f"is longer than the {context['max_length']} that it may have"
    return f"{issue['msg'].removeprefix('Input should be ')}, got {shortened(seen)}"


def _at(tree: Any, path: FieldPath, otherwise: Any) -> Any:
    """Return the value in the file; `otherwise` if it has none there. A check may have seen a longer form of it."""
    for part in path:
        if not _has(tree, part):
            return otherwise
        tree = tree[part]
    return tree


def _unknown_kind(tag: str, known: list[str]) -> str:
    own = ", or module:name for your own" if PLUGIN in known else ""
    known = [name for name in known if name != PLUGIN]
    hint = did_you_mean(tag, known)
    return f"there is no kind {tag!r}; {hint and hint + ' '}the kinds are {', '.join(known)}{own}"


def _closest(word: str, models: list[type[Spec]], root: type[Spec]) -> str:
    known = sorted({name for model in models for name in model.model_fields})
    if hint := did_you_mean(word, known):
        return f"; {hint}"
    elsewhere = [f"{name}.{word}" for name, inner in _sections(root) if word in inner.model_fields]
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    return f"; the fields here are {', '.join(known)}" if known else ""


def _sections(root: type[Spec]) -> Iterator[tuple[str, type[Spec]]]:
    for name, field in root.model_fields.items():
        yield from ((name, model) for model in _models_in(field.annotation))


def _models_at(kind: type[Spec], tree: Any, path: FieldPath) -> list[type[Spec]]:
    """Return the classes of the section at `path`; several if its `kind` is not known."""
    models = [kind]
    for part in path:
        tree = tree[part] if _has(tree, part) else None
        if isinstance(part, str):
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            models = [model for field in fields for model in _models_in(field.annotation)]
        named = tree.get("kind") if isinstance(tree, dict) else None
        models = [model for model in models if named is not None and _kind(model) == named] or models
    return models


def _kind(model: type[Spec]) -> Any:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _kinds(models: list[type[Spec]]) -> list[str]:
    return [name for name in map(_kind, models) if isinstance(name, str)]


def _models_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
