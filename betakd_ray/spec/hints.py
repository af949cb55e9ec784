"""Explanations of what YAML 1.1 makes of a value that looks like another kind of value."""

import math
import re
from typing import Any

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+")
"""Pattern of a number with an exponent, as other languages write it."""


def yaml_hint(value: Any, *, wanted: str = "number") -> str:
    """Return what to write in place of a value that YAML read as another kind; empty if it explains nothing.

    `wanted` is what the field takes: a number or a text.
    """
    if wanted == "number" and isinstance(value, str) and _NUMBER.fullmatch(value):
        number = float(value)
        whole = f" or {int(number)}" if math.isfinite(number) and number.is_integer() else ""
        return f"; YAML reads {value} as a text: write {_with_point(value)}{whole}"
    if wanted == "text" and isinstance(value, bool):
        return f"; YAML reads an unquoted yes, no, on, off, true or false as {value}: quote it"
    if wanted == "text" and isinstance(value, int | float):
        return f'; YAML reads an unquoted {value} as a number: quote it, "{value}"'
    if wanted == "text" and value is None:
        return "; YAML reads an empty value, null and ~ as nothing: quote it"
    return ""


def _with_point(text: str) -> str:
    """Return a number in the form that YAML 1.1 reads as one: with a point, and a sign before the exponent."""
    mantissa, _, exponent = text.lower().partition("e")
    mantissa += "" if "." in mantissa else ".0"
    return f"{mantissa}e{exponent if exponent[0] in '+-' else f'+{exponent}'}"
