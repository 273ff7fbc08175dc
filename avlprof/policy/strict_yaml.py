"""YAML as it is meant: each key once, numbers as people read them, and bounded in size and depth.

PyYAML reads `010` as 8 and `1:30` as 90, takes the last of two equal keys, follows aliases to any
size, and raises whatever a value trips over; here each of those is one sentence with its line.
"""

from __future__ import annotations

import re
from typing import Any, Final

import yaml

from avlprof.errors import UserError, cut, shortened

MOST_CHARACTERS: Final = 1_000_000
MOST_NODES: Final = 20_000
"""Values of a file, those that aliases repeat counted each time."""
DEEPEST: Final = 20
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_LARGEST, _DIGITS = 2**63, 100

_TRIPS = (ValueError, TypeError, KeyError, AttributeError, OverflowError, IndexError, RecursionError)


class _Loader(yaml.SafeLoader):
    """Safe, and strict about keys and numbers."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _TRIPS:
            kind = node.tag.rpartition(":")[2].lstrip("!")
            raise _problem(node, f"is no {kind}") from None

    def construct_number(self, node: yaml.ScalarNode) -> int:
        text = str(node.value)
        if _OCTAL.fullmatch(text):
            raise _problem(node, "would be octal; write it without the leading zero, or in quotes")
        if ":" in text:
            raise _problem(node, "would be a number to the base of 60; write it in quotes")
        if len(text) > _DIGITS:
            raise _problem(node, "is too large a number")
        number: int = self.construct_yaml_int(node)
        if abs(number) >= _LARGEST:
            raise _problem(node, "is too large a number")
        return number

    def construct_decimal(self, node: yaml.ScalarNode) -> float:
        if ":" in str(node.value):
            raise _problem(node, "would be a number to the base of 60; write it in quotes")
        number: float = self.construct_yaml_float(node)
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_decimal)


def read_yaml(text: str, origin: str) -> Any:
    """The value of a YAML text; `UserError` names line, value and `origin`."""
    if len(text) > MOST_CHARACTERS:
        raise UserError(
            f"{origin} has {len(text)} characters, which is too much for a file of settings "
            f"(at most {MOST_CHARACTERS})"
        )
    try:
        _check_depth(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _expanded(node, {}, set()) > MOST_NODES:
                raise yaml.YAMLError(f"its aliases stand for more than {MOST_NODES} values")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError, *_TRIPS) as error:
        raise UserError(f"{cut(origin, 200)} is not valid YAML: {cut(str(error))}") from None


def _check_depth(text: str) -> None:
    """Events come one by one, so that nothing recurses before the depth is known."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"line {_line(event)} is nested deeper than {DEEPEST} levels")


def _expanded(node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """How many values a node stands for, what its aliases repeat counted each time."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise _problem(node, "holds itself")
    if id(node) not in sizes:
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(_expanded(part, sizes, above | {id(node)}) for part in parts)
    return sizes[id(node)]


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _problem(key, "cannot be a key")
        if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
            raise _problem(key, "stands twice in one section; keep one of them")
        seen.add(key.value)


def _problem(node: yaml.Node, what: str) -> yaml.YAMLError:
    value = (
        shortened(node.value)
        if isinstance(node, yaml.ScalarNode)
        else f"this {type(node).__name__.removesuffix('Node').lower()}"
    )
    return yaml.YAMLError(f"line {_line(node)}: {value} {what}")


def _line(part: yaml.Node | yaml.Event) -> int:
    return part.start_mark.line + 1 if part.start_mark is not None else 1
