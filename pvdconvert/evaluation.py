"""Judging a field against real pictures: the field's usual protocol, one view at a time (docs/evaluation.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pvdconvert.cameras import Camera
from pvdconvert.data import Dataset, Frame
from pvdconvert.errors import InputError, RequestError, UsageError
from pvdconvert.metrics import CAP, SSIM_WINDOW, flip, psnr, ssim
from pvdconvert.placing import choose, placed
from pvdconvert.prepare import Prepared
from pvdconvert.progress import Progress, Silent
from pvdconvert.render.images import Bytes, Floats, to_uint8
from pvdconvert.render.trace import render_rays
from pvdconvert.scene import Scene, Vec3

METRICS = ("psnr", "ssim", "flip")
LEARNED = "lpips"
PROTOCOL = "images/1"
_PROBES = 24
"""Rays along a side of a picture that ask whether a camera sees the field at all."""

Masked = NDArray[np.bool_] | None
Learned = Callable[[Bytes, Bytes], float]


@dataclasses.dataclass(frozen=True)
class Judged:
    """One view while it is at hand. truth, picture [H, W, 3] bytes; opacity, depth [H, W] (distance, 0 where there is
    nothing, in the field's world); ``figures``: "psnr", "ssim", ..."""

    name: str
    truth: Bytes
    picture: Bytes
    opacity: Floats
    depth: Floats
    mask: Masked
    figures: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a field is worth on real pictures.

    mean        figure -> mean over the views; a view whose every byte agrees counts as 100 dB
    views       {"name", "width", "height", "pixels" that count, and a value a figure}, one a picture
    frames      pictures in the split       background  behind the field, and behind pictures with alpha
    offset      where in a pixel rays pass  size        pixels of the longer side, None = as the pictures are
    """

    path: Path
    kind: str
    split: str
    frames: int
    mean: Mapping[str, float]
    views: tuple[Mapping[str, Any], ...]
    background: Vec3
    offset: float
    size: int | None
    notes: tuple[str, ...]
    protocol: str = PROTOCOL

    def to_json(self) -> dict[str, Any]:
        """A JSON object without NaN or infinity: "dataset", "metrics" (means), "views", and the protocol."""
        return {
            "protocol": self.protocol,
            "dataset": {"path": str(self.path), "format": self.kind, "split": self.split, "frames": self.frames},
            "metrics": dict(self.mean),
            "views": [dict(v) for v in self.views],
            "background": list(self.background),
            "pixel_offset": self.offset,
            "size": self.size,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        figures = ", ".join(f"{k} {v:.2f} dB" if k == "psnr" else f"{k} {v:.4f}" for k, v in self.mean.items())
        return f"{figures} ({len(self.views)} of {self.frames} {self.split} views)"


def evaluate(
    prepared: Prepared,
    dataset: Dataset,
    split: str = "test",
    *,
    views: int | Sequence[str] | None = None,
    size: int | None = None,
    metrics: Sequence[str] = METRICS,
    lpips: Learned | None = None,
    offset: float | None = None,
    keep: Callable[[Judged], None] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Render ``prepared`` through the cameras of a split and measure. However many views, one is held at a time.

    views    how many, evenly spaced, or their names; None = all
    size     pixels of the longer side, averaged down from larger pictures; None = as they are
    metrics  of "psnr", "ssim", "flip", and "lpips", which needs ``lpips`` (:class:`pvdconvert.metrics.Lpips`)
    offset   where in a pixel its ray passes; None = as the dataset's cameras say
    keep     told of every view, to draw or write it

    Both pictures are 8-bit and over one background: the field's, or the dataset's where the field's file names none.
    Rays run from the field's near to its far, if it has them. Raises UsageError (no such split, view or metric),
    RequestError (another world, pictures that are too small), InputError (a picture that is not as its camera says).
    """
    _check(metrics, lpips)
    progress = progress or Silent()
    scene = prepared.scene
    there = placed(dataset, scene, offset)
    frames = there.split(split)
    chosen = choose(frames, views, f"{dataset.path}: split {split!r}")
    notes = list(there.notes) + _sees(prepared, chosen, split)
    if scene.background is None:
        scene = dataclasses.replace(scene, background=dataset.background)
        color = "white" if dataset.background in (None, (1.0, 1.0, 1.0)) else f"{dataset.background}"
        notes.append(f"the field's file names no background: {color} was taken")
    rows: list[dict[str, Any]] = []
    seen = False
    progress.stage("images", len(chosen))
    for n, frame in enumerate(chosen):
        judged = _judge(prepared, scene, frame, size, metrics, lpips)
        if judged is None:
            notes.append(f"{frame.name}: its mask leaves nothing to judge: left out")
        else:
            seen = seen or bool((judged.opacity > 0).any())
            pixels = judged.truth.shape[0] * judged.truth.shape[1] if judged.mask is None else int(judged.mask.sum())
            height, width = judged.truth.shape[:2]
            rows.append({"name": frame.name, "width": width, "height": height, "pixels": pixels, **judged.figures})
            if keep is not None:
                keep(judged)
        progress.advance(n + 1, **({"psnr": judged.figures["psnr"]} if judged and "psnr" in judged.figures else {}))
        del judged
    if not rows:
        raise RequestError(f"{dataset.path}: masks leave nothing to judge of the views in split {split!r}")
    if not seen:
        notes.append("nothing of the field is seen in any view: is the dataset's world the field's?")
    mean = {m: float(np.mean([row[m] for row in rows])) for m in metrics}
    used = {f.camera.offset for f in chosen}
    return Evaluation(
        dataset.path,
        dataset.kind,
        split,
        len(frames),
        mean,
        tuple(rows),
        scene.backdrop,
        used.pop(),
        size,
        tuple(notes),
    )


def truth_of(frame: Frame, scene: Scene, size: int | None = None) -> tuple[Camera, Bytes, Masked]:
    """(camera, [H, W, 3] bytes, mask) of a picture over the scene's background, its longer side at most ``size``.

    Alpha is composited in the scene's colour space, pictures are averaged down as they are displayed, then rounded; a
    pixel counts where all that it averages does. Raises InputError where the picture is not as its camera says.
    """
    pixels, camera = frame.read(), frame.camera
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or pixels.dtype != np.uint8:
        raise InputError(f"{frame.name}: expected bytes [H, W, 3 or 4], got {pixels.dtype} {pixels.shape}")
    if pixels.shape[:2] != (camera.height, camera.width):
        raise InputError(
            f"{frame.name}: {pixels.shape[1]} x {pixels.shape[0]} pixels, its camera has {camera.width} x "
            f"{camera.height}"
        )
    mask = None if frame.mask is None else np.asarray(frame.mask(), dtype=bool)
    if mask is not None and mask.shape != pixels.shape[:2]:
        raise InputError(f"{frame.name}: its mask has {mask.shape[1]} x {mask.shape[0]} pixels, the picture has not")
    colors = pixels[..., :3] / 255.0
    if pixels.shape[2] == 4:
        alpha, back = pixels[..., 3:] / 255.0, np.array(scene.backdrop)
        if scene.color_space == "linear":
            colors = _displayed(_linear(colors) * alpha + (1 - alpha) * back)
        else:
            colors = colors * alpha + (1 - alpha) * back
    longest = max(camera.width, camera.height)
    if size is not None and size < longest:
        width, height = (max(1, round(v * size / longest)) for v in (camera.width, camera.height))
        camera = camera.resized(width, height)
        colors = np.stack([_averaged(colors[..., k], width, height) for k in range(3)], -1)
        mask = None if mask is None else _averaged(mask, width, height) > 0.999
    return camera, to_uint8(colors), mask


def _judge(
    prepared: Prepared,
    scene: Scene,
    frame: Frame,
    size: int | None,
    metrics: Sequence[str],
    lpips: Learned | None,
) -> Judged | None:
    camera, truth, mask = truth_of(frame, scene, size)
    if mask is not None and mask.all():
        mask = None
    if "ssim" in metrics and min(truth.shape[:2]) < SSIM_WINDOW:
        raise RequestError(
            f"{frame.name}: SSIM needs {SSIM_WINDOW} pixels a side, here are {truth.shape[1]} x {truth.shape[0]}",
            hint="leave it out: psnr,flip",
        )
    if mask is not None and not (_inner(mask) if "ssim" in metrics else mask).any():
        return None
    picture, opacity, depth = render(prepared, scene, camera)
    # Beyond the mask both pictures are the real one, so that windows and filters see no difference there.
    shown = picture if mask is None else np.where(mask[..., None], picture, truth)
    figures: dict[str, float] = {}
    for name in metrics:
        if name == "psnr":
            figures[name] = min(CAP, psnr(truth, picture, mask))
        elif name == LEARNED:
            assert lpips is not None
            figures[name] = lpips(truth, shown)
        else:
            figures[name] = (ssim if name == "ssim" else flip)(truth, shown, mask)
    return Judged(frame.name, truth, picture, opacity, depth, mask, figures)


def render(prepared: Prepared, scene: Scene, camera: Camera) -> tuple[Bytes, Floats, Floats]:
    """(display bytes [H, W, 3], opacity [H, W], distance [H, W]) of the field, from the scene's near to its far."""
    o, d = (torch.from_numpy(v).to(prepared.device) for v in camera.rays())
    rgb, opacity, depth = (
        v.to("cpu", torch.float32).numpy()
        for v in render_rays(
            prepared.field,
            o,
            d,
            prepared.occupancy,
            step=prepared.step,
            near=scene.near,
            far=scene.far,
            backdrop=scene.backdrop,
            ray_space=scene.ray_space,
        )
    )
    shape = (camera.height, camera.width)
    distance = np.where(opacity > 0, depth / np.maximum(opacity, 1e-6), 0.0).astype(np.float32)
    return to_uint8(rgb.reshape(*shape, 3), scene.color_space), opacity.reshape(shape), distance.reshape(shape)


def _check(metrics: Sequence[str], lpips: Learned | None) -> None:
    known = (*METRICS, LEARNED)
    for name in metrics:
        if name not in known:
            raise UsageError(f"metric {name!r}: unknown", hint=f"known: {', '.join(known)}")
    if not metrics:
        raise UsageError("no metric is asked for", hint=f"known: {', '.join(known)}")
    if LEARNED in metrics and lpips is None:
        raise UsageError("metric 'lpips' needs the weights of its network", hint="--lpips-weights FILE")


def _sees(prepared: Prepared, frames: Sequence[Frame], split: str) -> list[str]:
    """Notes on cameras that see nothing of the occupied box. Raises RequestError where none sees it."""
    if prepared.scene.ray_space.kind == "ndc":
        return []
    low, high = (np.array(v) for v in (prepared.box.min, prepared.box.max))
    blind = []
    for frame in frames:
        c = frame.camera
        i, j = np.meshgrid(np.linspace(0, c.width - 1, _PROBES), np.linspace(0, c.height - 1, _PROBES))
        o, d = (v.astype(np.float64) for v in c.rays_at(i.reshape(-1), j.reshape(-1)))
        d = np.where(np.abs(d) < 1e-12, 1e-12, d)
        ends = np.stack([(low - o) / d, (high - o) / d])
        enter, leave = ends.min(0).max(-1), ends.max(0).min(-1)
        if not (leave > np.maximum(enter, 0)).any():
            blind.append(frame.name)
    if len(blind) == len(frames):
        raise RequestError(
            f"none of {len(frames)} cameras of split {split!r} sees the field, which is within {prepared.box.min} .. "
            f"{prepared.box.max}: it lives in another world than the pictures",
            hint="--world gives the matrix from the field's world to theirs",
        )
    many = f"{len(blind)} of {len(frames)} cameras see nothing of the field, {blind[0]} first" if blind else ""
    return [many] if many else []


def _inner(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    edge = SSIM_WINDOW // 2
    return mask[edge:-edge, edge:-edge]


def _averaged(values: NDArray[Any], width: int, height: int) -> NDArray[np.float64]:
    """[H, W] averaged over the area of each new pixel."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BOX), dtype=np.float64)


def _linear(v: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(v <= 0.04045, v / 12.92, ((np.maximum(v, 0.04045) + 0.055) / 1.055) ** 2.4)


def _displayed(v: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(v <= 0.0031308, v * 12.92, 1.055 * np.maximum(v, 0.0031308) ** (1 / 2.4) - 0.055)
