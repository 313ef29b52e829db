"""What surrounds the network in an instant-ngp snapshot: box, axes, cameras, density grid (layouts 1.2, 1.5, 1.6).

Imports no torch. The scene's world is the program's own: the model fills the cube of side aabb_scale around
(0.5, 0.5, 0.5); ``Scene.world`` leads to the data set's coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.cameras import Camera
from pvdconvert.errors import InputError
from pvdconvert.plugin import ArrayTensor, Config, LazyTensor, Parts
from pvdconvert.scene import IDENTITY, Box, Scene
from pvdconvert_formats._torch_ngp_grid import GRID, morton

STEP = math.sqrt(3) / 1024
"""Base step of the program's march, in its own units."""
THRESHOLD = 0.01
CENTER = (0.5, 0.5, 0.5)
_LENSES = ("is_fisheye", "ftheta_p0", "latlong", "equirectangular", "orthographic")


def model_box(aabb_scale: float) -> Box:
    """The cube of side ``aabb_scale`` around (0.5, 0.5, 0.5)."""
    return Box.cube(aabb_scale / 2, CENTER)


def clip_box(box: Box, crops: list[Any], notes: list[str]) -> Box:
    """``box`` within the first usable of ``crops``, {"min": [3], "max": [3]} tables or None."""
    for crop in crops:
        if not isinstance(crop, dict):
            continue
        low, high = _numbers(crop.get("min"), 3), _numbers(crop.get("max"), 3)
        if low is None or high is None or not all(a < b for a, b in zip(low, high)):
            continue  # min +inf, max -inf: none was drawn
        low = [max(a, b) for a, b in zip(low, box.min)]
        high = [min(a, b) for a, b in zip(high, box.max)]
        if not all(a < b for a, b in zip(low, high)):
            notes.append("its crop box (render_aabb) lies outside of the model: ignored")
            continue
        return Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))
    return box


def turned(matrix: Any) -> bool:
    """Whether ``render_aabb_to_local`` is a rotation that matters."""
    rows = [_numbers(row, 3) for row in matrix] if isinstance(matrix, list) else []
    full = [row for row in rows if row is not None]
    return len(full) == 3 and not np.allclose(full, np.eye(3), atol=1e-5)


def to_dataset(dataset: Mapping[str, Any]) -> tuple[tuple[float, ...], ...]:
    """4x4: the program's coordinates -> the data set's: the inverse of p * scale + offset, rows cycled."""
    scale, offset = dataset.get("scale"), _numbers(dataset.get("offset"), 3)
    if not isinstance(scale, (int, float)) or not scale > 0 or offset is None:
        return IDENTITY
    rows = np.eye(3) if dataset.get("from_mitsuba") else np.eye(3)[[2, 0, 1]]
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = rows / scale, -np.asarray(offset) / scale
    return tuple(tuple(float(v) for v in row) for row in out)


def read_cameras(dataset: Mapping[str, Any], notes: list[str]) -> tuple[Camera, ...]:
    """The training cameras as far as they are pinholes; the rest is counted in ``notes``."""
    xforms = dataset.get("xforms")
    metadata = dataset.get("metadata")
    if not isinstance(xforms, list):
        return ()
    cameras, skipped, bent = [], 0, 0
    for k, xform in enumerate(xforms):
        own = metadata[k] if isinstance(metadata, list) and k < len(metadata) else {}
        start = xform.get("start") if isinstance(xform, dict) else xform
        lens = (
            own.get("lens") or own.get("camera_distortion") or dataset.get("lens") or dataset.get("camera_distortion")
        )
        lens = lens if isinstance(lens, dict) else {}
        if any(lens.get(key) for key in _LENSES) or (camera := _camera(start, own, dataset, k)) is None:
            skipped += 1
            continue
        bent += any(lens.get(key) for key in ("k1", "k2", "p1", "p2"))
        cameras.append(camera)
    if skipped:
        notes.append(f"{skipped} of {len(xforms)} cameras are no pinholes or incomplete: left out")
    if bent:
        notes.append(f"lens distortion of {bent} cameras is left out")
    return tuple(cameras)


def _camera(start: Any, own: Mapping[str, Any], dataset: Mapping[str, Any], k: int) -> Camera | None:
    rows = [_numbers(row, 4) for row in start] if isinstance(start, list) else []
    several = dataset.get("focal_lengths")
    focal = own.get("focal_length") or (several[k] if isinstance(several, list) and k < len(several) else None)
    size = _numbers(own.get("resolution") or dataset.get("image_resolution"), 2)
    focal = _numbers(focal or dataset.get("focal_length"), 2)
    center = _numbers(own.get("principal_point") or dataset.get("principal_point") or [0.5, 0.5], 2)
    full = [row for row in rows if row is not None]
    if len(full) != 3 or size is None or focal is None or center is None or min(*size, *focal) < 1:
        return None
    if not all(math.isfinite(v) for row in full for v in row):
        return None
    c2w = tuple((r[0], -r[1], -r[2], r[3]) for r in full)  # right, down, forward -> right, up, back
    return Camera(int(size[0]), int(size[1]), focal[0], focal[1], center[0] * size[0], center[1] * size[1], c2w)


def read_mask(
    blob: LazyTensor, old: bool, aabb_scale: float, config: Config, tensors: dict[str, LazyTensor], notes: list[str]
) -> None:
    """The density grid's bitfield into ``config`` and ``tensors``. Raises InputError where its size is impossible.

    Occupied: more than min(0.01, mean over cascade 0 of what is positive); coarser cascades also hold what the finer
    ones do.
    """
    cascades = cascades_of(aabb_scale)
    dtype = np.dtype("<f4" if old else "<f2")
    cells, size = GRID**3, blob.shape[0]
    stored = size // (dtype.itemsize * cells)
    if size == 0:
        notes.append("its density grid is empty: no cells are known to be free")
        return
    if size != stored * cells * dtype.itemsize or not (stored >= cascades if old else stored == cascades):
        raise InputError(
            f"density_grid_binary holds {size} bytes, {cascades} cascades of {GRID}^3 {dtype.name} were expected"
        )
    values = blob.numpy().view(dtype)[: cascades * cells].reshape(cascades, cells)
    with np.errstate(invalid="ignore"):
        limit = min(THRESHOLD, float(np.maximum(values[0].astype(np.float64), 0).mean()))
        set_ = values > limit
    cubes = np.stack([part[morton()] for part in set_])
    for coarse, fine in zip(cubes[1:], cubes[:-1]):
        half = GRID // 2
        pooled = fine.reshape(half, 2, half, 2, half, 2).any((1, 3, 5))
        edge = half // 2
        coarse[edge : edge + half, edge : edge + half, edge : edge + half] |= pooled
    if not cubes.any():
        notes.append("nothing in its density grid is occupied (never trained): ignored")
    elif not cubes.all():
        config["mask"] = mask_config(cascades)
        tensors["mask.bits"] = ArrayTensor(np.packbits(cubes.reshape(-1), bitorder="little"))


def cascades_of(aabb_scale: float) -> int:
    """How many cascades the program makes."""
    return 1 + max(0, math.ceil(math.log2(aabb_scale)))


def mask_config(cascades: int) -> dict[str, Any]:
    """The mask of the program's cells, in its own coordinates."""
    if cascades == 1:
        return {"shape": [GRID] * 3, "origin": [0.0, 0.0, 0.0], "cell": 1.0 / GRID}
    return {"shape": [cascades, *[GRID] * 3], "center": list(CENTER), "halves": [0.5 * 2.0**c for c in range(cascades)]}


def _numbers(value: Any, count: int) -> list[float] | None:
    """``count`` numbers, or None."""
    if not isinstance(value, list) or len(value) != count:
        return None
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value):
        return None
    return [float(v) for v in value]


def background(value: Any) -> NDArray[np.float64] | None:
    """rgb of ``background_color``, or None."""
    numbers = _numbers(value, 4) or _numbers(value, 3)
    return None if numbers is None else np.clip(np.asarray(numbers[:3]), 0.0, 1.0)


def snapshot_of(parts: Parts, box: Box, aabb_scale: float, unit: float) -> dict[str, Any]:
    """Everything of the snapshot but its weights and its density grid."""
    scene, center = parts.scene, np.asarray(box.center)

    def placed(p: Any) -> list[float]:
        return [float(v) for v in (np.asarray(p, np.float64) - center) * unit + 0.5]

    crop = {"min": placed(scene.box.min), "max": placed(scene.box.max)}
    model = model_box(aabb_scale)
    unturned = np.eye(3).tolist()
    dataset: dict[str, Any] = {
        **_dataset(scene, center, unit),
        "n_images": len(scene.cameras),
        "paths": [f"{k:05d}" for k in range(len(scene.cameras))],
        "render_aabb": crop,
        "render_aabb_to_local": unturned,
        "up": [0.0, 0.0, 1.0],
        "envmap_resolution": [0, 0],
        "aabb_scale": int(aabb_scale),
        "is_hdr": parts.config.get("color_activation") == "exp",
        "wants_importance_sampling": True,
        "n_extra_learnable_dims": 0,
    }
    if scene.cameras:
        dataset["metadata"] = [
            {
                "resolution": [c.width, c.height],
                "focal_length": [c.fx, c.fy],
                "principal_point": [c.cx / c.width, c.cy / c.height],
                "rolling_shutter": [0.0] * 4,
                "lens": {},
            }
            for c in scene.cameras
        ]
        turned = [np.asarray(c.c2w, np.float64)[:3] * [1, -1, -1, 1] for c in scene.cameras]
        for m in turned:
            m[:, 3] = placed(m[:, 3])
        dataset["xforms"] = [{"start": m.tolist(), "end": m.tolist()} for m in turned]
    step = parts.provenance.get("training_step", parts.provenance.get("global_step", 0))
    return {
        "version": 1,
        "mode": "nerf",
        "density_grid_size": GRID,
        "nerf": {
            "aabb_scale": int(aabb_scale),
            "rgb": {"rays_per_batch": 4096, "measured_batch_size": 0, "measured_batch_size_before_compaction": 0},
            "dataset": dataset,
        },
        "training_step": step if type(step) is int else 0,
        "loss": 0.0,
        "aabb": model.to_json(),
        "bounding_radius": 1.0,
        "render_aabb": crop,
        "render_aabb_to_local": unturned,
        "up_dir": [0.0, 0.0, 1.0],
        "exposure": 0.0,
        "background_color": [*scene.backdrop, 1.0],
    }


def _dataset(scene: Scene, center: NDArray[np.float64], unit: float) -> dict[str, Any]:
    """scale, offset and from_mitsuba: from the data set's coordinates where the layout can say it, else the scene's."""
    here = np.eye(4)
    here[:3, :3] *= unit
    here[:3, 3] = 0.5 - unit * center
    there = np.asarray(scene.world, np.float64)
    total = here @ np.linalg.inv(there) if abs(np.linalg.det(there)) > 1e-12 else here
    for rows, mitsuba in ((np.eye(3), True), (np.eye(3)[[1, 2, 0]], False)):
        scale = float(np.trace(rows.T @ total[:3, :3]) / 3)
        if scale > 0 and np.allclose(total[:3, :3], scale * rows, atol=1e-6 * scale):
            return {"scale": scale, "offset": (rows.T @ total[:3, 3]).tolist(), "from_mitsuba": mitsuba}
    return {"scale": unit, "offset": here[:3, 3].tolist(), "from_mitsuba": True}
