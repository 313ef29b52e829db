"""The frames of a ``transforms*.json`` (layouts 9.1, 9.4, 9.5): cameras with lenses, pictures, masks. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.cameras import Camera
from pvdconvert.data import Frame, pictures
from pvdconvert.data.common import MAX_FRAMES, Options, Shot
from pvdconvert.data.documents import focal_of, inside, natural, number, positive, read_json
from pvdconvert.data.pictures import Mask, Picture, found, header
from pvdconvert.data.poses import Straightener, rows
from pvdconvert.errors import InputError
from pvdconvert.lens import from_keys

PIXEL = 0.1
"""How many pixels a ray may miss its own by before the lens is said not to reach it."""
_OWN = ("w", "h", "fl_x", "fl_y", "camera_angle_x", "camera_angle_y", "x_fov", "y_fov")


@dataclasses.dataclass
class FrameReader:
    """Reads the frames of one or more files of a folder, and gathers what there is to say about them.

    common  the size of the pictures of a file that states none: one focal length belongs to one size
    """

    options: Options
    straighten: Straightener = dataclasses.field(default_factory=Straightener)
    missing: list[str] = dataclasses.field(default_factory=list)
    beyond: int = 0
    common: tuple[int, int] | None = None

    def read(self, path: Path) -> tuple[dict[str, Any], list[Shot]]:
        """The JSON object, and its frames in natural order of their names. Raises InputError or UnsafeError.

        Pictures that are not there are named in :attr:`missing`. Cameras ``from_mitsuba`` look along +z and are turned.
        """
        data, self.common = read_json(path), None
        mitsuba = bool(data.get("from_mitsuba"))
        frames = listed(data, path)
        if "n_frames" in data:
            frames = frames[: int(positive(data, "n_frames", str(path)) or 0)]
        shots = [s for n, f in frames if (s := self._shot(path, data, f, f"{path}: frames[{n}]", mitsuba)) is not None]
        return data, shots

    def _shot(
        self, path: Path, data: Mapping[str, Any], frame: Mapping[str, Any], where: str, mitsuba: bool
    ) -> Shot | None:
        name = frame.get("file_path")
        wanted = inside(path.parent, name, where)
        picture = found(wanted)
        if picture is None:
            self.missing.append(str(name))
            return None
        size = header(picture)
        camera = self._camera(data, frame, where, mitsuba, picture, size)
        full, small = (camera.width, camera.height), self.options.downscale
        camera = camera.reduced(small)
        apart = picture.with_name(f"{picture.stem}.alpha{picture.suffix}")
        alpha = apart if apart.is_file() else None
        read = Picture(picture, full, small, alpha)
        mask: Mask | Reached | None = self._mask(path, frame, where, picture, full)
        if camera.lens is not None and not _border_reached(camera):
            self.beyond += 1
            mask = Reached(camera, mask)
        stem = Path(str(name)).name
        if Path(stem).suffix.lower() in pictures.SUFFIXES:
            stem = Path(stem).stem
        key = str(picture.resolve())
        return Shot(Frame(stem, camera, read, mask), key, size.alpha or alpha is not None, str(name))

    def _camera(
        self,
        data: Mapping[str, Any],
        frame: Mapping[str, Any],
        where: str,
        mitsuba: bool,
        picture: Path,
        size: pictures.Header,
    ) -> Camera:
        if "transform_matrix" not in frame:
            other = "transform_matrix_start" in frame
            raise InputError(
                f"{where}: "
                + ("a rolling shutter (transform_matrix_start) is not supported" if other else "no 'transform_matrix'")
            )
        both = {**data, **frame}
        given = tuple(positive(both, key, where) for key in ("w", "h"))
        if given[0] is not None and given[1] is not None:
            pictures.expect_size(picture, (size.width, size.height), (round(given[0]), round(given[1])))
        elif not any(key in frame for key in _OWN):
            self.common = self.common or (size.width, size.height)
            pictures.expect_size(picture, (size.width, size.height), self.common)
        fx, fy = focal_lengths(data, frame, size.width, size.height, where)
        cx, cy = number(both, "cx", where), number(both, "cy", where)
        cx, cy = size.width / 2 if cx is None else cx, size.height / 2 if cy is None else cy
        if not (-size.width < cx < 2 * size.width and -size.height < cy < 2 * size.height):
            raise InputError(f"{where}: the principal point {cx}, {cy} is far outside of the picture")
        m = self.straighten(frame["transform_matrix"], where)
        if mitsuba:
            m[:, (0, 2)] *= -1.0
        lens = from_keys(both, where)
        return Camera(size.width, size.height, fx, fy, cx, cy, rows(m), self.options.offset, lens)

    def _mask(
        self, path: Path, frame: Mapping[str, Any], where: str, picture: Path, size: tuple[int, int]
    ) -> Mask | None:
        named = frame.get("mask_path")
        if named is not None:
            mask = found(inside(path.parent, named, where))
            if mask is None:
                raise InputError(f"{where}: the mask {named!r:.100} is missing")
            return Mask(mask, size, self.options.downscale)
        dynamic = picture.with_name(f"dynamic_mask_{picture.stem}.png")
        return Mask(dynamic, size, self.options.downscale, inverted=True) if dynamic.is_file() else None

    def notes(self) -> list[str]:
        out = self.straighten.notes()
        if self.missing:
            out.append(f"{_count(self.missing)} missing and left out: {_some(self.missing)}")
        if self.beyond:
            out.append(f"the lens reaches no ray for some pixels of {self.beyond} pictures: they are masked out")
        return out

    def refuse_missing(self, path: Path) -> None:
        """Raise InputError where pictures are missing, naming the first ones."""
        if self.missing:
            raise InputError(
                f"{path}: {_count(self.missing)} missing: {_some(self.missing)}", hint="or take them out of the json"
            )


@dataclasses.dataclass(frozen=True)
class Reached:
    """The pixels that the lens reaches, of those that ``mask`` lets count."""

    camera: Camera
    mask: Mask | Reached | None

    def __call__(self) -> NDArray[np.bool_]:
        c = self.camera
        j, i = np.meshgrid(np.arange(c.height), np.arange(c.width), indexing="ij")
        out = _reached(c, i.reshape(-1), j.reshape(-1)).reshape(c.height, c.width)
        return out if self.mask is None else out & self.mask()


def _reached(camera: Camera, i: NDArray[Any], j: NDArray[Any]) -> NDArray[np.bool_]:
    if camera.lens is None:
        return np.ones(i.shape, dtype=np.bool_)
    uv = np.stack([(i + camera.offset - camera.cx) / camera.fx, (j + camera.offset - camera.cy) / camera.fy], -1)
    return camera.lens.reaches(uv, PIXEL / max(camera.fx, camera.fy))


def _border_reached(camera: Camera) -> bool:
    i, j = np.arange(camera.width), np.arange(camera.height)
    columns = np.concatenate([i, i, 0 * j, 0 * j + camera.width - 1])
    lines = np.concatenate([0 * i, 0 * i + camera.height - 1, j, j])
    return bool(_reached(camera, columns, lines).all())


def listed(data: Mapping[str, Any], path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The frames with their number in the file, in natural order of their names. Raises InputError."""
    frames = data.get("frames")
    if not isinstance(frames, list):
        raise InputError(f"{path}: no list 'frames' in it: not a transforms.json")
    if not frames or len(frames) > MAX_FRAMES:
        raise InputError(f"{path}: 'frames' is empty" if not frames else f"{path}: {len(frames)} frames: too many")
    for n, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise InputError(f"{path}: frames[{n}]: no 'file_path'")
    return sorted(enumerate(frames), key=lambda pair: natural(pair[1]["file_path"]))


def focal_lengths(
    data: Mapping[str, Any], frame: Mapping[str, Any], width: int, height: int, where: str
) -> tuple[float, float]:
    """fx, fy in pixels: of the frame before the file; per axis ``x_fov`` (degrees), ``fl_x``, ``camera_angle_x``; an
    axis that has none copies the other."""

    def axis(name: str, pixels: int) -> float | None:
        for source in (frame, data):
            degrees = positive(source, f"{name}_fov", where)
            if degrees is not None:
                return focal_of(pixels, float(np.radians(degrees)), where)
            focal = positive(source, f"fl_{name}", where)
            if focal is not None:
                return focal
            angle = number(source, f"camera_angle_{name}", where)
            if angle is not None:
                return focal_of(pixels, angle, where)
        return None

    fx, fy = axis("x", width), axis("y", height)
    if fx is None and fy is None:
        raise InputError(f"{where}: no focal length", hint="camera_angle_x, fl_x or x_fov")
    return (fx or fy or 0.0, fy or fx or 0.0)


def _count(names: list[str]) -> str:
    return "1 picture is" if len(names) == 1 else f"{len(names)} pictures are"


def _some(names: list[str], most: int = 5) -> str:
    shown = ", ".join(n[:80] for n in names[:most])
    return shown if len(names) <= most else f"{shown}, ..."
