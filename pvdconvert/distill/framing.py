"""Where the scene is, when only cameras are known: what they look at."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pvdconvert.cameras import Camera
from pvdconvert.data import Frame
from pvdconvert.errors import RequestError
from pvdconvert.render.trace import ndc_rays
from pvdconvert.scene import Box, RaySpace, Vec3

SEEN = 0.9
"""Share of the cameras in whose picture a point lies, for it to be part of the scene."""

SIDE = 48
PARALLEL = 0.05
"""Smallest eigenvalue, relative to the largest, at which viewing axes still meet somewhere."""

HINT = "give --bounds x0,y0,z0,x1,y1,z1"


def box_of_cameras(
    cameras: Sequence[Camera], near: float | None = None, far: float | None = None, ray_space: RaySpace | None = None
) -> Box:
    """The box of what nearly all ``cameras`` see around the point that they look at; in NDC, of what any of them sees.

    Raises RequestError where they look at nothing in common.
    """
    if ray_space is not None and ray_space.kind == "ndc":
        return _warped(cameras, ray_space)
    focus, reach = _focus(cameras, near, far)
    axis = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
    points = focus + reach * np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    votes = np.zeros(len(points))
    for camera in cameras:
        votes += _seen(camera, points, near, far)
    inside = points[votes >= SEEN * len(cameras)]
    if not len(inside):
        raise RequestError("the cameras share nothing that they all see, so there is no box to train in", hint=HINT)
    half = reach / SIDE
    low, high = (inside.min(0) - half).tolist(), (inside.max(0) + half).tolist()
    return Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))


def _focus(cameras: Sequence[Camera], near: float | None, far: float | None) -> tuple[NDArray[np.float64], float]:
    """The point closest to all viewing axes (least squares), and how far around it to look."""
    position = np.stack([c.position for c in cameras])
    axis = -np.stack([np.asarray(c.c2w, dtype=np.float64)[:3, 2] for c in cameras])
    across = np.eye(3) - axis[:, :, None] * axis[:, None, :]
    normal = across.sum(0)
    values = np.linalg.eigvalsh(normal)
    depth = None
    if values[0] > PARALLEL * values[-1]:
        focus = np.linalg.solve(normal, np.einsum("nij,nj->i", across, position))
        depth = ((focus - position) * axis).sum(1)
    if depth is None or np.median(depth) <= 0:
        if far is None:
            raise RequestError("the cameras' viewing axes do not meet, so there is no box to train in", hint=HINT)
        depth = np.full(len(cameras), 0.5 * ((near or 0.0) + far))
        focus = (position + depth[:, None] * axis).mean(0)
    wide = np.array([max(c.width / c.fx, c.height / c.fy) / 2 for c in cameras])
    reach = float(np.median(np.abs(depth) * np.minimum(1.0, 1.5 * wide)))
    if not (math.isfinite(reach) and reach > 0):
        raise RequestError("the cameras stand where they look, so there is no box to train in", hint=HINT)
    return focus, reach


def _seen(camera: Camera, points: NDArray[np.float64], near: float | None, far: float | None) -> NDArray[np.bool_]:
    """Which ``points`` [N, 3] lie in the camera's picture, between near and far."""
    pose = np.asarray(camera.c2w, dtype=np.float64)
    local = (points - pose[:3, 3]) @ pose[:3, :3]
    z = -local[:, 2]
    ahead = z > 1e-6
    z = np.where(ahead, z, 1.0)
    i, j = camera.cx + camera.fx * local[:, 0] / z, camera.cy - camera.fy * local[:, 1] / z
    ahead &= (i >= 0) & (i <= camera.width) & (j >= 0) & (j <= camera.height)
    distance = np.linalg.norm(local, axis=1)
    within = (distance >= (near or 0.0)) & (distance <= (math.inf if far is None else far))
    return np.asarray(ahead & within)


def _warped(cameras: Sequence[Camera], ray_space: RaySpace) -> Box:
    """The warped rays through all corners, from the near plane to infinity."""
    ends = []
    for camera in cameras:
        i = np.array([0.0, camera.width - 1.0, 0.0, camera.width - 1.0])
        j = np.array([0.0, 0.0, camera.height - 1.0, camera.height - 1.0])
        o, d = (torch.from_numpy(v) for v in camera.rays_at(i, j))
        if bool((d[:, 2] >= 0).any()):
            raise RequestError("a camera of this forward-facing scene looks backwards", hint="is it one?")
        start, along = ndc_rays(o, d, ray_space)
        ends += [start, start + along]
    both = torch.cat(ends)
    margin = 1.01
    x, y = (float(both[:, k].abs().max()) * margin for k in range(2))
    return Box((-x, -y, -1.0), (x, y, 1.0))


def footprint(cameras: Sequence[Camera], box: Box, ray_space: RaySpace) -> float:
    """Units of the field's space that a pixel of a typical camera covers at the box's centre."""
    if ray_space.kind == "ndc":
        return 2.0 / max(c.width for c in cameras)
    center = np.asarray(box.center)
    sizes = [max(1e-9, float(np.linalg.norm(c.position - center))) / min(c.fx, c.fy) for c in cameras]
    return float(np.median(sizes))


def border_color(frames: Sequence[Frame]) -> Vec3:
    """The colour that the borders of most pictures share, or black where they share none."""
    borders = []
    for frame in frames[:: -(-len(frames) // 8)]:
        picture = frame.read()[..., :3]
        borders.append(np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]))
    every = np.concatenate(borders).astype(np.float64)
    middle = np.median(every, axis=0)
    if (np.abs(every - middle).max(1) <= 4).mean() < 0.5:
        return (0.0, 0.0, 0.0)
    r, g, b = (round(float(v) / 255, 4) for v in middle)
    return (r, g, b)
