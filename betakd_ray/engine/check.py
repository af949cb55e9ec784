"""Check of `training.deepspeed` by DeepSpeed itself, before a worker builds its engine."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from betakd_ray.engine.config import deepspeed_config
from betakd_ray.errors import SpecError, shortened
from betakd_ray.spec import JobSpec
from betakd_ray.spec.hints import yaml_hint

FIELD = "training.deepspeed"


class _Recorded(dict[str, Any]):
    """A mapping that notes which keys are looked up: DeepSpeed ignores one that it does not know."""

    def __init__(self, values: Mapping[str, Any], read: set[str]) -> None:
        super().__init__(values)
        self.read = read

    def __copy__(self) -> "_Recorded":
        return _Recorded(self, self.read)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def check_deepspeed(spec: JobSpec) -> None:
    """Raise SpecError for a key or a value of `training.deepspeed` that DeepSpeed refuses or does not know.

    DeepSpeed is imported, which takes seconds, only if the spec has such keys.
    """
    own = spec.training.deepspeed
    if not own:
        return
    from deepspeed.runtime.config import DeepSpeedConfig

    read: set[str] = set()
    try:
        DeepSpeedConfig(_Recorded(deepspeed_config(spec, 1), read))  # type: ignore[arg-type]  # it is a dict
    except ValidationError as error:
        raise SpecError("; ".join(_faults(own, error))) from error
    except Exception as error:  # DeepSpeed raises AssertionError, ValueError, TypeError, KeyError … for wrong values
        raise SpecError(f"{FIELD}: DeepSpeed refuses it: {type(error).__name__}: {error}") from error
    for key in own:
        if key not in read:
            close = difflib.get_close_matches(key, read, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "Leave it out."
            raise SpecError(f"{FIELD}.{key}: DeepSpeed has no such key; {hint}")


def _faults(own: Mapping[str, Any], error: ValidationError) -> Iterator[str]:
    for issue in error.errors():
        key = str(issue["loc"][0]) if issue["loc"] else ""
        path = ".".join([FIELD, *(_path(own, key) or [key])])
        if issue["type"] == "extra_forbidden":
            yield f"{path}: DeepSpeed has no such key; correct its name or leave it out"
            continue
        value = issue.get("input")
        yield f"{path}: DeepSpeed refuses {shortened(value)}: {issue['msg']}{yaml_hint(value)}"


def _path(tree: Mapping[str, Any], key: str) -> list[str] | None:
    """Return the keys that lead to a key of a nested mapping; None if it is not there."""
    for name, value in tree.items():
        if name == key:
            return [name]
        if isinstance(value, dict) and (inner := _path(value, key)):
            return [name, *inner]
    return None
