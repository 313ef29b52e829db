"""Camera poses as files have them: checked, made orthonormal where they nearly are, and what they look at. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pvdconvert.cameras import Array, Camera
from pvdconvert.errors import InputError
from pvdconvert.scene import Box

EXACT = 1e-4
"""Largest entry of R^T R - I that is rounding (files are often in single precision)."""
NEARLY = 2e-2
"""Beyond it a matrix is no rotation."""


class Hints(NamedTuple):
    """Where the scene is and where rays begin and end, world units; None = nothing says."""

    box: Box | None = None
    near: float | None = None
    far: float | None = None


@dataclasses.dataclass
class Straightener:
    """Turns matrices into poses and counts those that had to be made orthonormal."""

    count: int = 0
    worst: float = 0.0

    def __call__(self, matrix: Any, where: str) -> Array:
        """[3, 4] of a 3x4 or 4x4 ``matrix``. Raises InputError where it is no rotation and translation."""
        try:
            m = np.asarray(matrix, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            m = np.empty(0)
        if m.shape not in ((3, 4), (4, 4)) or not np.isfinite(m).all():
            raise InputError(f"{where}: the pose is not 4x4 finite numbers")
        m = m[:3].copy()
        if np.abs(m).max() > 1e9:
            raise InputError(f"{where}: the pose holds {np.abs(m).max():.3g}: no camera stands there")
        rotation = m[:, :3]
        error = float(np.abs(rotation.T @ rotation - np.eye(3)).max())
        if error > NEARLY:
            raise InputError(f"{where}: the pose is not a rotation and a translation (off by {error:.2g})")
        if np.linalg.det(rotation) < 0:
            raise InputError(f"{where}: the pose mirrors: its axes are left-handed")
        if error > EXACT:
            self.count, self.worst = self.count + 1, max(self.worst, error)
            u, _, v = np.linalg.svd(rotation)
            m[:, :3] = u @ v
        return m

    def notes(self) -> list[str]:
        if not self.count:
            return []
        poses = "1 pose was" if self.count == 1 else f"{self.count} poses were"
        return [f"{poses} not quite orthonormal (off by up to {self.worst:.1g}) and made so"]


def rows(m: Array) -> tuple[tuple[float, ...], ...]:
    """A [3, 4] matrix as a Camera holds it."""
    return tuple(tuple(float(v) for v in row) for row in m)


def from_opencv(m: Array) -> Array:
    """OpenGL camera to world [3, 4] of an OpenCV one (right, down, forward): columns 1 and 2 are negated."""
    out = m.copy()
    out[:, 1:3] *= -1.0
    return out


def focus(cameras: Sequence[Camera]) -> Array | None:
    """[3]: the point nearest to all optical axes, by least squares; None where they are parallel or too few."""
    if len(cameras) < 2:
        return None
    m = np.stack([np.asarray(c.c2w, dtype=np.float64) for c in cameras])
    d, o = m[:, :, 2], m[:, :, 3]
    planes = np.eye(3) - d[:, :, None] * d[:, None, :]
    total = planes.sum(0)
    if np.linalg.eigvalsh(total)[0] < 1e-3 * len(cameras):
        return None
    return np.asarray(np.linalg.solve(total, np.einsum("nij,nj->i", planes, o)))


def subject(cameras: Sequence[Camera]) -> Box | None:
    """The cube around :func:`focus` that the median camera sees whole; None where the axes do not meet before most
    cameras, as in scenes that are looked at from one side or from within."""
    at = focus(cameras)
    if at is None:
        return None
    reach = []
    for camera in cameras:
        out = camera.position - at
        distance = float(np.linalg.norm(out))
        back = np.asarray(camera.c2w, dtype=np.float64)[:3, 2]
        if distance > 0 and float(out @ back) / distance > 0.7:
            half = min(camera.width / camera.fx, camera.height / camera.fy) / 2
            reach.append(distance * math.sin(math.atan(half)))
    if len(reach) < 0.7 * len(cameras):
        return None
    return Box.cube(float(np.median(reach)), [float(v) for v in at])


def synthetic(cameras: Sequence[Camera]) -> Hints | None:
    """The box of +-1.5 and rays from 2 to 6 of NeRF-Synthetic, if the cameras stand as they do there: some 4 from the
    origin, which they look at."""
    at = np.stack([c.position for c in cameras])
    back = np.stack([np.asarray(c.c2w, dtype=np.float64)[:3, 2] for c in cameras])
    distance = np.linalg.norm(at, axis=1)
    if distance.min() < 3.4 or distance.max() > 4.7:
        return None
    beside = np.linalg.norm(at - np.sum(at * back, axis=1, keepdims=True) * back, axis=1)
    if np.median(beside) > 0.5:
        return None
    return Hints(Box.cube(1.5), 2.0, 6.0)
