"""Pictures of a report: which views are shown, and their bytes within a page. Imports no torch."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 6
"""Views on a page."""

SIDES = (300, 220, 160, 110)
"""Pixels of the longer side, tried in this order until all pictures fit."""

ROOM = 2_600_000
"""Bytes of pictures on a page, before base64 makes them a third longer."""

SOLID = 0.5
"""Opacity from which on a distance means something."""


@dataclasses.dataclass(frozen=True)
class View:
    """One view, seen by two or more.

    name      what it is called, as in the ``views`` of the document: "view 3", "r_48.png"
    colors    who drew it -> bytes [H, W, 3], the reference first: {"teacher": ..., "student": ...}, or
              {"image": ..., "field": ...}; all views of a page name the same ones
    depth     likewise -> distances [H, W], 0 where there is nothing (world units); may be empty
    opacity   likewise -> [H, W] in [0, 1]; may be empty
    """

    name: str
    colors: Mapping[str, NDArray[np.uint8]]
    depth: Mapping[str, NDArray[np.floating[Any]]] = dataclasses.field(default_factory=dict)
    opacity: Mapping[str, NDArray[np.floating[Any]]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Shown:
    """A view as the page holds it: kind -> who -> data URI, and the distances of the depth ramp's two ends."""

    name: str
    pictures: dict[str, dict[str, str]]
    near: float | None
    far: float | None
    size: tuple[int, int]


def choose(scores: Sequence[float], most: int = MOST) -> list[int]:
    """Which views to show: the worst, the best, and evenly spaced ranks between them, in their own order."""
    rank = sorted(range(len(scores)), key=lambda n: scores[n])
    if len(rank) <= most:
        return sorted(rank)
    return sorted({rank[round(k * (len(rank) - 1) / (most - 1))] for k in range(most)})


def shown(views: Sequence[View]) -> list[Shown]:
    """``views`` as data URIs, lossless, at most :data:`ROOM` bytes altogether: differences must be the fields' own."""
    for side in SIDES:
        encoded = [_encode(view, side) for view in views]
        if sum(len(uri) for v in encoded for kind in v.pictures.values() for uri in kind.values()) <= ROOM * 4 / 3:
            break
    return encoded if views else []


def _encode(view: View, side: int) -> Shown:
    kinds: dict[str, dict[str, str]] = {"color": {who: _uri(v, side, "RGB") for who, v in view.colors.items()}}
    near, far = _range(view)
    if near is not None and far is not None:
        kinds["depth"] = {
            who: _uri(_depth(v, view.opacity.get(who), near, far), side, "LA") for who, v in view.depth.items()
        }
    if view.opacity:
        kinds["opacity"] = {
            who: _uri(np.clip(np.nan_to_num(v) * 255.0 + 0.5, 0, 255).astype(np.uint8), side, "L")
            for who, v in view.opacity.items()
        }
    height, width = next(iter(view.colors.values())).shape[:2]
    return Shown(view.name, kinds, near, far, (width, height))


def _range(view: View) -> tuple[float | None, float | None]:
    """Where the ramp of depth begins and ends: all but the outermost hundredths of the solid distances of all."""
    solid = []
    for who, distance in view.depth.items():
        there = np.isfinite(distance) & (distance > 0)
        if who in view.opacity:
            there &= view.opacity[who] > SOLID
        solid.append(distance[there])
    values = np.concatenate(solid) if solid else np.zeros(0)
    if values.size == 0:
        return None, None
    near, far = (float(v) for v in np.percentile(values.astype(np.float64), (1, 99)))
    return near, max(far, near * 1.0001 + 1e-9)


def _depth(
    distance: NDArray[np.floating[Any]], opacity: NDArray[np.floating[Any]] | None, near: float, far: float
) -> NDArray[np.uint8]:
    """[H, W, 2]: near is bright; as transparent as the field is."""
    level = np.clip((far - np.nan_to_num(distance.astype(np.float64), posinf=far)) / (far - near), 0.0, 1.0)
    cover = np.where(distance > 0, 1.0, 0.0) if opacity is None else np.clip(np.nan_to_num(opacity), 0.0, 1.0)
    return np.floor(np.stack([level, cover], axis=-1) * 255.0 + 0.5).astype(np.uint8)


def _uri(pixels: NDArray[np.uint8], side: int, mode: str) -> str:
    from PIL import Image, features

    height, width = pixels.shape[:2]
    picture = Image.frombytes(mode, (width, height), np.ascontiguousarray(pixels).tobytes())
    if max(width, height) > side:
        scale = side / max(width, height)
        picture = picture.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX)
    data = io.BytesIO()
    if features.check("webp"):  # two thirds of a PNG
        picture.convert("RGBA" if mode == "LA" else "RGB").save(data, "WEBP", lossless=True, quality=60, method=4)
        kind = "webp"
    else:
        picture.save(data, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
