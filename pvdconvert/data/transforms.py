"""``transforms.json`` of instant-ngp (layouts 9.4) and nerfstudio (9.5). No torch.

The world is that of the transform matrices. What nerfstudio says of the way from COLMAP's (``applied_transform``) is
told in ``Dataset.world``; instant-ngp's unit cube (``scale``, ``offset``, ``aabb_scale``) is the box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pvdconvert.data import Dataset
from pvdconvert.data.common import Fit, Options, Shot, finished, hold_out
from pvdconvert.data.documents import natural, number, positive, read_json
from pvdconvert.data.frames import FrameReader
from pvdconvert.data.poses import Hints, subject
from pvdconvert.errors import InputError, PvdError
from pvdconvert.scene import Box

MAX_FILES = 32
_NGP = ("aabb_scale", "scale", "offset", "aabb")
_UNUSED = ("white_transparent", "black_transparent", "n_extra_learnable_dims", "rolling_shutter", "fix_premult")
_LISTS = {"train": "train_filenames", "val": "val_filenames", "test": "test_filenames"}


class Transforms:
    """A folder with ``transforms.json`` (or other json files with frames, which instant-ngp reads together), or one
    such file."""

    name = "transforms"
    title = "instant-ngp, nerfstudio: transforms.json"

    def probe(self, path: Path) -> Fit | None:
        files = _files(path)
        if not files:
            return None
        if path.is_file():
            return Fit(0.9, "a json object with frames and transform_matrix")
        named = files[0].name == "transforms.json"
        return Fit(0.9 if named else 0.6, f"{', '.join(f.name for f in files[:4])} with frames and transform_matrix")

    def load(self, path: Path, options: Options) -> Dataset:
        files = _files(path, strict=True)
        if not files:
            raise InputError(f"{path}: transforms: no json file with 'frames' in it")
        reader = FrameReader(options)
        shots: list[Shot] = []
        documents = []
        for file in files:
            data, found = reader.read(file)
            documents.append(data)
            shots += found
        if not shots:
            raise InputError(f"{files[0]}: none of its {len(reader.missing)} pictures is there: {reader.missing[0]}")
        if len(files) > 1:
            shots.sort(key=lambda s: natural(s.key))
        data, notes = documents[0], reader.notes()
        ignored = sorted(k for k in _UNUSED if any(d.get(k) for d in documents))
        if ignored:
            notes.append(f"not used: {', '.join(ignored)}")
        splits, held = _splits(data, shots, options)
        cameras = [s.frame.camera for s in shots]
        hints = Hints(_box(data, str(files[0]), notes))
        if hints.box is None and options.bounds is None:
            hints = Hints(subject(cameras))
            guess = "is guessed from what the cameras look at" if hints.box else "is unknown"
            notes.append(f"the file does not say where the scene is: the box {guess}")
        world = _original(data, str(files[0]))
        return finished(path, self.name, splits, options, hints, [*held, *notes], world=world)


def _files(path: Path, *, strict: bool = False) -> list[Path]:
    """transforms.json, else every json with frames and matrices. ``strict`` raises what is wrong with the only one."""
    if path.is_file():
        if strict:
            return [path]
        return [path] if path.suffix.lower() == ".json" and _has_frames(path) else []
    if (path / "transforms.json").is_file():
        return [path / "transforms.json"]
    try:
        candidates = sorted(p for p in path.iterdir() if p.suffix.lower() == ".json" and p.is_file())[:MAX_FILES]
    except OSError:
        return []
    return [p for p in candidates if _has_frames(p)]


def _has_frames(path: Path) -> bool:
    try:
        frames = read_json(path).get("frames")
    except PvdError:
        return False
    first = frames[0] if isinstance(frames, list) and frames else None
    return isinstance(first, dict) and any(k.startswith("transform_matrix") for k in first)


def _splits(
    data: Mapping[str, Any], shots: Sequence[Shot], options: Options
) -> tuple[dict[str, list[Shot]], list[str]]:
    """nerfstudio's lists of names where the file has them, else held out."""
    named = {s: data[key] for s, key in _LISTS.items() if isinstance(data.get(key), list)}
    if not named.get("train"):
        return hold_out(shots, options)
    out: dict[str, list[Shot]] = {}
    left = 0
    owner: dict[str, str] = {}
    for split, names in reversed(named.items()):
        owner |= {_plain(str(n)): split for n in names}
    for shot in shots:
        name = _plain(shot.name)
        if name in owner:
            out.setdefault(owner[name], []).append(shot)
        else:
            left += 1
    notes = [f"splits by the file's {', '.join(_LISTS[s] for s in named)}"]
    if left:
        notes.append(f"{left} pictures are in no split: left out")
    return out, notes


def _plain(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


def _box(data: Mapping[str, Any], where: str, notes: list[str]) -> Box | None:
    """The box of instant-ngp's keys, in the world of the matrices: p_cube = p * scale + offset, up to its order of
    axes, and the box is the cube of side aabb_scale around the middle 0.5."""
    if not any(k in data for k in _NGP):
        return None
    if data.get("aabb") is not None:
        try:
            low, high = (_three([*v], where, "aabb") for v in data["aabb"])
        except (TypeError, ValueError):
            raise InputError(f"{where}: 'aabb' is not two corners") from None
        return Box(low, high)
    mitsuba = bool(data.get("from_mitsuba"))
    scale = positive(data, "scale", where) or (0.66 if mitsuba else 0.33)
    side = positive(data, "aabb_scale", where) or 1.0
    offset = np.asarray(_three(data.get("offset", 0.165 if mitsuba else 0.5), where, "offset"))
    center, half = (0.5 - offset) / scale, 0.5 * side / scale
    if math.log2(side) % 1.0 or side > 128:
        # instant-ngp refuses such a number; programs that write it centre their box on the offset.
        center = offset
        notes.append(f"aabb_scale {side:g} is no power of two: the box of side {side / scale:g} is centred on 'offset'")
    return Box.cube(half, [float(v) for v in center])


def _three(value: Any, where: str, key: str) -> tuple[float, float, float]:
    values = [value] * 3 if isinstance(value, (int, float)) else value
    if not isinstance(values, list) or len(values) != 3:
        raise InputError(f"{where}: {key!r} is {value!r:.60}, not three numbers")
    x, y, z = (number({key: v}, key, where) for v in values)
    if x is None or y is None or z is None:
        raise InputError(f"{where}: {key!r} is {value!r:.60}, not three numbers")
    return (x, y, z)


def _original(data: Mapping[str, Any], where: str) -> tuple[tuple[float, ...], ...]:
    """The matrices' world -> the one before nerfstudio's ``applied_transform`` and ``applied_scale``: their inverse."""
    applied = data.get("applied_transform")
    scale = positive(data, "applied_scale", where) or 1.0
    matrix = np.eye(4)
    if applied is not None:
        try:
            matrix[:3] = np.asarray(applied, dtype=np.float64)[:3]
        except (TypeError, ValueError, IndexError, OverflowError):
            raise InputError(f"{where}: 'applied_transform' is not 3x4 numbers") from None
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
        raise InputError(f"{where}: 'applied_transform' cannot be inverted")
    back = np.linalg.inv(matrix) @ np.diag([1 / scale, 1 / scale, 1 / scale, 1.0])
    return tuple(tuple(float(v) for v in row) for row in back)
