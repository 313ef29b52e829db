"""Getting a field ready to be looked at: what is occupied, how finely to step, and from where."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from pvdconvert.cameras import Camera, sphere_cameras
from pvdconvert.field import RadianceField
from pvdconvert.progress import Progress, Silent
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.render.occupy import build_occupancy, check_occupancy
from pvdconvert.render.trace import default_step
from pvdconvert.scene import Box, Scene

CHECK_STEPS = 192
GOOD_CHECK = 40.0
FLOPS = 5e10
"""Floating-point operations a second that estimates assume of a CPU."""


@dataclasses.dataclass
class Prepared:
    """A field with its occupancy; ``box`` is the tight box of what is occupied, ``step`` in world units."""

    field: RadianceField
    scene: Scene
    occupancy: Occupancy
    box: Box
    step: float
    check: str
    device: torch.device


def prepare(
    field: RadianceField,
    scene: Scene,
    *,
    device: str = "cpu",
    seed: int = 0,
    seconds: float = 6.0,
    progress: Progress | None = None,
) -> Prepared:
    """Find out where ``field`` has density within about ``seconds``, and check that nothing visible was missed.

    Raises RequestError where the scene's box holds no density.
    """
    progress = progress or Silent()
    where = torch.device(device)
    progress.stage("occupancy", None)
    occupancy = build_occupancy(
        field, scene.box, seed=seed, progress=progress, device=where, seconds=seconds, space=scene.ray_space
    )
    text = f"not checked: rays lie in a warped space ({scene.ray_space.kind})"
    if scene.ray_space.kind == "world":
        found = None
        for attempt in range(3):
            cameras = sphere_cameras(occupancy.box, 2, _check_size(field, seconds), seed + attempt)
            o, d = _rays(cameras, where)
            occupancy, found = check_occupancy(field, occupancy, scene.box, o, d, scene.backdrop, steps=CHECK_STEPS)
            if not found.added:
                break
            progress.note(f"occupancy: {found.added} missed cells added")
        assert found is not None
        text = f"{found.psnr:.1f} dB with against without it, on {found.rays} rays"
        if found.psnr < GOOD_CHECK:
            text += " (what is left out is thin fog that the background hides)"
    return Prepared(field, scene, occupancy, occupancy.box, default_step(occupancy), text, where)


def _rays(cameras: tuple[Camera, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [camera.rays() for camera in cameras]
    o = np.concatenate([p[0] for p in parts])
    d = np.concatenate([p[1] for p in parts])
    return torch.from_numpy(o).to(device), torch.from_numpy(d).to(device)


def _check_size(field: RadianceField, seconds: float) -> int:
    """Pixels of a check view, so that two of them cost about half of ``seconds``."""
    rays = seconds / 2 * FLOPS / (max(field.flops_per_point, 5e4) * CHECK_STEPS)
    return int(min(64, max(16, (rays / 2) ** 0.5)))
