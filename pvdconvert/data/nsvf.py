"""NSVF's folders, of Synthetic-NSVF, Tanks and Temples, BlendedMVS (layouts 9.3). No torch.

``pose/`` (4x4 OpenCV camera to world) and ``rgb/`` by the same names, whose prefix is the split: 0_ train, 1_ val, 2_
test; without 2_, the test pictures are 1_. ``intrinsics.txt`` is a matrix, or begins with f cx cy; ``bbox.txt`` is min,
max and a voxel's side; ``near_far.txt`` two numbers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pvdconvert.cameras import Camera
from pvdconvert.data import Dataset, Frame
from pvdconvert.data.common import Fit, Options, Shot, finished, hold_out
from pvdconvert.data.documents import folder_files, natural, numbers
from pvdconvert.data.pictures import SUFFIXES, Header, Picture, expect_size, header
from pvdconvert.data.poses import Hints, Straightener, from_opencv, rows, subject
from pvdconvert.errors import InputError
from pvdconvert.scene import Box

_PREFIX = {"0": "train", "1": "val", "2": "test"}


class Nsvf:
    """A folder of ``pose/``, ``rgb/`` and ``intrinsics.txt``."""

    name = "nsvf"
    title = "NSVF, Tanks and Temples: pose/, rgb/, intrinsics.txt"

    def probe(self, path: Path) -> Fit | None:
        if not path.is_dir() or not (path / "pose").is_dir() or not (path / "rgb").is_dir():
            return None
        if (path / "intrinsics.txt").is_file():
            return Fit(0.93, "pose/, rgb/ and intrinsics.txt")
        return Fit(0.5, "pose/ and rgb/, without intrinsics.txt")

    def load(self, path: Path, options: Options) -> Dataset:
        for name in ("pose", "rgb"):
            if not (path / name).is_dir():
                raise InputError(f"{path}: nsvf: no folder {name}/")
        poses = sorted(folder_files(path / "pose", (".txt",)), key=lambda p: natural(p.stem))
        by_name = {p.stem: p for p in folder_files(path / "rgb", SUFFIXES)}
        if not poses:
            raise InputError(f"{path / 'pose'}: nsvf: there are no poses in it")
        lost = [p.stem for p in poses if p.stem not in by_name]
        if lost:
            raise InputError(
                f"{path / 'rgb'}: {len(lost)} of {len(poses)} pictures missing: {', '.join(lost[:5])}",
                hint="one picture a pose, by name",
            )
        first = header(by_name[poses[0].stem])
        fx, fy, cx, cy = _intrinsics(path / "intrinsics.txt", first)
        straighten, small, shots = Straightener(), options.downscale, []
        for file in poses:
            values = numbers(file)
            if values.size not in (12, 16):
                raise InputError(f"{file}: {values.size} numbers, not a 4x4 pose")
            m = from_opencv(straighten(values.reshape(-1, 4), str(file)))
            picture = by_name[file.stem]
            size = header(picture)
            expect_size(picture, (size.width, size.height), (first.width, first.height))
            camera = Camera(size.width, size.height, fx, fy, cx, cy, rows(m), options.offset)
            read = Picture(picture, (size.width, size.height), small)
            shots.append(Shot(Frame(file.stem, camera.reduced(small), read), str(picture.resolve()), size.alpha))
        splits, notes = _splits(shots, options)
        notes += straighten.notes()
        extra = len(by_name) - len(poses)
        if extra > 0:
            notes.append(f"{extra} pictures of rgb/ have no pose: left out")
        box = _box(path / "bbox.txt")
        if box is None and options.bounds is None:
            box = subject([s.frame.camera for s in shots])
            notes.append("no bbox.txt: " + ("the box is guessed from what the cameras look at" if box else "no box"))
        near, far = _near_far(path / "near_far.txt")
        return finished(path, self.name, splits, options, Hints(box, near, far), notes)


def _splits(shots: list[Shot], options: Options) -> tuple[dict[str, list[Shot]], list[str]]:
    prefixes = [s.frame.name.partition("_") for s in shots]
    if not all(p and rest and p in _PREFIX for p, rest, _ in prefixes):
        return hold_out(shots, options)
    splits: dict[str, list[Shot]] = {"train": [], "val": [], "test": []}
    for shot, (prefix, _, _) in zip(shots, prefixes):
        splits[_PREFIX[prefix]].append(shot)
    if splits["test"]:
        return splits, []
    if not splits["val"]:
        return hold_out(shots, options)
    return {"train": splits["train"], "test": splits["val"]}, ["no pictures 2_*: the test pictures are 1_*"]


def _intrinsics(path: Path, size: Header) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy. Raises InputError where they are those of pictures of another size."""
    values = numbers(path)
    if values.size == 16 and abs(values[15] - 1) < 1e-6 and values[5] > 0:
        matrix = values.reshape(4, 4)
    elif values.size == 9:
        matrix = values.reshape(3, 3)
    else:
        # Of "f cx cy ..." the programs use f alone and put the axis in the middle.
        fx = fy = float(values[0])
        cx, cy = size.width / 2, size.height / 2
        matrix = None
    if matrix is not None:
        fx, fy, cx, cy = (float(matrix[i]) for i in ((0, 0), (1, 1), (0, 2), (1, 2)))
        if matrix[1, 0] or abs(matrix[0, 1]) > 1e-3 * fx:
            raise InputError(f"{path}: a sheared camera is not supported")
    stated = (2 * cx, 2 * cy) if matrix is not None else (2 * float(v) for v in values[1:3])
    if not (1e-3 < fx < 1e9 and 1e-3 < fy < 1e9):
        raise InputError(f"{path}: focal length {fx} x {fy} is not positive")
    for middle, pixels in zip(stated, (size.width, size.height)):
        if middle > 0 and not 0.5 < middle / pixels < 1.5:
            raise InputError(
                f"{path}: the principal point is that of a picture some {middle:.0f} pixels wide or high, not {pixels}",
                hint="the intrinsics belong to pictures of another size",
            )
    return fx, fy, cx, cy


def _box(path: Path) -> Box | None:
    if not path.is_file():
        return None
    values = numbers(path)
    if values.size < 6:
        raise InputError(f"{path}: {values.size} numbers, not min, max")
    low, high = ((float(v[0]), float(v[1]), float(v[2])) for v in (values[:3], values[3:6]))
    try:
        return Box(low, high)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _near_far(path: Path) -> tuple[float | None, float | None]:
    if not path.is_file():
        return None, None
    values = numbers(path)
    if values.size < 2 or not 0 <= values[0] < values[1] or not np.isfinite(values[:2]).all():
        raise InputError(f"{path}: not a near and a far distance")
    return float(values[0]), float(values[1])
