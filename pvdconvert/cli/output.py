"""What commands print: plain columns, units, and JSON. Nothing is cut, boxed or wrapped, so that it can be grepped."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from pvdconvert.report.words import decibel, duration, number, size

__all__ = [
    "block",
    "clean",
    "colored",
    "decibel",
    "duration",
    "emit",
    "number",
    "say",
    "size",
    "style",
    "table",
    "warn",
]

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}


def colored(stream: TextIO | None) -> bool:
    """Whether ``stream`` takes colour: NO_COLOR, then FORCE_COLOR, then whether it is a terminal that can."""
    if stream is None or os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def style(text: str, name: str, stream: TextIO | None = None) -> str:
    """``text`` in a style, if ``stream`` (stdout unless told) takes it."""
    return f"\033[{_STYLES[name]}m{text}\033[0m" if text and colored(stream or sys.stdout) else text


def say(text: str = "") -> None:
    """A line on stdout."""
    print(text)  # noqa: T201


def warn(text: str) -> None:
    """A line on stderr, with the program's name."""
    print(f"pvdconvert: {text}", file=sys.stderr)  # noqa: T201


def emit(document: Any) -> None:
    """The one JSON document of a ``--json`` run."""
    say(json.dumps(clean(document), indent=2, allow_nan=False))


def clean(value: Any) -> Any:
    """``value`` as plain JSON: no NaN (null), paths as text, tuples and numpy scalars as what they stand for."""
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [clean(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return clean(value.tolist())
    return str(value)


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> list[str]:
    """Aligned columns, two spaces apart; the columns in ``right`` are flush right, the last one is never padded."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max([len(h), *(len(row[k]) for row in text)]) for k, h in enumerate(headers)]
    flush = set(right)

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            c.rjust(w) if k in flush else c.ljust(w) for k, (c, w) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return [style(line(headers), "bold"), *(line(row) for row in text)]


def block(pairs: Iterable[tuple[str, object]]) -> list[str]:
    """ "name  value" lines with the values aligned; pairs whose value is None are left out."""
    shown = [(name, str(value)) for name, value in pairs if value is not None]
    width = max((len(name) for name, _ in shown), default=0)
    return [f"{name.ljust(width)}  {value}".rstrip() for name, value in shown]
