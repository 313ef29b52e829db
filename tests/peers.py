"""Files written by the peers' own code, each with an oracle: what their own forward and renderer answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pvdconvert.cameras import Camera
from pvdconvert.loading import Loaded
from pvdconvert.prepare import prepare
from pvdconvert.render.images import render_camera, to_uint8

SIGMA = 1e-3
"""Worst error of density, of (1 + density)."""
RGB = 2e-3
SLACK = 0.3
"""dB by which a view may fall short of the peer's own."""


def oracle(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def check_points(loaded: Loaded, truth: dict[str, NDArray[Any]], scale: float = 1.0) -> tuple[float, float]:
    """Assert that density (``scale`` times the oracle's) and colour (where there is density) agree; worst errors."""
    x, d = (torch.from_numpy(np.ascontiguousarray(truth[k], dtype=np.float32)) for k in ("x", "d"))
    with torch.no_grad():
        sigma, rgb = loaded.field(x, d)
    expected = truth["sigma"].astype(np.float64) * scale
    worst_sigma = float((np.abs(sigma.double().numpy() - expected) / (1 + expected)).max())
    seen = expected > 0
    assert seen.mean() > 0.05
    worst_rgb = float(np.abs(rgb.double().numpy() - truth["rgb"])[seen].max())
    assert worst_sigma < SIGMA, f"density is off by {worst_sigma:.2e} of (1 + sigma)"
    assert worst_rgb < RGB, f"colour is off by {worst_rgb:.2e}"
    return worst_sigma, worst_rgb


def view_psnr(
    loaded: Loaded,
    truth: dict[str, NDArray[Any]],
    view: int,
    *,
    c2w: str = "view{}_c2w",
    to_scene: NDArray[Any] | None = None,
    offset: float | None = None,
    focal: float | None = None,
    step: float | None = None,
) -> float:
    """dB of one oracle view, rendered by us, against the photograph.

    c2w       name of the camera in the oracle, with {} for the number of the view
    to_scene  4x4: the oracle's camera coordinates -> those of the loaded scene (a similarity: the camera's axes are
              normalised afterwards)
    offset    of pixel centres; None = the oracle's
    step      world units; None = half an occupancy cell
    """
    height, width = (int(v) for v in truth["HW"])
    pose = np.asarray(truth[c2w.format(view)], dtype=np.float64)
    if to_scene is not None:
        pose = to_scene @ pose
        pose[:3, :3] /= np.linalg.norm(pose[:3, 0])
    f = float(truth["focal"]) if focal is None else focal
    camera = Camera(
        c2w=tuple(tuple(float(v) for v in row) for row in pose[:3]),
        width=width,
        height=height,
        fx=f,
        fy=f,
        cx=width / 2,
        cy=height / 2,
        offset=float(truth["pixel_offset"]) if offset is None else offset,
    )
    ready = prepare(loaded.field, loaded.scene)
    image = render_camera(ready.field, ready.scene, camera, ready.occupancy, step)
    mine = to_uint8(image.rgb, ready.scene.color_space) / 255.0
    return float(-10 * np.log10(np.mean((mine - truth[f"view{view}_gt"]) ** 2)))


def check_views(loaded: Loaded, truth: dict[str, NDArray[Any]], **options: Any) -> list[float]:
    """Assert that both views reach the peer's own PSNR within :data:`SLACK`; our figures."""
    found = [view_psnr(loaded, truth, k, **options) for k in (0, 1)]
    for k, ours in enumerate(found):
        theirs = float(truth[f"view{k}_psnr"])
        assert ours > theirs - SLACK, f"view {k}: {ours:.2f} dB, the peer's own {theirs:.2f}"
    return found
