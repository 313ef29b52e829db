"""A program's YAML settings, read safely: python tags become inert values, and size, depth and aliases are bounded.

nerfstudio's ``config.yml`` is a pickled object tree in YAML clothes (``!!python/object:...``): nothing of it is looked
up or run here. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from pvdconvert.errors import InputError

MAX_CHARACTERS = 1 << 18
MAX_DEPTH = 48
MAX_NODES = 50_000
"""Of the document with every alias written out."""
MAX_NUMBER = 64
"""Longer scalars stay text: numbers with colons (base 60) take quadratic time."""

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Inert(_Base):  # type: ignore[misc]
    """SafeLoader without merge keys, for which any unknown tag is the plain value under it."""

    def flatten_mapping(self, node: Any) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "merge keys are not supported", key.start_mark)


def _plain(loader: Any, suffix: str, node: Any) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    # "!!python/name:module.attribute ''": the name is the value.
    return node.value or suffix.rpartition(":")[2]


def _number(kind: str) -> Any:
    standard = yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{kind}"]

    def construct(loader: Any, node: Any) -> Any:
        return standard(loader, node) if len(node.value) <= MAX_NUMBER else node.value

    return construct


_Inert.add_multi_constructor("", _plain)
_Inert.add_multi_constructor("!", _plain)
for _kind in ("int", "float", "timestamp", "binary"):
    _Inert.add_constructor(f"tag:yaml.org,2002:{_kind}", _number(_kind))


def load(text: str, where: str) -> Any:
    """The value of a one-document YAML ``text``: dicts, lists, scalars.

    Mappings, sequences and scalars under unknown or python tags come as themselves, ``!!python/name:x`` as "x". Raises
    InputError naming ``where``: malformed, too large, too deep, an alias bomb or a circle.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{where}: {len(text)} characters of YAML are too many for settings")
    try:
        _check(text, where)
        return yaml.load(text, Loader=_Inert)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise InputError(f"{where}: not readable as YAML: {error!s:.200}") from error


def _check(text: str, where: str) -> None:
    """Walk the events, which nest nothing: depth, size with aliases written out, circles."""
    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=_Base):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise InputError(f"{where}: YAML alias {event.anchor!r:.40} refers to itself or to nothing")
            total += sizes[event.anchor]
        elif isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            if event.anchor is not None:
                sizes.pop(event.anchor, None)
            open_.append((event.anchor, total))
            total += 1
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if len(open_) > MAX_DEPTH or total > MAX_NODES:
            raise InputError(f"{where}: YAML nested too deep or too large for settings")


def lookup(tree: Any, path: str, default: Any = None) -> Any:
    """The value at a dotted ``path`` of nested mappings; ``default`` where there is none, or null."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return default if tree is None else tree
