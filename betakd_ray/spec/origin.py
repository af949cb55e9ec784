"""Where each value of a spec was written: a line of a file, or an option of the command line."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

FieldPath = tuple[str | int, ...]
"""Way to a value: names of fields, and places in lists."""


@dataclass(frozen=True)
class Origin:
    """Source of a spec's values."""

    name: str
    """The file as it was given, or what else the values come from."""
    node: yaml.Node | None = None
    """The file's content with its line numbers; None if there is no file."""
    options: Mapping[FieldPath, str] = field(default_factory=dict)
    """Values that do not come from the file: path → the option as it was typed, e.g. `--set training.workers=0`."""

    def of(self, path: FieldPath) -> str:
        """Return where the value at `path` was written: `job.yaml:12`, or an option."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.options:
                return self.options[path[:length]]
        return self.name if self.node is None else f"{self.name}:{self.line(path)}"

    def line(self, path: FieldPath) -> int:
        """Return the line of the value at `path`, or of the nearest value around it; 0 without a file."""
        if self.node is None:
            return 0
        line, node = self.node.start_mark.line, self.node
        for part in path:
            inner = _inner(node, part)
            if inner is None:
                break
            begins, node = inner
            line = begins.start_mark.line
        return line + 1


def _inner(node: yaml.Node, part: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    """Return the node where an entry begins, and the node of its value; None if there is no such entry."""
    if isinstance(node, yaml.MappingNode):
        entries: list[Any] = node.value
        for key, value in entries:
            if key.value == part:
                return key, value
        merged = (_inner(value, part) for key, value in entries if key.tag.endswith(":merge"))
        return next((found for found in merged if found), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part]
    return None
