"""Small texts of datasets, read within bounds: JSON, rows of numbers, and the names of files in them. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pvdconvert.cameras import Array
from pvdconvert.errors import InputError, UnsafeError

MAX_JSON = 64 << 20
MAX_TEXT = 1 << 20


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """The UTF-8 text of ``path``. Raises InputError where it cannot be read or has more than ``limit`` bytes."""
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) > limit:
        raise InputError(f"{path}: more than {limit} bytes: too large for what it should be")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text: {error.reason} at byte {error.start}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises InputError."""
    try:
        data = json.loads(read_text(path, MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: JSON, but not an object with 'frames'")
    return data


def number(data: Mapping[str, Any], key: str, where: str) -> float | None:
    """``data[key]`` as a finite number, None where it is missing or null. Raises InputError naming the key."""
    value = data.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e18 < value < 1e18:
        raise InputError(f"{where}: {key!r} is {value!r:.40}, not a number")
    return float(value)


def positive(data: Mapping[str, Any], key: str, where: str) -> float | None:
    """As :func:`number`, and above zero."""
    value = number(data, key, where)
    if value is not None and value <= 0:
        raise InputError(f"{where}: {key!r} is {value}, not positive")
    return value


def numbers(path: Path) -> Array:
    """All numbers of a text, in order, [N] finite. Raises InputError."""
    words = read_text(path).split()
    try:
        out = np.array([float(w) for w in words], dtype=np.float64)
    except ValueError as error:
        raise InputError(f"{path}: not numbers: {error}") from error
    if not len(out) or not np.isfinite(out).all():
        raise InputError(f"{path}: no finite numbers in it")
    return out


def inside(folder: Path, name: Any, where: str) -> Path:
    """``folder / name`` for a name that a file gives. Raises UnsafeError where it leads out of the folder."""
    if not isinstance(name, str) or not name or "\0" in name or len(name) > 4096:
        raise InputError(f"{where}: {name!r:.60} is not the name of a file")
    text = name.replace("\\", "/")
    if text.startswith(f"{folder.absolute().as_posix()}/"):
        text = text[len(folder.absolute().as_posix()) + 1 :]
    depth = 0
    for part in PurePosixPath(text).parts:
        depth += -1 if part == ".." else 1
        if depth < 0 or part == "/" or re.fullmatch(r"[A-Za-z]:", part):
            raise UnsafeError(
                f"{where}: {name!r:.100} leads out of the folder {folder}: refused", hint="move the pictures into it"
            )
    return folder / text


def natural(name: str) -> list[tuple[int, int | str]]:
    """A sort key by which r_2 comes before r_10."""
    return [(0, int(w)) if w.isdecimal() and len(w) < 19 else (1, w) for w in re.split(r"(\d+)", name)]


def folder_files(folder: Path, suffixes: tuple[str, ...], limit: int = 200_000) -> list[Path]:
    """Regular files in ``folder`` with one of ``suffixes``, sorted by name. Raises InputError."""
    try:
        found = [p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.is_file()]
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror or error}") from error
    if len(found) > limit:
        raise InputError(f"{folder}: {len(found)} files: more than a dataset has")
    return sorted(found, key=lambda p: p.name)


def focal_of(pixels: float, angle: float, where: str) -> float:
    """Focal length in pixels of a full angle of view in radians."""
    if not 1e-4 < angle < math.pi - 1e-4:
        raise InputError(f"{where}: an angle of view of {angle} is not between 0 and pi")
    return 0.5 * pixels / math.tan(0.5 * angle)
