"""Whole pictures: a camera's view of a field, 8-bit images, PNG files, strips for looking at."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pvdconvert.cameras import Camera
from pvdconvert.errors import OutputError
from pvdconvert.field import RadianceField
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.render.trace import default_step, render_rays
from pvdconvert.scene import Scene

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Image:
    """A rendered view: rgb [H, W, 3] in the scene's colour space over its backdrop, opacity [H, W] in [0, 1], and
    depth [H, W], the sum of weight * distance along the ray (divide by opacity for a distance). float32."""

    rgb: Floats
    opacity: Floats
    depth: Floats


def render_camera(
    field: RadianceField,
    scene: Scene,
    camera: Camera,
    occupancy: Occupancy,
    step: float | None = None,
    *,
    stop: float = 1e-3,
    color_threshold: float = 1e-4,
    chunk_points: int = 1 << 16,
) -> Image:
    """Render ``camera``'s view of ``field`` on the device of ``occupancy``; ``step`` None = half an occupancy cell."""
    o, d = (torch.from_numpy(v).to(occupancy.origin.device) for v in camera.rays())
    out = render_rays(
        field,
        o,
        d,
        occupancy,
        step=default_step(occupancy) if step is None else step,
        near=scene.clip[0],
        far=scene.clip[1],
        backdrop=scene.backdrop,
        stop=stop,
        color_threshold=color_threshold,
        ray_space=scene.ray_space,
        chunk_points=chunk_points,
    )
    rgb, opacity, depth = (v.to("cpu", torch.float32).numpy() for v in out)
    size = (camera.height, camera.width)
    return Image(rgb.reshape(*size, 3), opacity.reshape(size), depth.reshape(size))


def to_uint8(rgb: NDArray[Any], color_space: Literal["srgb", "linear"] = "srgb") -> Bytes:
    """Colours in [0, 1] (others are clipped, NaN is black) as display bytes, rounded to nearest; bytes pass through.

    Linear colours go through the sRGB curve.
    """
    if rgb.dtype == np.uint8:
        return np.asarray(rgb, dtype=np.uint8)
    x = np.clip(np.nan_to_num(rgb.astype(np.float64)), 0.0, 1.0)
    if color_space == "linear":
        x = np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.maximum(x, 0.0031308) ** (1 / 2.4) - 0.055)
    return np.floor(x * 255.0 + 0.5).astype(np.uint8)


def save_png(path: Path, rgb: NDArray[Any]) -> None:
    """Write ``rgb`` [H, W, 3] (bytes, or floats in [0, 1]) as PNG. Raises OutputError naming the path."""
    from PIL import Image as Pillow

    try:
        Pillow.fromarray(to_uint8(rgb)).save(path, format="PNG", optimize=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def difference(a: NDArray[Any], b: NDArray[Any], gain: float = 8.0) -> Bytes:
    """``gain`` times the absolute difference of two pictures, clipped: black where they agree."""
    left, right = to_uint8(a).astype(np.float64), to_uint8(b).astype(np.float64)
    return np.clip(np.abs(left - right) * gain + 0.5, 0, 255).astype(np.uint8)


def grid(rows: Sequence[Sequence[NDArray[Any]]], gap: int = 4, fill: int = 255) -> Bytes:
    """Pictures in rows, ``gap`` pixels apart, aligned at the top left of their cells; missing space is ``fill``."""
    pictures = [[to_uint8(p) for p in row] for row in rows]
    columns = max(len(row) for row in pictures)
    widths = [max(row[k].shape[1] for row in pictures if k < len(row)) for k in range(columns)]
    heights = [max(p.shape[0] for p in row) for row in pictures]
    out = np.full((sum(heights) + gap * (len(rows) - 1), sum(widths) + gap * (columns - 1), 3), fill, dtype=np.uint8)
    top = 0
    for row, height in zip(pictures, heights):
        left = 0
        for p, width in zip(row, widths):
            out[top : top + p.shape[0], left : left + p.shape[1]] = p
            left += width + gap
        top += height + gap
    return out


def comparison(teacher: NDArray[Any], student: NDArray[Any], gain: float = 8.0) -> Bytes:
    """teacher | student | ``gain`` x difference, side by side."""
    return grid([[teacher, student, difference(teacher, student, gain)]])
