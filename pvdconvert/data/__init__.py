"""Posed images behind one small contract: cameras, pictures that are read when they are asked for, hints on the scene.

A loader fits one layout of folders or files (checkpoint-layouts.md, section 9) and answers a Dataset. No torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pvdconvert.cameras import Camera
from pvdconvert.errors import UsageError
from pvdconvert.scene import IDENTITY, Box, RaySpace

Pixels = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Frame:
    """One posed picture.

    name    as the dataset writes it, without folder and suffix
    camera  of the picture as :attr:`read` answers it (after any downscaling), in the dataset's world
    read    -> [H, W, 3 or 4] bytes, sRGB, straight alpha; opened anew at each call, so that nothing is kept
    mask    -> [H, W] bool, true where the picture counts; None = everywhere
    """

    name: str
    camera: Camera
    read: Callable[[], Pixels]
    mask: Callable[[], NDArray[np.bool_]] | None = None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Posed pictures of one scene.

    kind        the layout's name: "blender", "llff", "nsvf", "transforms", "tiny-nerf"
    splits      "train" / "val" / "test" -> frames; they never share a picture
    box         where the scene is, world; None = the layout does not say
    near, far   distances along rays, world (in NDC: of the warped space)
    ray_space   world, or NDC with its height, width, focal and near
    background  what lies behind straight alpha, RGB in [0, 1]; None = the pictures have no alpha
    notes       what was skipped, guessed or missing, one line each
    world       4x4, row-major: the cameras' world -> the one to which ``Scene.world`` of a field trained on this leads
                (they differ only where a nerfstudio file has an ``applied_transform``)
    """

    path: Path
    kind: str
    splits: Mapping[str, tuple[Frame, ...]]
    box: Box | None = None
    near: float | None = None
    far: float | None = None
    ray_space: RaySpace = dataclasses.field(default_factory=RaySpace)
    background: tuple[float, float, float] | None = None
    notes: tuple[str, ...] = ()
    world: tuple[tuple[float, ...], ...] = IDENTITY

    def split(self, name: str) -> tuple[Frame, ...]:
        """The frames of a split. Raises UsageError where the dataset has none."""
        frames = self.splits.get(name, ())
        if not frames:
            there = ", ".join(f"{k} ({len(v)})" for k, v in self.splits.items() if v) or "none"
            raise UsageError(f"{self.path}: no frames in split {name!r}", hint=f"splits: {there}")
        return frames
