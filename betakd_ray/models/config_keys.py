"""Keys of a configuration in a spec that transformers would keep and never use, because they are misspelt."""

import dataclasses
import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from betakd_ray.spec.hints import yaml_hint

ALIKE = 0.8
"""Similarity to a known key from which an unknown one counts as misspelt; transformers keeps keys of users' own."""

COMMON = {"model_type", "vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"}
"""Keys that a model reads of the configuration of any part, also where the part's own class lacks them.

LLaVA's projector reads `hidden_size` of its tower; a LeViT has only `hidden_sizes`.
"""


def misspelt_keys(config: PretrainedConfig, given: Mapping[Any, Any], where: str) -> Iterator[str]:
    """Yield a message for each key that the class of a configuration does not know, but one like it."""
    known = _known(type(config))
    # Names of a mapping such as `id2label` are numbers.
    for name, value in ((name, value) for name, value in given.items() if isinstance(name, str)):
        inner = getattr(config, name, None)
        if isinstance(value, dict) and isinstance(inner, PretrainedConfig):
            yield from misspelt_keys(inner, value, f"{where}.{name}")
        elif name not in known and (close := difflib.get_close_matches(name, known, n=1, cutoff=ALIKE)):
            yield f"{where}.{name}: a {config.model_type!r} has no such setting; did you mean {close[0]!r}?"


def texts_like_numbers(given: Mapping[Any, Any], where: str) -> Iterator[str]:
    """Yield a message for each text that other languages read as a number: a configuration has none such."""
    for name, value in given.items():
        if isinstance(value, dict):
            yield from texts_like_numbers(value, f"{where}.{name}")
        elif hint := yaml_hint(value):
            yield f"{where}.{name}: is the text {value!r}{hint}"


def _known(kind: type[PretrainedConfig]) -> set[str]:
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    arguments = {name for each in kind.__mro__ if each is not object for name in inspect.signature(each).parameters}
    return fields | arguments | set(kind.attribute_map) | COMMON
