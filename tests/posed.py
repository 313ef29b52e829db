"""A tiny dataset in closed form: pictures of the analytic scene, added up along rays, not by pvdconvert's renderer."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch

from pvdconvert.cameras import Camera, sphere_cameras
from pvdconvert.data import Dataset, Frame, Pixels
from pvdconvert.scene import Box
from pvdconvert.testing.analytic import AnalyticScene

BOX = Box.cube(1.0)
STEPS = 200


@functools.cache
def picture(camera: Camera) -> Pixels:
    """[H, W, 4] bytes, straight alpha: 200 samples on every ray between the planes of the cube's bounding sphere."""
    scene = AnalyticScene()
    o, d = (torch.from_numpy(v).double() for v in camera.rays())
    middle = -(o * d).sum(-1, keepdim=True)
    dt = 2 * 3**0.5 / STEPS
    t = middle - 3**0.5 + dt * (torch.arange(STEPS) + 0.5)
    x = (o[:, None] + d[:, None] * t[..., None]).reshape(-1, 3).float()
    sigma = scene.density(x).double().view(t.shape)
    color = scene.color(x, d.float().repeat_interleave(STEPS, 0)[:, None])[:, 0].double().view(*t.shape, 3)
    left = torch.exp(-torch.cumsum(sigma * dt, 1))
    weight = torch.cat([torch.ones_like(left[:, :1]), left[:, :-1]], 1) - left
    alpha = 1 - left[:, -1:]
    rgb = (weight[..., None] * color).sum(1) / alpha.clamp_min(1e-6)
    both = torch.cat([rgb.clamp(0, 1), alpha], 1).view(camera.height, camera.width, 4)
    return np.asarray((both * 255 + 0.5).floor().to(torch.uint8).numpy())


def frames(count: int, size: int, seed: int, *, opaque: bool = False) -> tuple[Frame, ...]:
    """``opaque``: over black, without alpha."""

    def read(camera: Camera) -> Pixels:
        rgba = picture(camera)
        if not opaque:
            return rgba
        return np.asarray((rgba[..., :3].astype(np.float64) * rgba[..., 3:] / 255 + 0.5).astype(np.uint8))

    cameras = sphere_cameras(BOX, count, size, seed)
    return tuple(Frame(f"{k:03d}", c, functools.partial(read, c)) for k, c in enumerate(cameras))


def dataset(count: int = 12, size: int = 32, *, opaque: bool = False, box: Box | None = BOX) -> Dataset:
    """``count`` pictures to train on and three to test on."""
    splits = {"train": frames(count, size, 5, opaque=opaque), "test": frames(3, size, 77, opaque=opaque)}
    background = None if opaque else (0.0, 0.0, 0.0)
    return Dataset(Path("blobs"), "made", splits, box=box, background=background)
