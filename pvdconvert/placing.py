"""A dataset's cameras in a field's world, and through the pixels as the field has learned them. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pvdconvert.data import Dataset, Frame
from pvdconvert.errors import InputError, RequestError, UsageError
from pvdconvert.registry import Registry
from pvdconvert.scene import Box, Scene

CENTER = 0.5
_GENERATIONS = 64


def placed(dataset: Dataset, scene: Scene, offset: float | None = None) -> Dataset:
    """``dataset`` as a field of ``scene`` sees it: cameras, box and distances in the scene's world.

    offset  where in a pixel its ray passes; None = as the dataset says (:func:`pixel_offset` knows it of a field)

    Raises RequestError where the two cannot be brought together: a field in NDC and pictures in the world, or a
    ``Scene.world`` that is not a rotation, a uniform scale and a translation.
    """
    if scene.ray_space.kind == "ndc" and dataset.ray_space.kind != "ndc":
        raise RequestError(
            f"{dataset.path}: the field lives in NDC, the {dataset.kind} pictures do not",
            hint="it needs the forward-facing LLFF data it was trained on",
        )
    frames = dataset.splits
    notes = list(dataset.notes)
    notes += _same_warp(dataset, scene) if scene.ray_space.kind == "ndc" else []
    move = np.linalg.solve(_matrix(scene.world), _matrix(dataset.world))
    scale = 1.0
    if not np.allclose(move, np.eye(4), atol=1e-12):
        try:
            frames = {k: tuple(_moved(f, move) for f in v) for k, v in frames.items()}
        except InputError as error:
            raise RequestError(f"{dataset.path}: the field's world cannot be reached: {error}") from error
        scale = float(np.cbrt(np.linalg.det(move[:3, :3])))
        notes.append(f"cameras were moved into the field's world (scale {scale:.4g})")
    if offset is not None:
        frames = {k: tuple(_pierced(f, offset) for f in v) for k, v in frames.items()}
    warped = dataset.ray_space.kind == "ndc"  # its box and distances are of the warped space
    near, far = (v if v is None or warped else v * scale for v in (dataset.near, dataset.far))
    box = dataset.box if dataset.box is None or warped or scale == 1.0 else _box(dataset.box, move)
    return dataclasses.replace(
        dataset, splits=frames, near=near, far=far, box=box, world=scene.world, notes=tuple(notes)
    )


def pixel_offset(format: str, provenance: Mapping[str, Any], registry: Registry) -> tuple[float, str]:
    """Where in a pixel the program at the beginning of a field's history sends its ray, and that program's name.

    A student keeps the convention of its first teacher, whatever layout it is written in. ``provenance`` is that of
    :class:`pvdconvert.plugin.Parts`, ``format`` the layout of the file.
    """
    specs = {name: entry.spec for name, entry in registry.formats().items()}
    for _ in range(_GENERATIONS):
        teacher, earlier = provenance.get("teacher"), provenance.get("earlier")
        if not isinstance(teacher, Mapping):
            break
        format = str(teacher.get("format"))
        provenance = earlier if isinstance(earlier, Mapping) else {}
    program = provenance.get("program")
    for name, spec in specs.items():
        if program and spec.program == program:
            return spec.pixel_offset, name
    if format not in specs or specs[format].native:
        return CENTER, ""
    return specs[format].pixel_offset, format


def choose(frames: Sequence[Frame], views: int | Sequence[str] | None, where: str) -> tuple[Frame, ...]:
    """``views`` of ``frames``: so many, evenly spaced, or those named. Raises UsageError for unknown names."""
    if views is None:
        return tuple(frames)
    if isinstance(views, int):
        if views < 1:
            raise UsageError(f"{views} views: at least one is needed")
        count = min(views, len(frames))
        return tuple(frames[k * len(frames) // count] for k in range(count))
    named = {f.name: f for f in frames} | {Path(f.name).name: f for f in frames}
    for name in views:
        if name not in named:
            first = ", ".join(f.name for f in frames[:3])
            raise UsageError(f"{where}: no view {name!r}", hint=f"its {len(frames)} views are {first}, ...")
    return tuple(named[name] for name in views)


def _matrix(rows: tuple[tuple[float, ...], ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    m = np.asarray(rows, dtype=np.float64)
    if m.shape != (4, 4) or not np.isfinite(m).all() or abs(np.linalg.det(m)) < 1e-12:
        raise RequestError("the field's world is no 4x4 matrix that can be inverted", hint="--world gives another")
    return m


def _moved(frame: Frame, matrix: np.ndarray[Any, np.dtype[np.float64]]) -> Frame:
    return dataclasses.replace(frame, camera=frame.camera.moved(matrix))


def _pierced(frame: Frame, offset: float) -> Frame:
    return dataclasses.replace(frame, camera=dataclasses.replace(frame.camera, offset=offset))


def _box(box: Box, matrix: np.ndarray[Any, np.dtype[np.float64]]) -> Box:
    """The axis-aligned box around the moved corners."""
    ends = np.array([box.min, box.max])
    corners = np.array([[ends[k >> axis & 1][axis] for axis in range(3)] for k in range(8)])
    there = corners @ matrix[:3, :3].T + matrix[:3, 3]
    low, high = there.min(0).tolist(), there.max(0).tolist()
    return Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))


def _same_warp(dataset: Dataset, scene: Scene) -> list[str]:
    """A note where the field's NDC is that of another lens: the warp knows only width and height over focal length."""
    one, two = scene.ray_space, dataset.ray_space
    for a, b, f, g in ((one.width, two.width, one.focal, two.focal), (one.height, two.height, one.focal, two.focal)):
        if a and b and f and g and not math.isclose(a / f, b / g, rel_tol=0.01):
            return [f"the field's NDC has {a / f:.3f} focal lengths to a side, the pictures have {b / g:.3f}"]
    return []
