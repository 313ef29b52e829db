"""Pseudo-views of the paper's method: poses of an epoch, rays of one pose, samples of rays (pvd.md 1.2, 1.4)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvdconvert.cameras import Camera, look_at
from pvdconvert.distill.sampling import in_cells, segments
from pvdconvert.distill.views import forward_cameras
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, Scene

EPOCH = 312
"""Poses of an epoch of a scene that is looked at from around."""

FORWARD_EPOCH = 30
"""Poses of an epoch of a forward-facing scene."""

RADIUS = 4.0 * 0.8
"""Distance of the cameras from the centre, in half sides of the box of what is occupied."""

ANGLE, SIZE = 0.6911112, 800
"""Field of view in radians, and pixels a side, of the synthetic data set that the paper's numbers are of."""

JITTER = math.radians(9.0)
"""How far a hard pose is turned about each axis before it is used again."""


def elevations() -> NDArray[np.float64]:
    """[312, 2] degrees: least and largest elevation of each pose of an epoch.

    For a = 0 .. 79 there are (90 - a) // 15 + 1 poses between max(a - 5, 0) and a, and one more on top: dense near the
    horizon, 28 degrees in the mean.
    """
    low_high = [(max(a - 5, 0), a) for a in range(80) for _ in range((90 - a) // 15 + 1)] + [(75, 80)]
    return np.asarray(low_high, dtype=np.float64)


def hemisphere(box: Box, count: int, rng: np.random.Generator, *, below: bool) -> list[Camera]:
    """``count`` of an epoch's poses in random order (all 312 in an epoch of that length), looking at the box's centre.

    below  every other one, by chance, is mirrored to look from below the horizon: the reference never does
    """
    bands = elevations()[rng.permutation(EPOCH)[np.arange(count) % EPOCH]]
    e = np.radians(rng.uniform(bands[:, 0], bands[:, 1]))
    if below:
        e = np.where(rng.uniform(size=count) < 0.5, -e, e)
    a = rng.uniform(0.0, 2.0 * math.pi, count)
    out = np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)], axis=1)
    center, radius = np.asarray(box.center), RADIUS * 0.5 * box.longest
    focal = 0.5 * SIZE / math.tan(0.5 * ANGLE)
    lens = (SIZE, SIZE, focal, focal, SIZE / 2, SIZE / 2)
    return [Camera(*lens, _rows(look_at(center + radius * d, center))) for d in out]


def epoch(scene: Scene, box: Box, count: int, rng: np.random.Generator, *, below: bool = True) -> list[Camera]:
    """``count`` poses: the scene's own cameras in random order where it has any, forward-facing ones in NDC, else
    those of :func:`hemisphere`."""
    if scene.cameras:
        order = [int(k) for _ in range(-(-count // len(scene.cameras))) for k in rng.permutation(len(scene.cameras))]
        return [scene.cameras[k] for k in order[:count]]
    if scene.ray_space.kind == "ndc":
        return list(forward_cameras(scene.ray_space, count, SIZE, int(rng.integers(1 << 31))))
    return hemisphere(box, count, rng, below=below)


def jittered(camera: Camera, target: Sequence[float], rng: np.random.Generator) -> Camera:
    """``camera`` carried around ``target`` by up to 9 degrees about each axis: what it looked at stays in the picture.

    The reference turns the camera where it stands, so that the object may leave the frame.
    """
    x, y, z = rng.uniform(-JITTER, JITTER, 3)
    turn = _turn(2, z) @ _turn(1, y) @ _turn(0, x)
    m, t = np.asarray(camera.c2w, dtype=np.float64)[:3], np.asarray(target, dtype=np.float64)
    moved = np.concatenate([turn @ m[:, :3], (t + turn @ (m[:, 3] - t))[:, None]], axis=1)
    return dataclasses.replace(camera, c2w=_rows(moved))


def looked_at(camera: Camera, scene: Scene, box: Box) -> NDArray[np.float64]:
    """The point that a jitter of ``camera`` keeps: on its axis, as far away as the middle of the scene."""
    m = np.asarray(camera.c2w, dtype=np.float64)
    if scene.ray_space.kind == "ndc":
        return np.asarray(m[:3, 3] - 4.0 * (scene.ray_space.near or 1.0) * m[:3, 2])
    along = float((m[:3, 3] - np.asarray(box.center)) @ m[:3, 2])
    return np.asarray(m[:3, 3] - max(along, 0.25 * box.longest) * m[:3, 2])


def rays_of(camera: Camera, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Origins and directions [count, 3] through pixels drawn uniformly, with replacement."""
    i = torch.randint(camera.width, (count,), generator=generator).double().numpy()
    j = torch.randint(camera.height, (count,), generator=generator).double().numpy()
    o, d = camera.rays_at(i, j)
    return torch.from_numpy(o), torch.from_numpy(d)


def fixed_rays(camera: Camera, side: int) -> tuple[Tensor, Tensor]:
    """Origins and directions [side^2, 3] through a lattice of pixels: the same in every picture of one size."""
    i, j = ((np.arange(side) + 0.5) / side * n - 0.5 for n in (camera.width, camera.height))
    columns, rows = np.meshgrid(i, j)
    o, d = camera.rays_at(columns.reshape(-1), rows.reshape(-1))
    return torch.from_numpy(o), torch.from_numpy(d)


@dataclasses.dataclass
class Samples:
    """Points along R rays: ray r owns ``offsets[r]:offsets[r+1]``; x [S, 3], ray [S] int64, d [R, 3] where the colour
    is asked from, dt the length that each stands for."""

    x: Tensor
    ray: Tensor
    offsets: Tensor
    d: Tensor
    dt: float


@torch.no_grad()
def sample(scene: Scene, occupancy: Occupancy, o: Tensor, d: Tensor, step: float, jitter: Tensor) -> Samples:
    """Points every ``step`` along rays ``o``, ``d`` [R, 3] in occupied cells, shifted by ``jitter`` [R] of a step."""
    # Pseudo-views are clipped by the box alone: near and far are those of the scene's own cameras.
    clipped = dataclasses.replace(scene, near=scene.clip[0], far=scene.clip[1])
    found = in_cells(segments(o, d, clipped, occupancy.box), occupancy, step, jitter)
    return Samples(found.x, found.ray, found.offsets, d, step)


def _turn(axis: int, angle: float) -> NDArray[np.float64]:
    c, s = math.cos(angle), math.sin(angle)
    a, b = (axis + 1) % 3, (axis + 2) % 3
    m = np.eye(3)
    m[a, a], m[a, b], m[b, a], m[b, b] = c, -s, s, c
    return m


def _rows(m: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(v) for v in row) for row in m)
