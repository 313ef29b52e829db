"""torch-ngp's background network, as far as one colour can stand for it (layouts section 2.1). Imports no torch.

The program colours the end of a ray by where it meets a sphere and by its direction. A scene has one background colour:
the network's mean over all directions. Seen from the centre it is the same for any radius, which is in no file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.errors import InputError
from pvdconvert.plugin import LazyTensor
from pvdconvert_formats._torch_ngp_grid import scale_of

KEYS = ("encoder_bg.embeddings", "encoder_bg.offsets", "bg_net.0.weight")
BASE, DESIRED = 16, 2048
DIRECTIONS = 2048
_SH = 16
_PRIME = 2654435761


def mean_color(state: Mapping[str, LazyTensor], where: str) -> tuple[tuple[float, float, float], float]:
    """(mean colour of the background network, its standard deviation over directions). Raises InputError."""
    for key in KEYS:
        if key not in state:
            raise InputError(f"{where}: tensor {key!r} of its background network is missing")
    layers = [state[k].numpy().astype(np.float64) for k in _layers(state)]
    table = state["encoder_bg.embeddings"].numpy().astype(np.float64)
    offsets = [int(v) for v in state["encoder_bg.offsets"].numpy().reshape(-1)]
    sizes = [b - a for a, b in itertools.pairwise(offsets)]
    if table.ndim != 2 or not sizes or offsets[0] != 0 or min(sizes) < 1 or offsets[-1] != len(table):
        raise InputError(
            f"{where}: encoder_bg.offsets {offsets[:5]} do not fit encoder_bg.embeddings {list(table.shape)}"
        )
    widths = [_SH + len(sizes) * table.shape[1], *(w.shape[0] for w in layers)]
    if any(w.ndim != 2 or w.shape[1] != wide for w, wide in zip(layers, widths)) or widths[-1] != 3:
        raise InputError(f"{where}: bg_net maps {[list(w.shape) for w in layers]}, expected {widths[0]} to 3")
    d = _sphere(DIRECTIONS)
    x = np.concatenate([_harmonics(d), _grid(_place(d), table, offsets)], axis=1)
    for k, weight in enumerate(layers):
        x = x @ weight.T
        x = np.maximum(x, 0) if k < len(layers) - 1 else x
    color = 1 / (1 + np.exp(-np.clip(x, -60, 60)))
    if not np.isfinite(color).all():
        raise InputError(f"{where}: its background network holds what is not a number")
    r, g, b = (float(v) for v in color.mean(0))
    return (r, g, b), float(color.std(0).max())


def _layers(state: Mapping[str, Any]) -> list[str]:
    count = sum(k.startswith("bg_net.") for k in state)
    return [f"bg_net.{k}.weight" for k in range(count) if f"bg_net.{k}.weight" in state]


def _sphere(count: int) -> NDArray[np.float64]:
    """Directions of equal share of the sphere (a Fibonacci spiral) [count, 3]."""
    k = np.arange(count) + 0.5
    z, angle = 1 - 2 * k / count, math.pi * (1 + 5**0.5) * k
    r = np.sqrt(1 - z * z)
    return np.stack([r * np.cos(angle), r * np.sin(angle), z], axis=1)


def _place(d: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where on the sphere, [N, 2] in -1 .. 1: the angles from +y and around it."""
    x, y, z = d.T
    theta, phi = np.arctan2(np.hypot(x, z), y), np.arctan2(z, x)
    return np.stack([2 * theta / math.pi - 1, phi / math.pi], axis=1)


def _grid(place: NDArray[np.float64], table: NDArray[np.float64], offsets: list[int]) -> NDArray[np.float64]:
    """gridencoder in two dimensions, bound 1: [N, levels * features]."""
    x01 = np.clip((place + 1) / 2, 0.0, 1.0)
    growth = scale_of(len(offsets) - 1, BASE, DESIRED)
    step = np.float32(np.log2(growth))
    out = []
    for level, (first, end) in enumerate(itertools.pairwise(offsets)):
        scale = float(np.float32(np.exp2(np.float32(level) * step)) * BASE - 1)
        stride = math.ceil(scale) + 2
        pos = x01 * scale + 0.5
        cell = np.floor(pos).astype(np.int64)
        f = pos - cell
        total = np.zeros((len(place), table.shape[1]))
        for bits in itertools.product((0, 1), repeat=2):
            at = cell + bits
            i, j = at[:, 0], at[:, 1]
            index = i + j * stride if stride * stride <= end - first else i ^ (j * _PRIME & 0xFFFFFFFF)
            weight = np.where(np.array(bits, bool), f, 1 - f).prod(1)
            total += weight[:, None] * table[first + index % (end - first)]
        out.append(total)
    return np.concatenate(out, axis=1)


def _harmonics(d: NDArray[np.float64]) -> NDArray[np.float64]:
    """Real spherical harmonics of four bands [N, 16] (layouts section 0.3)."""
    x, y, z = d.T
    one, a, b = np.ones_like(x), 0.48860251190291987, 1.0925484305920792
    c, e = 0.45704579946446572, 0.59004358992664352
    columns = [0.28209479177387814 * one, -a * y, a * z, -a * x, b * x * y, -b * y * z,
               0.94617469575755997 * z * z - 0.31539156525251999, -b * x * z, b / 2 * (x * x - y * y),
               e * y * (y * y - 3 * x * x), 2.8906114426405538 * x * y * z, c * y * (1 - 5 * z * z),
               0.3731763325901154 * z * (5 * z * z - 3), c * x * (1 - 5 * z * z),
               1.4453057213202769 * z * (x * x - y * y), e * x * (3 * y * y - x * x)]  # fmt: skip
    return np.stack(columns, axis=1)
