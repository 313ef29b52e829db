"""Pseudo-views: which rays to ask the teacher along, without any image (pvd.md 1.4, 6.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pvdconvert.cameras import Camera, inside_cameras, look_at
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, RaySpace, Scene


def _sphere_rays(box: Box, occupancy: Occupancy, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Rays from all around, each from its own camera position, towards the occupied cells and their surroundings."""
    center = np.asarray(box.center)
    out = rng.normal(size=(count, 3))
    out /= np.linalg.norm(out, axis=1, keepdims=True)
    radius = 0.5 * box.diagonal * rng.uniform(1.7, 3.6, size=(count, 1))
    o = center + out * radius
    # Two thirds through a random point of the box's bounding disc (as pixels are), one third at an occupied cell
    # (so that thin parts are met as often as they deserve).
    a = np.cross(out, rng.normal(size=(count, 3)))
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    b = np.cross(out, a)
    r = 0.5 * box.diagonal * np.sqrt(rng.uniform(size=(count, 1)))
    phi = rng.uniform(0, 2 * math.pi, size=(count, 1))
    aim = center + r * (np.cos(phi) * a + np.sin(phi) * b)
    cells = occupancy.grid.nonzero().cpu().numpy()
    if len(cells):
        chosen = rng.integers(0, len(cells), size=count)
        at = occupancy.origin.cpu().numpy() + (cells[chosen] + rng.uniform(size=(count, 3))) * occupancy.cell
        aim = np.where(rng.uniform(size=(count, 1)) < 1 / 3, at, aim)
    d = aim - o
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    return torch.from_numpy(o.astype(np.float32)), torch.from_numpy(d.astype(np.float32))


def _camera_rays(cameras: Sequence[Camera], count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Rays through random pixels of the given cameras, each camera moved part of the way towards another one."""
    first = rng.integers(0, len(cameras), size=count)
    second = rng.integers(0, len(cameras), size=count)
    share = rng.uniform(0, 0.5, size=(count, 1)) * (rng.uniform(size=(count, 1)) < 0.7)
    o, d = np.empty((count, 3), np.float32), np.empty((count, 3), np.float32)
    for k, camera in enumerate(cameras):
        mine = np.nonzero(first == k)[0]
        if not len(mine):
            continue
        i = rng.uniform(0, camera.width, size=len(mine)) - camera.offset
        j = rng.uniform(0, camera.height, size=len(mine)) - camera.offset
        o[mine], d[mine] = camera.rays_at(i, j)
    shift = np.stack([c.position for c in cameras])[second] - np.stack([c.position for c in cameras])[first]
    # The aim stays where it was at the distance of the shift's origin: move and turn a little, never jump.
    moved = o + (share * shift * 0.3).astype(np.float32)
    return torch.from_numpy(moved.astype(np.float32)), torch.from_numpy(d)


SPREAD = (0.45, 0.25, 0.1)
"""How far forward-facing cameras lie from their mean along x, y, z, as shares of the near plane's distance: those of
LLFF's fern reach 0.40, 0.13 and 0.06. A student that learned from within 0.25 of the mean has 21.6 dB on fern's test
views, whose cameras lie outside, and its teacher 24.6."""

AIM = (-0.6, 0.6)
"""Where they look: 4 near distances ahead, at this share of how far they lie from the mean."""


def forward_cameras(space: RaySpace, count: int, size: int, seed: int) -> tuple[Camera, ...]:
    """Forward-facing pseudo-views of an NDC scene: near the origin, looking along -z, ``size`` pixels high (the
    recentred LLFF convention, layouts 9.2)."""
    rng = np.random.default_rng(seed)
    width, height = space.width or 504.0, space.height or 378.0
    focal, near = space.focal or width, space.near or 1.0
    scale = size / height
    out = []
    for _ in range(count):
        p = rng.uniform(-1.0, 1.0, size=3) * np.asarray(SPREAD) * near
        aim = rng.uniform(*AIM)
        m = look_at(p, (p[0] * aim, p[1] * aim, -4.0 * near), up=(0.0, 1.0, 0.0))
        w = round(width * scale)
        out.append(
            Camera(w, size, focal * scale, focal * scale, w / 2, size / 2, tuple(tuple(map(float, r)) for r in m))
        )
    return tuple(out)


def draw_rays(
    scene: Scene, box: Box, occupancy: Occupancy, count: int, seed: int, cameras: Sequence[Camera] = ()
) -> tuple[Tensor, Tensor]:
    """Origins and unit directions [count, 3], world, deterministic in ``seed``.

    Without ``cameras``: from the full sphere around ``box`` (forward-facing for NDC scenes, from inside for contracted
    ones). With them: 70 % through them and between them, the rest from the sphere, so that no side is left to chance.
    """
    rng = np.random.default_rng(seed)
    if scene.ray_space.kind == "ndc":
        return _camera_rays(cameras or forward_cameras(scene.ray_space, 64, 64, seed), count, rng)
    if scene.ray_space.kind == "contracted":
        return _camera_rays(cameras or inside_cameras(scene.ray_space, 256, 64, seed), count, rng)
    if not cameras:
        return _sphere_rays(box, occupancy, count, rng)
    own = int(0.7 * count)
    a, b = _camera_rays(cameras, own, rng), _sphere_rays(box, occupancy, count - own, rng)
    order = torch.from_numpy(rng.permutation(count))
    return torch.cat([a[0], b[0]])[order], torch.cat([a[1], b[1]])[order]
