"""Small procedural datasets in every layout: three fuzzy balls, red, green and blue, seen by cameras that we know.

Pictures and poses are written from the published conventions in float64, by nothing of pvdconvert: the middle of each
colour in a picture is where its ball is seen. ``cameras`` are OpenGL camera-to-world matrices [4, 4] throughout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float64]
BALLS: Array = np.array([[0.42, -0.13, 0.21], [-0.33, 0.38, -0.17], [0.07, 0.24, 0.45]])
"""Middles of the red, the green and the blue ball, world."""
RADIUS = 0.07
"""Standard deviation of a ball, world units."""
Distort = Callable[[Array], Array]
"""Picture coordinates [N, 2] of points [N, 3] before an OpenCV camera (x right, y down, z forward)."""


def pinhole(points: Array) -> Array:
    return points[:, :2] / points[:, 2:]


def looking(
    position: Sequence[float] | Array, target: Sequence[float] | Array = (0, 0, 0), up: Sequence[float] = (0, 0, 1)
) -> Array:
    """Camera to world [4, 4], OpenGL: columns right, up, back, position."""
    p = np.asarray(position, dtype=np.float64)
    back = p - np.asarray(target, dtype=np.float64)
    back /= np.linalg.norm(back)
    right = np.cross(np.asarray(up, dtype=np.float64), back)
    right /= np.linalg.norm(right)
    m = np.eye(4)
    m[:3] = np.stack([right, np.cross(back, right), back, p], 1)
    return m


def orbit(count: int, radius: float = 4.0, target: Sequence[float] | Array = (0, 0, 0)) -> list[Array]:
    """Cameras on rings around ``target``, which they look at, from 12 to 58 degrees up."""
    out = []
    for k in range(count):
        e, a = math.radians(12 + 46 * ((k * 0.618) % 1)), 2 * math.pi * k / count
        at = radius * np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
        out.append(looking(at + np.asarray(target), target))
    return out


def seen(camera: Array, k: Array, distort: Distort = pinhole) -> tuple[Array, Array]:
    """Pixels [3, 2] (from the top left corner of the picture) of the balls' middles, and their depths [3]."""
    to_camera = np.linalg.inv(camera)
    local = (BALLS @ to_camera[:3, :3].T + to_camera[:3, 3]) * (1.0, -1.0, -1.0)
    uv = distort(local)
    return uv * (k[0, 0], k[1, 1]) + (k[0, 2], k[1, 2]), local[:, 2]


def picture(camera: Array, size: tuple[int, int], k: Array, distort: Distort = pinhole) -> NDArray[np.uint8]:
    """[H, W, 3] bytes: a ball a channel, on black; pixel (i, j) shows what is at (i + 0.5, j + 0.5)."""
    where, depth = seen(camera, k, distort)
    i, j = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    out = np.zeros((size[1], size[0], 3))
    for c in range(3):
        s = k[0, 0] * RADIUS / depth[c]
        across, down = np.exp(-0.5 * ((i - where[c, 0]) / s) ** 2), np.exp(-0.5 * ((j - where[c, 1]) / s) ** 2)
        out[..., c] = down[:, None] * across
    return np.round(255 * out).astype(np.uint8)


def middles(pixels: NDArray[np.uint8]) -> Array:
    """[3, 2]: where each colour of a picture over black has its middle, from the top left corner."""
    x = pixels.astype(np.float64)
    if x.shape[2] == 4:
        x = x[..., :3] * x[..., 3:] / 255.0
    i, j = np.arange(x.shape[1]) + 0.5, np.arange(x.shape[0]) + 0.5
    total = x.sum((0, 1))
    return np.stack([(x.sum(0) * i[:, None]).sum(0) / total, (x.sum(1) * j[:, None]).sum(0) / total], 1)


def matrix(size: tuple[int, int], focal: float | None = None) -> Array:
    """Intrinsics of square pixels with the axis in the middle; the balls of :func:`orbit` fill the picture."""
    f = 1.4 * min(size) if focal is None else focal
    return np.array([[f, 0, size[0] / 2], [0, f, size[1] / 2], [0, 0, 1.0]])


def save(path: Path, pixels: NDArray[np.uint8], *, alpha: bool = False) -> None:
    """``alpha``: straight alpha, the largest channel, so that the picture over black is ``pixels``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if alpha:
        a = pixels.max(-1, keepdims=True).astype(np.float64)
        straight = np.round(255 * (pixels / np.maximum(a, 1)))
        pixels = np.concatenate([straight, a], -1).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def to_opencv(camera: Array) -> Array:
    return camera @ np.diag([1.0, -1.0, -1.0, 1.0])


def blender(
    folder: Path,
    splits: Mapping[str, Sequence[Array]],
    size: tuple[int, int] = (48, 40),
    *,
    alpha: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """NeRF-Synthetic: transforms_{split}.json, {split}/r_{n}.png. ``extra`` goes into each json."""
    k = matrix(size)
    angle = 2 * math.atan(0.5 * size[0] / k[0, 0])
    for split, cameras in splits.items():
        frames = []
        for n, camera in enumerate(cameras):
            save(folder / split / f"r_{n}.png", picture(camera, size, k), alpha=alpha)
            frames.append({"file_path": f"./{split}/r_{n}", "rotation": 0.01, "transform_matrix": camera.tolist()})
        text = json.dumps({"camera_angle_x": angle, "frames": frames, **(extra or {})})
        (folder / f"transforms_{split}.json").write_text(text)
    return folder


def llff(
    folder: Path,
    cameras: Sequence[Array],
    size: tuple[int, int] = (48, 40),
    *,
    factor: int = 8,
    bounds: tuple[float, float] = (2.0, 9.0),
    also: Sequence[int] = (),
    world: Array | None = None,
) -> Path:
    """poses_bounds.npy with columns down, right, back | t | (H, W, f) of the full size; pictures in images_{factor},
    and in those of ``also``, of the sizes that belong to them. ``world`` [4, 4] moves the stored poses."""
    folder.mkdir(parents=True, exist_ok=True)
    full = (size[0] * factor, size[1] * factor)
    focal = 1.4 * min(full)
    rows = []
    for n, camera in enumerate(cameras):
        m = camera if world is None else world @ camera
        stored = np.stack([-m[:3, 1], m[:3, 0], m[:3, 2], m[:3, 3], [full[1], full[0], focal]], 1)
        rows.append(np.concatenate([stored.reshape(-1), bounds]))
        for f in (factor, *also):
            small = (full[0] // f, full[1] // f)
            name = "images" if f == 1 else f"images_{f}"
            save(folder / name / f"image{n:03d}.png", picture(camera, small, matrix(small, focal / f)))
    np.save(folder / "poses_bounds.npy", np.array(rows))
    return folder


def nsvf(
    folder: Path,
    splits: Mapping[str, Sequence[Array]],
    size: tuple[int, int] = (48, 40),
    *,
    tanks: bool = True,
    alpha: bool = False,
) -> Path:
    """NSVF: pose/0_train_0000.txt (OpenCV), rgb/ by the same names; ``tanks``: intrinsics as a 4x4 matrix, else f."""
    (folder / "pose").mkdir(parents=True, exist_ok=True)
    k = matrix(size)
    for split, cameras in splits.items():
        prefix = {"train": 0, "val": 1, "test": 2}[split]
        for n, camera in enumerate(cameras):
            name = f"{prefix}_{split}_{n:04d}"
            np.savetxt(folder / "pose" / f"{name}.txt", to_opencv(camera))
            save(folder / "rgb" / f"{name}.png", picture(camera, size, k), alpha=alpha)
    if tanks:
        four = np.eye(4)
        four[:3, :3] = k
        np.savetxt(folder / "intrinsics.txt", four)
    else:
        middle = f"{k[0, 0]} {k[0, 2]} {k[1, 2]} 0.\n0. 0. 0.\n0.\n1.\n{size[1]} {size[0]}\n"
        (folder / "intrinsics.txt").write_text(middle)
    (folder / "bbox.txt").write_text("-1.0 -1.1 -1.2 1.0 1.1 1.2 0.1\n")
    return folder


def transforms(
    folder: Path,
    cameras: Sequence[Array],
    size: tuple[int, int] = (48, 40),
    *,
    k: Array | None = None,
    distort: Distort = pinhole,
    alpha: bool = False,
    **extra: Any,
) -> Path:
    """instant-ngp / nerfstudio: transforms.json with fl_x, fl_y, cx, cy, w, h and ``extra``; images/frame_{n}.png.
    An ``extra`` that is None takes the entry out."""
    k = matrix(size) if k is None else k
    frames = []
    for n, camera in enumerate(cameras):
        save(folder / "images" / f"frame_{n + 1}.png", picture(camera, size, k, distort), alpha=alpha)
        frames.append({"file_path": f"images/frame_{n + 1}.png", "transform_matrix": camera.tolist()})
    data = {"fl_x": k[0, 0], "fl_y": k[1, 1], "cx": k[0, 2], "cy": k[1, 2], "w": size[0], "h": size[1]}
    data |= {"frames": frames, **extra}
    (folder / "transforms.json").write_text(json.dumps({key: v for key, v in data.items() if v is not None}))
    return folder


def tiny_nerf(path: Path, cameras: Sequence[Array], size: tuple[int, int] = (48, 40)) -> Path:
    """tiny_nerf_data.npz: images [N, H, W, 3] float32, poses [N, 4, 4] float32, focal."""
    k = matrix(size)
    images = np.stack([picture(c, size, k) for c in cameras]).astype(np.float32) / 255
    np.savez_compressed(path, images=images, poses=np.stack(cameras).astype(np.float32), focal=np.float64(k[0, 0]))
    return path


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    """Edit a json file in place."""
    data = json.loads(path.read_text())
    path.write_text(json.dumps(edit(data) or data))
