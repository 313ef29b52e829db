"""Settings that a program keeps as Python source: read as data, never run. Imports no torch."""

from __future__ import annotations

import ast
import operator
from pathlib import Path
from typing import Any

from pvdconvert.errors import InputError

_MATHS: dict[type[ast.operator], Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
MAX_POWER = 64
MAX_BYTES = 1 << 18


def read_text(path: Path) -> str:
    """The file that a user named. Raises InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise InputError(f"{path}: more than {MAX_BYTES} bytes: not the settings of a checkpoint")
        return raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}") from error


def assignments(text: str, where: str) -> dict[str, Any]:
    """``name = value`` of the module's top level whose value is made of literals, ``dict(key=value)`` and arithmetic.

    Other statements are left out. Raises InputError where ``text`` is not Python.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{where}: cannot be read as Python settings: {error}") from error
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = _value(node.value)
            except (TypeError, ValueError, ZeroDivisionError, OverflowError, RecursionError):
                continue  # computed by code that we do not run
    return found


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {_named(k.arg): _value(k.value) for k in node.keywords}
    if isinstance(node, ast.Dict):
        return {_named(k and _value(k)): _value(v) for k, v in zip(node.keys, node.values)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(v) for v in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(_value(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _number(_value(node.left)), _number(_value(node.right))
        if isinstance(node.op, ast.Pow):
            if abs(right) > MAX_POWER or abs(left) > 1 << 20:
                raise ValueError("a power too large")
            return left**right
        if type(node.op) in _MATHS:
            return _MATHS[type(node.op)](left, right)
    if isinstance(node, ast.Constant):
        return node.value
    raise ValueError("not a literal")


def _named(key: Any) -> Any:
    if not isinstance(key, str):
        raise ValueError("not a key")
    return key


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a number")
    return value
