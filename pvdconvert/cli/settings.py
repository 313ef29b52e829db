"""``--set key=value``: text becomes a value of the type that the architecture declares for it. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pvdconvert.errors import UsageError
from pvdconvert.plugin import option_help

_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def hints(options: type) -> dict[str, Any]:
    """The declared types of an options dataclass."""
    return typing.get_type_hints(options)


def shorthands(options: type) -> list[str]:
    """Keys that only a planner knows: those that the help of a configuration key offers as ``--set KEY=...``."""
    texts = [text for _, _, text in option_help(options)]
    return [key for text in texts for key in re.findall(r"--set (\w+)=", text)]


def type_name(hint: Any) -> str:
    """A type as a user reads it: "int", "int or none", "'mlp' or 'sh'"."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return " or ".join(str(v) for v in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else type_name(a) for a in typing.get_args(hint))
    if origin in (tuple, list, Sequence):
        inner = [a for a in typing.get_args(hint) if a is not Ellipsis]
        if origin is tuple and Ellipsis not in typing.get_args(hint) and inner:
            return ",".join(type_name(a) for a in inner)
        return f"{type_name(inner[0])},..." if inner else "list"
    if origin in (dict, Mapping):
        return "a JSON object"
    return getattr(hint, "__name__", str(hint))


def parse(pairs: Sequence[str], options: type, architecture: str) -> dict[str, Any]:
    """The values of ``--set`` for ``architecture``. Raises UsageError naming the key and what it takes."""
    known = {**dict.fromkeys(shorthands(options), Any), **hints(options)}
    names = [*(f.name for f in dataclasses.fields(options)), *shorthands(options)]
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().removeprefix(f"{architecture}.").replace("-", "_")
        if not equals or not key:
            raise UsageError(
                f"--set {pair}: expected KEY=VALUE", hint=f"pvdconvert formats {architecture} lists the keys"
            )
        if key not in names:
            near = difflib.get_close_matches(key, names, 1, 0.5)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise UsageError(
                f"--set {pair}: {architecture} has no key {key!r}",
                hint=f"{meant}pvdconvert formats {architecture} lists them",
            )
        if key in values:
            raise UsageError(f"--set {key}: given twice")
        try:
            values[key] = value(known[key], text.strip())
        except ValueError:
            raise UsageError(f"--set {pair}: {key} takes {type_name(known[key])}") from None
    return values


def value(hint: Any, text: str) -> Any:
    """``text`` as a value of type ``hint``; ValueError if it is none."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _json(text)
    if hint is type(None):
        if text.lower() in ("none", "null"):
            return None
        raise ValueError
    if origin is typing.Literal:
        for choice in inner:
            if text == str(choice):
                return choice
        raise ValueError
    if origin in (typing.Union, types.UnionType):
        # None first and str last: text fits a string always.
        for member in sorted(inner, key=lambda a: (a is str, a is not type(None))):
            try:
                return value(member, text)
            except ValueError:
                continue
        raise ValueError
    if hint is bool:
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        raise ValueError
    if hint is int:
        return int(text, 0) if text.lower().lstrip("+-").startswith(("0x", "0b")) else int(text)
    if hint is float:
        number = float(text)
        if number != number:
            raise ValueError
        return number
    if hint is str:
        return text
    if origin in (tuple, list, Sequence) or hint in (tuple, list):
        return _sequence(hint, text)
    if origin in (dict, Mapping) or hint is dict:
        return _mapping(text)
    return _json(text)


def _sequence(hint: Any, text: str) -> Any:
    """A list, as JSON has it. One number for a tuple of numbers passes as that number: planners may spread it."""
    inner = typing.get_args(hint)
    if text.startswith("["):
        items = [item if isinstance(item, str) else json.dumps(item) for item in json.loads(text)]
    else:
        items = [item.strip() for item in text.strip("()").split(",") if item.strip()]
        if len(items) == 1 and len(inner) > 1 and Ellipsis not in inner:
            return value(inner[0], items[0])
    if len(inner) > 1 and Ellipsis not in inner:
        if len(items) != len(inner):
            raise ValueError
        return [value(h, item) for h, item in zip(inner, items, strict=True)]
    return [value(inner[0] if inner else Any, item) for item in items]


def _mapping(text: str) -> Any:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError
    return found


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
