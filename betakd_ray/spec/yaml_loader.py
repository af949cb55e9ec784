"""A YAML loader that accepts only what a spec can hold."""

import json
import re
from typing import Any, cast

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from betakd_ray.errors import shortened

MAX_VALUES = 10_000
MAX_DEPTH = 50
_KINDS = ("str", "null", "bool", "int", "float", "seq", "map", "merge")
_TEXT, *_VALUES, _MERGE = (f"tag:yaml.org,2002:{kind}" for kind in _KINDS)


_STRANGE = re.compile(r"[-+]?(?:0[0-7_]+|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)")
"""Pattern of what YAML 1.1 reads as a number of base 8 (010) or 60 (1:30), which hardly anybody means."""


class SpecLoader(yaml.SafeLoader):
    """Loader of YAML whose values JSON can hold too, because a run stores its spec as JSON.

    Keys are text, numbers are finite, and there are no dates. A key that occurs twice in a mapping is an error, because
    the last value would silently replace the first. Aliases may expand to fewer than `MAX_VALUES` values.
    """

    # The constructor under None raises for an unknown tag, so it must stay.
    yaml_constructors = {  # noqa: RUF012
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in (None, _TEXT, *_VALUES)
    }
    # Without the resolver of timestamps, an unquoted date is a text.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in known if tag in (_MERGE, *_VALUES)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}  # number of values in a node, with its aliases expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        # PyYAML goes down by recursion, so a file that is nested too deeply would end in a RecursionError.
        if self._depth == MAX_DEPTH:
            raise ComposerError(None, None, f"more than {MAX_DEPTH} nested levels", event.start_mark)
        self._depth += 1
        node = cast(yaml.Node, super().compose_node(parent, index))
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            # Sizes are added up and not walked through: a few lines of aliases can stand for billions of values.
            self._sizes[node] = 1 + sum(self._sizes[inner] for inner in _inner(node))
        if self._sizes.get(node, MAX_VALUES) >= MAX_VALUES:  # an alias inside its own anchor has no size yet
            raise ComposerError(None, None, f"aliases that expand to more than {MAX_VALUES} values", event.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.tag not in (_TEXT, _MERGE):
                raise ComposerError(
                    None, None, f"the key {shortened(key.value)} is not a text: quote it", key.start_mark
                )
            if key.value in seen:
                raise ComposerError(None, None, f"{shortened(key.value)} is given a second time", key.start_mark)
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        is_number = isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float"))
        if is_number and _STRANGE.fullmatch(node.value):
            problem = f"{node.value} is a number of base 8 or 60 in YAML: quote it, or write it without 0 or colon"
            raise ConstructorError(None, None, problem, node.start_mark)
        try:
            value = super().construct_object(node, deep)
            if isinstance(node, yaml.ScalarNode):
                json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, LookupError) as error:  # .inf, half a surrogate pair, `!!int x`, 5,000 digits
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(
                None, None, f"{shortened(node.value)} is not a valid {kind} for a spec", node.start_mark
            ) from error
        return value


def _inner(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [inner for pair in node.value for inner in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def fault(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """Return the problem and its position in the file, without the text there.

    That text may be a part of a URL, in which a password is not recognised and would be printed.
    """
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    return f"{error.problem} at line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
