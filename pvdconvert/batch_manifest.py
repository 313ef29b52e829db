"""The manifest of a batch: CSV with a header, or JSON lines, into rows of text. Imports no torch.

Every error names file, row and column. Rows are counted as a spreadsheet counts them: the header of a CSV is row 1; of
JSON lines it is the line.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pvdconvert.errors import InputError, PvdError

MAX_BYTES = 1 << 26
MAX_ROWS = 1_000_000

COLUMNS: Mapping[str, str] = {
    "file": "",
    "to": "--to",
    "out": "--out",
    "as": "--as",
    "from": "--from",
    "preset": "--preset",
    "budget": "--budget",
    "max_mb": "--max-mb",
    "max_memory": "--max-memory",
    "method": "--method",
    "via": "--via",
    "set": "--set",
    "seed": "--seed",
    "min_psnr": "--min-psnr",
    "exact": "--exact",
    "dtype": "--dtype",
    "replay": "--replay",
    "cameras": "--cameras",
    "bounds": "--bounds",
    "background": "--background",
    "near": "--near",
    "far": "--far",
    "config": "--config",
    "extra": "--extra",
    "device": "--device",
    "report": "--report",
}
"""Column -> the option of ``convert`` that it stands for; ``file`` is the argument."""

LISTS = ("set", "extra")
"""Columns of several KEY=VALUE: in a CSV they are separated by ";"."""

FLAGS = ("exact",)
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0", "")


@dataclasses.dataclass(frozen=True)
class Record:
    """One row: column -> its values as text (several only for :data:`LISTS`); empty cells are left out."""

    manifest: Path
    number: int
    values: Mapping[str, tuple[str, ...]]

    def one(self, column: str) -> str | None:
        """The value of a column that is no list."""
        return next(iter(self.values.get(column, ())), None)

    def refused(self, column: str, why: PvdError | str) -> InputError:
        """An error that names this row and the column."""
        return InputError(f"{self.manifest}: row {self.number}, column {column!r}: {why}")


def read(path: Path) -> list[Record]:
    """The rows of a manifest, in its order. Raises InputError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes are too many for a manifest")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path}: is not text in UTF-8", hint="save the manifest as CSV, UTF-8") from error
    start = text.lstrip()[:1]
    if start == "[":
        raise InputError(f"{path}: is one JSON array", hint="one JSON object a line, or CSV")
    rows = list(_json_lines(path, text) if start == "{" else _csv(path, text))
    if not rows:
        raise InputError(f"{path}: has no rows", hint="a header with a column file, and a row for each conversion")
    if len(rows) > MAX_ROWS:
        raise InputError(f"{path}: has more than {MAX_ROWS} rows")
    for row in rows:
        if row.one("file") is None:
            raise row.refused("file", "is empty")
    return rows


def _column(path: Path, number: int, name: str) -> str:
    plain = name.strip().lower().removeprefix("--").replace("-", "_")
    if plain in COLUMNS:
        return plain
    near = difflib.get_close_matches(plain, COLUMNS, 1, 0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(COLUMNS)}"
    raise InputError(f"{path}: row {number}, column {name.strip()!r}: is unknown", hint=hint)


def _csv(path: Path, text: str) -> Iterator[Record]:
    lines = text.splitlines(keepends=True)
    first = next((line for line in lines if line.strip() and not line.lstrip().startswith("#")), "")
    delimiter = max(",;\t", key=first.count)  # spreadsheets write what their language takes for a comma
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    number = 0
    try:
        for cells in reader:
            number = reader.line_num
            if not any(c.strip() for c in cells) or cells[0].lstrip().startswith("#"):
                continue
            if not header:
                header = [_column(path, number, c) for c in cells]
                twice = next((c for k, c in enumerate(header) if c in header[:k]), None)
                if twice is not None:
                    raise InputError(f"{path}: row {number}, column {twice!r}: is there twice")
                if "file" not in header:
                    raise InputError(f"{path}: row {number}: no column 'file'", hint="the first row names the columns")
                continue
            if len(cells) > len(header):
                raise InputError(
                    f"{path}: row {number}: {len(cells)} cells, and {len(header)} columns",
                    hint="quote what holds a comma",
                )
            values: dict[str, tuple[str, ...]] = {}
            for name, cell in zip(header, cells):
                parts = cell.split(";") if name in LISTS else [cell]
                kept = tuple(p.strip() for p in parts if p.strip())
                if kept:
                    values[name] = kept
            yield _checked(Record(path, number, values))
    except csv.Error as error:
        raise InputError(f"{path}: row {reader.line_num or number + 1}: {error}") from error


def _json_lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: row {number}: is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise InputError(f"{path}: row {number}: is not a JSON object")
        values: dict[str, tuple[str, ...]] = {}
        blank = Record(path, number, {})
        for key, value in found.items():
            name = _column(path, number, key)
            if name in values:
                raise blank.refused(name, "is there twice")
            if value is not None and value != "":
                values[name] = _texts(blank, name, value)
        yield _checked(Record(path, number, values))


def _texts(blank: Record, name: str, value: Any) -> tuple[str, ...]:
    """A JSON value as the command line would have it."""
    if name in LISTS and isinstance(value, dict):
        return tuple(f"{k}={_text(v)}" for k, v in value.items())
    if name in LISTS and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    numbers = isinstance(value, list) and value and all(type(v) in (int, float) for v in value)
    if numbers and name not in LISTS:  # bounds, background
        return (",".join(map(repr, value)),)
    if isinstance(value, (dict, list)):
        raise blank.refused(name, f"takes text or a number, got {json.dumps(value)[:60]}")
    return (_text(value),)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _checked(record: Record) -> Record:
    for name in FLAGS:
        text = (record.one(name) or "").lower()
        if text not in _TRUE + _FALSE:
            raise record.refused(name, f"takes yes or no, got {text!r}")
    values = {k: v if k not in FLAGS else ("yes",) for k, v in record.values.items()}
    values = {k: v for k, v in values.items() if k not in FLAGS or record.values[k][0].lower() in _TRUE}
    return dataclasses.replace(record, values=values)
