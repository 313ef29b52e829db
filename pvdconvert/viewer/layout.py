"""What of which field is drawn where in the picture, and how: colours, opacity, depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pvdconvert.cameras import Camera
from pvdconvert.render.images import Bytes, Image, difference, to_uint8
from pvdconvert.scene import Box, Scene

Show = Literal["first", "second", "split", "side by side", "difference"]
Channel = Literal["color", "depth", "opacity"]
ONE: tuple[Show, ...] = ("first",)
TWO: tuple[Show, ...] = ("split", "side by side", "first", "second", "difference")
CHANNELS: tuple[Channel, ...] = ("color", "depth", "opacity")

SEAM = 200
"""Pixels of width from which on the line between two fields is drawn."""
VISIBLE = 0.05
"""Opacity below which a pixel has no depth."""
# Five colours of matplotlib's viridis (CC0), far to near, in equal steps: lightness alone tells the order.
RAMP = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which fields share the picture. ``split``: the share of the width left of the seam, that the first one has."""

    show: Show = "first"
    split: float = 0.5

    def panels(self, camera: Camera) -> tuple[tuple[int, Camera], ...]:
        """(number of the field, camera) of each panel, left to right; "difference" has two of the whole picture.

        The panels of a split picture are cut out of ``camera``'s: their rays are the same, so that a split costs no
        more than one field. Side by side, each half shows the middle of the view, smaller if it would not fit.
        """
        w, h = camera.width, camera.height
        if self.show == "first":
            return ((0, camera),)
        if self.show == "second":
            return ((1, camera),)
        if self.show == "difference":
            return ((0, camera), (1, camera))
        if self.show == "split":
            left = round(min(1.0, max(0.0, self.split)) * w)
            both = (0, columns(camera, 0, left)), (1, columns(camera, left, w))
            return tuple(panel for panel in both if panel[1].width)
        half = max(1, w // 2)
        scale = min(1.0, half / h)
        view = dataclasses.replace(
            camera,
            width=half,
            fx=camera.fx * scale,
            fy=camera.fy * scale,
            cx=half / 2 + (camera.cx - w / 2) * scale,
            cy=h / 2 + (camera.cy - h / 2) * scale,
        )
        return ((0, view), (1, dataclasses.replace(view, width=max(1, w - half), cx=view.cx + (w - 2 * half) / 2)))

    def compose(self, pictures: Sequence[Bytes]) -> Bytes:
        """One picture [H, W, 3] of the panels' pictures."""
        if self.show == "difference":
            return difference(pictures[0], pictures[1])
        out = np.concatenate(list(pictures), axis=1)
        if len(pictures) == 2 and out.shape[1] >= SEAM:
            out[:, pictures[0].shape[1] - 1] = 128
        return out


def columns(camera: Camera, start: int, stop: int) -> Camera:
    """The camera of the pixel columns ``start`` <= i < ``stop`` of ``camera``'s picture: the same rays."""
    return dataclasses.replace(camera, width=stop - start, cx=camera.cx - start)


def paint(image: Image, channel: Channel, scene: Scene, span: tuple[float, float]) -> Bytes:
    """``image`` as bytes [H, W, 3].

    color    as ``pvdconvert render`` writes it
    opacity  black (0) to white (1)
    depth    near yellow, far violet, over white where nothing is; ``span`` = nearest and farthest distance, world units
    """
    if channel == "color":
        return to_uint8(image.rgb, scene.color_space)
    alpha = np.clip(np.nan_to_num(image.opacity.astype(np.float64)), 0.0, 1.0)[..., None]
    if channel == "opacity":
        return to_uint8(np.repeat(alpha, 3, axis=-1))
    distance = image.depth[..., None] / np.maximum(alpha, 1e-6)
    near = 1.0 - np.clip((distance - span[0]) / max(span[1] - span[0], 1e-9), 0.0, 1.0)
    at = near[..., 0] * (len(RAMP) - 1)
    below = np.minimum(at.astype(np.int64), len(RAMP) - 2)
    part = (at - below)[..., None]
    ramp = (RAMP[below] * (1.0 - part) + RAMP[below + 1] * part) / 255.0
    return to_uint8(np.where(alpha > VISIBLE, ramp * alpha + (1.0 - alpha), 1.0))


def depth_span(camera: Camera, scene: Scene, box: Box) -> tuple[float, float]:
    """The distances between which ``box`` lies, seen from ``camera``; in NDC those of the warped ray."""
    if scene.ray_space.kind == "ndc":
        return 0.0, 2.0
    reach = float(np.linalg.norm(camera.position - np.asarray(box.center)))
    return max(0.0, reach - 0.5 * box.diagonal), reach + 0.5 * box.diagonal


def png(rgb: NDArray[np.uint8]) -> bytes:
    """``rgb`` [H, W, 3] as a PNG file."""
    import io

    from PIL import Image as Pillow

    file = io.BytesIO()
    Pillow.fromarray(rgb).save(file, format="PNG")
    return file.getvalue()
