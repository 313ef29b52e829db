"""Cameras and the pseudo-views that a conversion looks through. numpy only, no torch.

Convention: OpenGL. ``c2w`` columns are right (+x), up (+y), back (+z) and the position; the camera looks along -z.
A pixel (i, j) counts columns from the left and rows from the top; its ray passes ``(i + offset, j + offset)``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.errors import InputError
from pvdconvert.lens import Lens, from_keys

if TYPE_CHECKING:
    from pvdconvert.scene import Box, RaySpace

Array = NDArray[np.float64]

WIDEST = 0.98
"""Share of the picture that a box may reach."""


@dataclasses.dataclass(frozen=True, slots=True)
class Camera:
    """A pinhole camera, or one behind a lens.

    width, height   pixels
    fx, fy          focal lengths, pixels
    cx, cy          principal point, pixels from the top left corner
    c2w             3x4, row-major, OpenGL camera to world
    offset          where in a pixel its ray passes: 0.5 (centre) or 0 (the vanilla-NeRF programs)
    lens            what bends the rays; None = nothing
    """

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    c2w: tuple[tuple[float, ...], ...]
    offset: float = 0.5
    lens: Lens | None = None

    @property
    def position(self) -> Array:
        """[3], world units."""
        return np.asarray(self.c2w, dtype=np.float64)[:3, 3]

    def resized(self, width: int, height: int) -> Camera:
        """The same view at another size: the edges of the picture stay where they are, so a place in a pixel other than
        its centre moves (of rays at the corners of four pixels, the mean is at a quarter of the pixel they become)."""
        sx, sy = width / self.width, height / self.height
        fx, fy, cx, cy = self.fx * sx, self.fy * sy, self.cx * sx, self.cy * sy
        offset = 0.5 + (self.offset - 0.5) * sx
        return dataclasses.replace(self, width=width, height=height, fx=fx, fy=fy, cx=cx, cy=cy, offset=offset)

    def reduced(self, n: int) -> Camera:
        """Of the picture whose pixels are averages of ``n`` x ``n``; columns and rows left over are cut off. Raises
        InputError where nothing is left."""
        width, height = self.width // n, self.height // n
        if not width or not height:
            raise InputError(f"a picture of {self.width} x {self.height} pixels cannot be reduced {n} times")
        fx, fy, cx, cy = (v / n for v in (self.fx, self.fy, self.cx, self.cy))
        return dataclasses.replace(self, width=width, height=height, fx=fx, fy=fy, cx=cx, cy=cy)

    def rays(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Origins [H*W, 3] and unit directions [H*W, 3] of all pixels, row-major, world."""
        j, i = np.meshgrid(np.arange(self.height), np.arange(self.width), indexing="ij")
        return self.rays_at(i.reshape(-1).astype(np.float64), j.reshape(-1).astype(np.float64))

    def rays_at(self, i: Array, j: Array) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Origins and unit directions [N, 3] through pixel columns ``i`` and rows ``j`` [N] (fractions allowed)."""
        m = np.asarray(self.c2w, dtype=np.float64)
        u, v = (i + self.offset - self.cx) / self.fx, (j + self.offset - self.cy) / self.fy
        if self.lens is None:
            local = np.stack([u, -v, -np.ones_like(i)], axis=-1)
        else:
            local = self.lens.undistort(np.stack([u, v], axis=-1)) * (1.0, -1.0, -1.0)
        d = local @ m[:3, :3].T
        d /= np.linalg.norm(d, axis=-1, keepdims=True)
        o = np.broadcast_to(m[:3, 3], d.shape)
        return np.ascontiguousarray(o, dtype=np.float32), d.astype(np.float32)

    def project(self, points: Array) -> Array:
        """Pixel columns and rows [N, 2] at which points [N, 3] of the world are seen; NaN where they are not before
        the camera. The inverse of :meth:`rays_at`: the picture's edge is at -offset and width - offset."""
        m = np.asarray(self.c2w, dtype=np.float64)
        local = (np.asarray(points, dtype=np.float64) - m[:3, 3]) @ m[:3, :3] * (1.0, -1.0, -1.0)
        if self.lens is None:
            depth = np.where(local[:, 2:] > 0, local[:, 2:], np.nan)
            uv = local[:, :2] / depth
        else:
            uv = self.lens.distort(local)
        return np.asarray(uv * (self.fx, self.fy) + (self.cx, self.cy) - self.offset)

    def moved(self, matrix: Sequence[Sequence[float]] | Array) -> Camera:
        """The same view where the world is moved by ``matrix`` [4, 4], a rotation, uniform scale and translation.
        Raises InputError where it is none."""
        m = np.asarray(matrix, dtype=np.float64)
        scale = float(np.cbrt(np.linalg.det(m[:3, :3])))
        if not scale > 0 or not np.allclose(m[:3, :3].T @ m[:3, :3], scale**2 * np.eye(3), atol=1e-4 * scale**2):
            raise InputError("a camera cannot follow a world that is mirrored, sheared or stretched")
        c2w = m[:3, :3] @ np.asarray(self.c2w, dtype=np.float64)
        c2w[:, :3] /= scale
        c2w[:, 3] += m[:3, 3]
        return dataclasses.replace(self, c2w=tuple(tuple(float(v) for v in row) for row in c2w))

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["c2w"] = [list(row) for row in self.c2w]
        del data["lens"]
        return data if self.lens is None else {**data, "lens": self.lens.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Camera:
        return cls(
            int(data["width"]),
            int(data["height"]),
            float(data["fx"]),
            float(data["fy"]),
            float(data["cx"]),
            float(data["cy"]),
            tuple(tuple(float(v) for v in row) for row in data["c2w"]),
            float(data.get("offset", 0.5)),
            None if data.get("lens") is None else Lens.from_json(data["lens"]),
        )


def look_at(
    position: Sequence[float] | Array, target: Sequence[float] | Array, up: Sequence[float] = (0.0, 0.0, 1.0)
) -> Array:
    """c2w [3, 4] of a camera at ``position`` that looks at ``target``; falls back to +y where ``up`` is degenerate."""
    p, t = np.asarray(position, dtype=np.float64), np.asarray(target, dtype=np.float64)
    back = p - t
    norm = float(np.linalg.norm(back))
    if norm == 0.0:
        raise InputError("a camera cannot look at its own position")
    back /= norm
    right = np.cross(np.asarray(up, dtype=np.float64), back)
    if np.linalg.norm(right) < 1e-6:
        right = np.cross(np.array([0.0, 1.0, 0.0]), back)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(back, right), back, p], axis=1)


def fit_camera(
    box: Box, direction: Sequence[float] | Array, size: int, *, fill: float = 0.66, fov: float = 0.7
) -> Camera:
    """A square camera in ``direction`` of the box's centre in which the box fills about ``fill`` of the height.

    ``fov`` is the full angle in radians, ``size`` pixels. The eight projected corners fill ``fill`` of the height, less
    only where a wide box would leave the picture.
    """
    center = np.asarray(box.center)
    d = np.asarray(direction, dtype=np.float64)
    d = d / np.linalg.norm(d)
    corners = np.array([[(box.min, box.max)[b >> k & 1][k] for k in range(3)] for b in range(8)])
    focal = 0.5 * size / math.tan(0.5 * fov)
    low, high = 0.55 * box.diagonal, 100.0 * box.diagonal
    for _ in range(60):
        radius = math.sqrt(low * high)
        m = look_at(center + d * radius, center)
        local = (corners - m[:, 3]) @ m[:, :3]
        if (local[:, 2] >= -1e-6).any():
            low = radius
            continue
        v = focal * local[:, :2] / -local[:, 2:3]
        if np.ptp(v[:, 1]) > fill * size or 2 * np.abs(v).max() > WIDEST * size:
            low = radius
        else:
            high = radius
    m = look_at(center + d * high, center)
    return Camera(size, size, focal, focal, size / 2, size / 2, tuple(tuple(map(float, r)) for r in m))


def sphere_directions(count: int, seed: int) -> Array:
    """[count, 3] unit vectors spread evenly over the full sphere (a Fibonacci lattice in a random rotation)."""
    rng = np.random.default_rng(seed)
    k = np.arange(count) + 0.5
    z = 1.0 - 2.0 * k / count
    phi = math.pi * (1.0 + math.sqrt(5.0)) * k + rng.uniform(0, 2 * math.pi)
    r = np.sqrt(np.maximum(0.0, 1.0 - z * z))
    points = np.stack([r * np.cos(phi), r * np.sin(phi), z], axis=-1)
    # A rotation about a horizontal axis by a small random angle keeps the bands but moves the poles off the axis.
    a = rng.uniform(0.05, 0.3)
    rot = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    return np.asarray(points @ rot.T, dtype=np.float64)


def sphere_cameras(box: Box, count: int, size: int, seed: int, *, fill: float = 0.66) -> tuple[Camera, ...]:
    """``count`` cameras on the full sphere around ``box``, each filled by it (see :func:`fit_camera`)."""
    return tuple(fit_camera(box, d, size, fill=fill) for d in sphere_directions(count, seed))


def inside_cameras(space: RaySpace, count: int, size: int, seed: int, *, fov: float = 1.2) -> tuple[Camera, ...]:
    """Square pseudo-views of a contracted (unbounded) scene: from 0.7 to 0.95 of the radius that is not moved, about
    towards its centre, ``fov`` radians wide, so that what is far away fills the rest of the picture."""
    rng = np.random.default_rng(seed)
    center, focal = np.asarray(space.center), 0.5 * size / math.tan(0.5 * fov)
    out = []
    for direction in sphere_directions(count, seed):
        position = center + space.radius * rng.uniform(0.7, 0.95) * direction
        m = look_at(position, center + 0.15 * space.radius * rng.normal(size=3))
        c2w = tuple(tuple(map(float, row)) for row in m)
        out.append(Camera(size, size, focal, focal, size / 2, size / 2, c2w))
    return tuple(out)


def orbit_cameras(box: Box, count: int, size: int, *, elevation: float = 30.0, fill: float = 0.8) -> tuple[Camera, ...]:
    """``count`` cameras on a circle around +z at ``elevation`` degrees."""
    e = math.radians(elevation)
    angles = [2 * math.pi * k / count for k in range(count)]
    return tuple(
        fit_camera(box, (math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)), size, fill=fill)
        for a in angles
    )


def load_transforms(path: Path, *, width: int | None = None, height: int | None = None) -> tuple[Camera, ...]:
    """Cameras of a Blender / instant-ngp / nerfstudio ``transforms*.json`` (layouts sections 9.1, 9.4).

    Intrinsics: ``fl_x``/``fl_y`` else ``camera_angle_x``/``_y``; per frame before global. Sizes from ``w``/``h``, else
    from ``width``/``height``, else from the first frame's image file; lenses are kept. Raises InputError that names the
    file and key.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        frames = data["frames"]
        if not isinstance(frames, list) or not frames:
            raise InputError(f"{path}: 'frames' is empty")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a transforms.json: {error}") from error
    cameras = []
    for n, frame in enumerate(frames):
        try:
            both: dict[str, Any] = {**data, **frame}
            w, h = both.get("w", width), both.get("h", height)
            if w is None or h is None:
                w, h = width, height = _image_size(path.parent, str(frame["file_path"]))
            if not 0 < w < float("inf") or not 0 < h < float("inf"):
                raise InputError(f"{path}: frames[{n}]: the size {w} x {h} is not positive")
            m = np.asarray(frame["transform_matrix"], dtype=np.float64)
            m = m[:3, :4] if m.ndim == 2 else m
            if m.shape != (3, 4) or not np.isfinite(m).all():
                raise InputError(f"{path}: frames[{n}]: transform_matrix is not 4x4 finite numbers")
            if not np.allclose(m[:, :3].T @ m[:, :3], np.eye(3), atol=1e-2):
                raise InputError(f"{path}: frames[{n}]: transform_matrix is not a rotation and a translation")
            fx = both.get("fl_x") or _focal(w, both["camera_angle_x"])
            fy = both.get("fl_y") or (_focal(h, both["camera_angle_y"]) if "camera_angle_y" in both else fx)
            if not 0 < fx < float("inf") or not 0 < fy < float("inf"):
                raise InputError(f"{path}: frames[{n}]: the focal length {fx} x {fy} is not positive")
            cx, cy = both.get("cx", w / 2), both.get("cy", h / 2)
            c2w = tuple(tuple(map(float, row)) for row in m)
            lens = from_keys(both, f"{path}: frames[{n}]")
            cameras.append(Camera(int(w), int(h), float(fx), float(fy), float(cx), float(cy), c2w, lens=lens))
        except KeyError as error:
            raise InputError(f"{path}: frames[{n}]: missing key {error}") from error
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: frames[{n}]: {error}") from error
    return tuple(cameras)


def _focal(pixels: float, angle: float) -> float:
    """Focal length in pixels; infinite for an angle of nothing."""
    slope = math.tan(0.5 * float(angle))
    return 0.5 * pixels / slope if slope else float("inf")


def _image_size(folder: Path, name: str) -> tuple[int, int]:
    from PIL import Image

    for candidate in (folder / name, folder / f"{name}.png", folder / f"{name}.jpg"):
        if candidate.is_file():
            try:
                with Image.open(candidate) as image:
                    return image.size
            except OSError as error:
                raise InputError(f"{candidate}: not a readable image", hint="add 'w' and 'h' to the json") from error
    raise InputError(f"{folder / name}: no image there, so the size is unknown", hint="add 'w' and 'h' to the json")
