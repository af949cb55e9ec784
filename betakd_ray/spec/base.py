"""What all sections of a spec share: the base class, short forms, and types of paths, URLs and numbers."""

import math
import os
import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator

from betakd_ray.errors import SECRET_VARIABLES, shortened, without_url_secrets


class Spec(BaseModel):
    """Base class of every section, which is immutable and accepts only declared keys."""

    # hide_input_in_errors: an input may be a URL with a password. allow_inf_nan: JSON has neither, and a run stores its
    # spec as JSON.
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True, allow_inf_nan=False
    )


def _public(url: str) -> str:
    """Refuse a URL with a secret, because a spec is stored with its run and printed in the model card."""
    if "\0" in url:
        raise ValueError("holds a NUL character, which no path or URL has")
    if without_url_secrets(url) != url:
        raise ValueError(
            "holds a password, a token or a signature, but a spec is stored and published. Remove the secret, and set "
            "credentials in the environment of the cluster (AWS_ACCESS_KEY_ID … or a role; see docs/security.md)"
        )
    return url


def _expanded(location: str) -> str:
    """Return a path or URL with `${NAME}` replaced from the environment. Raises ValueError if NAME is not set there."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name in SECRET_VARIABLES:
            raise ValueError(f"names {match[0]}, a secret, but a spec is stored and published; leave it out")
        if name not in os.environ:
            raise ValueError(f"holds {match[0]}, but {name} is not set in this environment; set it, or write its value")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", value, location)


def _absolute(location: str) -> str:
    """Return a path as an absolute path, because Ray's workers run in other folders; return a URL unchanged."""
    if re.match(r"^[a-z][a-z0-9+.-]*://", location):
        return location
    return os.path.abspath(os.path.expanduser(location))


def _absolute_if_present(location: str) -> str:
    """Return the absolute path of an existing folder; any other relative name is a hub id and is returned unchanged."""
    # A hub id is NAME or OWNER/NAME: what has more parts, or begins with a dot, can only be a path.
    is_path = location.startswith(("/", "./", "../", "~")) or ("://" not in location and location.count("/") > 1)
    return _absolute(location) if is_path or os.path.exists(os.path.expanduser(location)) else location


def _folder(location: str) -> str:
    if location.endswith(".gguf"):
        folder, _, file = location.rpartition("/")
        raise ValueError(
            f"is a file, but the folder of a model is expected. For a GGUF of a teacher, or of a student of kind: "
            f"checkpoint, write path: {folder or '.'} and gguf_file: {file}"
        )
    return location


def _gguf_within(file: str) -> str:
    if not file.endswith(".gguf") or file.startswith(("/", "~")) or "://" in file or ".." in file.split("/"):
        raise ValueError(
            f"{shortened(file)} is not a .gguf file inside path; give its name in that folder, e.g. Q8_0.gguf"
        )
    return file


Url = Annotated[str, AfterValidator(_public)]
GgufFile = Annotated[Url, AfterValidator(_gguf_within)]
_Place = Annotated[str, AfterValidator(_expanded), AfterValidator(_public), Field(min_length=1)]
Location = Annotated[_Place, AfterValidator(_absolute)]
ModelLocation = Annotated[_Place, AfterValidator(_folder), AfterValidator(_absolute_if_present)]


def _numbers(value: Any) -> Iterator[float]:
    """Yield each float in a value of mappings and lists."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _numbers(each)


def finite(value: Any) -> Any:
    """Return a value that a spec holds without a type of its own. Raises ValueError if a number in it is not finite."""
    if strange := [number for number in _numbers(value) if not math.isfinite(number)]:
        raise ValueError(
            f"holds {strange[0]}, but a spec is stored as JSON, which has only finite numbers: write a finite one"
        )
    return value


LARGEST_COUNT = 2**31 - 1
"""Largest count of anything. Beyond it, libraries fail with errors of their own, after GPUs are taken."""
LONGEST_S = 2_000_000.0
"""Longest time in seconds that a spec may name, 23 days: more milliseconds than 31 bits do not fit everywhere."""
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
# Not negative: numpy refuses such a seed, and Python's generator takes the same numbers for -1 and 1.
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, le=LONGEST_S)]
# Within these bounds float32 has no infinity or zero where the spec has a number.
Temperature = Annotated[float, Field(ge=1e-3, le=1e3)]
LearningRate = Annotated[float, Field(gt=0, le=10)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Without 1: Adam divides by 1 - beta, and a mean that keeps all of its past never moves.
Decay = Annotated[float, Field(ge=0, lt=1)]
FreeForm = Annotated[dict[str, Any], AfterValidator(finite)]
"""Settings of another library, which are not checked here."""
PLUGIN = "plugin"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
PLUGIN_PATTERN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
PATTERNS = {
    NAME_PATTERN: "letters, digits and . _ -, with a letter or digit first",
    PLUGIN_PATTERN: "module:name of your own",
}
"""Pattern of a text → what it expects, for messages."""
Plugin = Annotated[
    str,
    Field(
        pattern=PLUGIN_PATTERN,
        description="an object in your own module, as module:name, e.g. my_package.energies:huber",
    ),
]
"""Name of an object outside of this package; `betakd_ray.plugins` imports it when a job is checked."""


def is_plugin(name: str) -> bool:
    """Return whether a name in a spec is module:name, and not one of this package's own names."""
    return ":" in name


class StorageSpec(Spec):
    """Access to an object store. Credentials come from the environment, never from a spec."""

    endpoint_url: Url | None = Field(default=None, description="S3 endpoint, for stores other than AWS")
    region: str | None = None
    anonymous: bool = Field(default=False, description="read public buckets without credentials")


class Short:
    """Annotation of a value that has a short form: the JSON schema, which editors use, takes it too.

    `forms` are schemas. Without any, the short form is a single one of the entries of a list.
    """

    def __init__(self, *forms: dict[str, Any]) -> None:
        self._forms = forms

    def __get_pydantic_json_schema__(self, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        whole = handler(core)
        forms = self._forms or (whole["items"],)
        return {"anyOf": [whole, *forms]}


def named(value: Any) -> Any:
    """Expand the short form `fkl` to `{kind: fkl}`."""
    return {"kind": value} if isinstance(value, str) else value


def as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, (str, dict)) else value


class Shortened(Spec):
    """Base class of a section with a short form: a text that stands for its `path`."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(core), {"type": "string"}]}


class Place(Shortened):
    """A folder and the store that holds it. A path or URL alone is a short form."""

    path: Location
    storage: StorageSpec = StorageSpec()

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value
