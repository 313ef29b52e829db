"""Cameras of a browser's orbit, and where to look from. numpy only, no torch.

viser's cameras are OpenCV's (x right, y down, z forward), their rotation camera -> world a unit quaternion
(w, x, y, z), their field of view vertical, in radians. Ours are OpenGL's (:mod:`pvdconvert.cameras`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pvdconvert.cameras import Camera, fit_camera, look_at
from pvdconvert.scene import Box, RaySpace, Scene

Array = NDArray[np.float64]

FLIP = np.array([1.0, -1.0, -1.0])
"""OpenGL's camera axes are OpenCV's times this."""
ELEVATION, FILL, FOV = 30.0, 0.8, 0.7
"""The first view is that of ``pvdconvert render``: degrees above the horizon, share of the height, field of view."""
REACH, SWING = 0.35, math.radians(12.0)
"""Views of an NDC scene stay within so many near distances of the mean camera, and turn away from -z by so much: where
the photographs of such scenes are taken. Beyond, a field shows what nobody ever taught it."""
STEEPEST = math.radians(85.0)
LEVEL = math.cos(math.radians(25.0))


@dataclasses.dataclass(frozen=True)
class Pose:
    """A camera as viser places it: position, the point that it orbits, up [3] each, vertical field of view, radians."""

    position: Array
    target: Array
    up: Array
    fov: float


def camera_of(
    wxyz: Sequence[float] | Array, position: Sequence[float] | Array, fov: float, width: int, height: int
) -> Camera:
    """Our camera of viser's: quaternion ``wxyz`` (any length but 0), vertical ``fov`` in radians, canvas in pixels.

    Square pixels; the principal point is the middle of the canvas.
    """
    c2w = np.concatenate([rotation(wxyz) * FLIP, np.asarray(position, dtype=np.float64)[:, None]], axis=1)
    focal = 0.5 * height / math.tan(0.5 * fov)
    return Camera(width, height, focal, focal, width / 2, height / 2, rows(c2w))


def rotation(wxyz: Sequence[float] | Array) -> Array:
    """The rotation matrix [3, 3] of a quaternion (w, x, y, z), which is normalised first."""
    q = np.asarray(wxyz, dtype=np.float64)
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def quaternion(m: Array) -> Array:
    """The unit quaternion (w, x, y, z), w >= 0, of a rotation matrix [3, 3]."""
    # Four times the outer product q q^T, from the matrix; its largest column is q up to length and sign, for any angle.
    r = m
    outer = np.array(
        [
            [1 + r[0, 0] + r[1, 1] + r[2, 2], r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]],
            [r[2, 1] - r[1, 2], 1 + r[0, 0] - r[1, 1] - r[2, 2], r[0, 1] + r[1, 0], r[0, 2] + r[2, 0]],
            [r[0, 2] - r[2, 0], r[0, 1] + r[1, 0], 1 - r[0, 0] + r[1, 1] - r[2, 2], r[1, 2] + r[2, 1]],
            [r[1, 0] - r[0, 1], r[0, 2] + r[2, 0], r[1, 2] + r[2, 1], 1 - r[0, 0] - r[1, 1] + r[2, 2]],
        ]
    )
    q = outer[int(np.argmax(np.diag(outer)))]
    q = q / np.linalg.norm(q)
    return np.asarray(-q if q[0] < 0 else q)


def wxyz_of(camera: Camera) -> Array:
    """viser's quaternion of our camera; the inverse of :func:`camera_of`."""
    return quaternion(np.asarray(camera.c2w, dtype=np.float64)[:3, :3] * FLIP)


def pose_of(camera: Camera, scene: Scene, box: Box) -> Pose:
    """``camera`` as viser places it: it orbits the point of its axis nearest to the middle of ``box``.

    Up is the scene's (so that an orbit stays level) unless the camera is rolled against it.
    """
    m = np.asarray(camera.c2w, dtype=np.float64)
    forward, position = -m[:, 2], m[:, 3]
    if scene.ray_space.kind == "ndc":
        distance = 3.0 * (scene.ray_space.near or 1.0)
    else:
        distance = max(float((np.asarray(box.center) - position) @ forward), 0.1 * box.diagonal)
    up = up_axis(scene)
    level = abs(float(m[:, 0] @ up)) < 1e-3 and float(m[:, 1] @ up) > 1e-3
    fov = 2.0 * math.atan(0.5 * camera.height / camera.fy)
    return Pose(position, position + distance * forward, up if level else m[:, 1], fov)


def up_axis(scene: Scene) -> Array:
    """The scene's up [3], unit: +z, +y in NDC; where the file has cameras that agree on another, theirs."""
    if scene.ray_space.kind == "ndc":
        return np.array([0.0, 1.0, 0.0])
    up = np.array([0.0, 0.0, 1.0])
    if scene.cameras:
        mean = np.mean([np.asarray(c.c2w, dtype=np.float64)[:3, 1] for c in scene.cameras], axis=0)
        length = float(np.linalg.norm(mean))
        # Cameras all around that look at what they circle have ups that cancel but for the axis.
        if length > 0.3 and float(mean @ up) < LEVEL * length:
            return np.asarray(mean / length)
    return up


def first_view(scene: Scene, box: Box, size: int) -> Camera:
    """Where to start, ``size`` pixels a side: as ``pvdconvert render`` does; in NDC the mean camera, straight on."""
    space = scene.ray_space
    if space.kind == "ndc":
        fov = 2.0 * math.atan(0.5 * space.height / space.focal) if space.height and space.focal else FOV
        focal = 0.5 * size / math.tan(0.5 * fov)
        return Camera(size, size, focal, focal, size / 2, size / 2, rows(np.eye(3, 4)))
    e = math.radians(ELEVATION)
    up = up_axis(scene)
    if up[2] == 1.0:
        return fit_camera(box, (math.cos(e), 0.0, math.sin(e)), size, fill=FILL, fov=FOV)
    side = np.cross(up, np.eye(3)[int(np.argmin(np.abs(up)))])
    camera = fit_camera(box, math.cos(e) * side / np.linalg.norm(side) + math.sin(e) * up, size, fill=FILL, fov=FOV)
    return dataclasses.replace(camera, c2w=rows(look_at(camera.position, box.center, up=list(up))))


def confined(camera: Camera, space: RaySpace) -> tuple[Camera, bool]:
    """``camera``, or in NDC the nearest one from which the warp is defined; and whether it had to move.

    An NDC scene is seen from around the mean camera (the origin, looking along -z): positions within :data:`REACH` near
    distances along each axis, turned by at most :data:`SWING`, and never so far that the rays of a corner run sideways.
    """
    if space.kind != "ndc":
        return camera, False
    m, near = np.asarray(camera.c2w, dtype=np.float64), space.near or 1.0
    position = np.clip(m[:, 3], -REACH * near, REACH * near)
    corner = math.hypot(0.5 * camera.width / camera.fx, 0.5 * camera.height / camera.fy)
    swing = max(0.0, min(SWING, STEEPEST - math.atan(corner)))
    forward = -m[:, 2]
    aside = forward * (1.0, 1.0, 0.0)
    if -forward[2] >= math.cos(swing) - 1e-12:
        turned = m[:, :3]
    else:
        length = float(np.linalg.norm(aside))
        aside = aside / length if length > 0 else np.array([1.0, 0.0, 0.0])
        forward = math.sin(swing) * aside - math.cos(swing) * np.array([0.0, 0.0, 1.0])
        turned = look_at(position, position + forward, up=(0.0, 1.0, 0.0))[:, :3]
    c2w = np.concatenate([turned, position[:, None]], axis=1)
    if np.allclose(c2w, m, rtol=0.0, atol=1e-9):
        return camera, False
    return dataclasses.replace(camera, c2w=rows(c2w)), True


def transforms(camera: Camera) -> dict[str, object]:
    """``camera`` as the JSON of a transforms.json, which ``pvdconvert render --cameras`` reads."""
    return {
        "w": camera.width,
        "h": camera.height,
        "fl_x": camera.fx,
        "fl_y": camera.fy,
        "cx": camera.cx,
        "cy": camera.cy,
        "frames": [{"file_path": "view", "transform_matrix": [*map(list, camera.c2w), [0.0, 0.0, 0.0, 1.0]]}],
    }


def rows(m: Array) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in m)
