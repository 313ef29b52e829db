"""What torch-ngp's files leave unsaid about their grids: resolutions out of offsets, Morton bitfields.

Imports no torch. Layouts sections 2.1 and 8.4.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

GRID = 128
"""Cells per axis of the density grid, in every cascade."""
MAX_EXPANDED = 512
BASE = 16
DESIRED = 2048
_COMMON = (DESIRED, 1024, 512, 256, 4096, 8192, 16384, 128)
"""Finest resolutions (per unit of bound) that people train with, in the order of trust."""


def scale_of(levels: int, base: int, finest: float) -> float:
    """torch-ngp's ``per_level_scale``: ``exp2(log2(finest / base) / (levels - 1))``, float64."""
    return float(np.exp2(np.log2(finest / base) / (levels - 1))) if levels > 1 else 1.0


def level_sizes(levels: int, base: int, scale: float, log2_table: int, *, rounded: bool = True) -> list[int]:
    """Entries of each level; ``rounded`` up to multiples of 8 since 2022-06-06."""
    try:
        resolutions = [math.ceil(base * scale**level) for level in range(levels)]
    except OverflowError:
        return []
    sizes = [min(1 << log2_table, (r + 1) ** 3) for r in resolutions]
    return [(n + 7) // 8 * 8 for n in sizes] if rounded else sizes


def base_of(size: int) -> int | None:
    """The base resolution whose dense level has ``size`` entries, or None."""
    guess = max(1, round(math.pow(size, 1 / 3)) - 1)
    for base in (guess, guess - 1):
        if base > 0 and size in ((base + 1) ** 3, ((base + 1) ** 3 + 7) // 8 * 8):
            return base
    return None


def table_of(sizes: Sequence[int]) -> int:
    """log2 of the table: of the largest level where that is a power of two, else the smallest that holds it."""
    return max(3, (max(sizes) - 1).bit_length())


def finest_of(sizes: Sequence[int], base: int, bound: float) -> tuple[float | None, int, list[float]]:
    """(finest resolution or None, dense levels that pin it, all common values that fit).

    The common values are tried in order of trust; where none fits but the dense levels leave one whole number, that.
    """
    levels, table = len(sizes), table_of(sizes)

    def fits(finest: float) -> bool:
        scale = scale_of(levels, base, finest)
        return any(level_sizes(levels, base, scale, table, rounded=r) == list(sizes) for r in (True, False))

    dense = sum(n != 1 << table for n in sizes[1:])
    common = [c * b for b in dict.fromkeys((bound, 1.0)) for c in _COMMON]
    fitting = [float(f) for f in dict.fromkeys(common) if f >= base and fits(float(f))]
    if fitting:
        return fitting[0], dense, fitting
    low, high = 1.0, 64.0
    for level, size in enumerate(sizes):
        resolution = base_of(size) if size != 1 << table else None
        if level and resolution:
            low = max(low, ((resolution - 1) / base) ** (1 / level))
            high = min(high, (resolution / base) ** (1 / level))
    if levels > 1 and low < high:
        first, last = math.ceil(base * low ** (levels - 1)), math.floor(base * high ** (levels - 1) + 1e-9)
        whole = [f for f in range(first, min(last, first + 64) + 1) if fits(float(f))]
        if len(whole) == 1 and last - first < 64:
            return float(whole[0]), dense, [float(whole[0])]
    return None, dense, []


@functools.cache
def morton() -> NDArray[np.int64]:
    """[128, 128, 128] index of cell (x, y, z) in Morton order, x in the lowest bit."""
    n = np.arange(GRID, dtype=np.int64)
    spread = np.zeros_like(n)
    for bit in range(7):
        spread |= (n >> bit & 1) << (3 * bit)
    out: NDArray[np.int64] = spread[:, None, None] | spread[None, :, None] << 1 | spread[None, None, :] << 2
    return out


def half_side(cascade: int, bound: float) -> float:
    """Half the side of the cube that ``cascade`` covers."""
    return min(2.0**cascade, bound)


def cascades(bound: float) -> int:
    """How many cascades torch-ngp makes for ``bound``."""
    return 1 + max(0, math.ceil(math.log2(bound)))


def read_bitfield(bits: NDArray[np.uint8], bound: float) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """(mask configuration, packed bits) of ``bits`` [C * 128^3 / 8].

    A point is looked up in the finest cascade that contains it; a few cascades become one grid of the finest cells.
    """
    count = bits.size * 8 // GRID**3
    index = morton()
    grids = [np.unpackbits(part, bitorder="little")[index] for part in bits.reshape(count, -1)]
    if any(half_side(c, bound) != 2.0**c for c in range(1, count)) or GRID << (count - 1) > MAX_EXPANDED:
        halves = [half_side(c, bound) for c in range(count)]
        config = {"shape": [count, *[GRID] * 3], "center": [0.0] * 3, "halves": halves}
        return config, np.packbits(np.stack(grids).reshape(-1), bitorder="little")
    grid = grids[-1]
    for inner in reversed(grids[:-1]):
        grid = grid.repeat(2, 0).repeat(2, 1).repeat(2, 2)
        edge = (grid.shape[0] - GRID) // 2  # cells are now as fine as the inner cascade's
        grid[edge : edge + GRID, edge : edge + GRID, edge : edge + GRID] = inner
    half = half_side(count - 1, bound)
    config = {"shape": list(grid.shape), "origin": [-half] * 3, "cell": 2 * half / grid.shape[0]}
    return config, np.packbits(grid.reshape(-1), bitorder="little")


def write_bitfield(mask: Mapping[str, Any], bits: NDArray[np.uint8], bound: float) -> NDArray[np.uint8]:
    """torch-ngp's bitfield [C * 128^3 / 8]: a cell is set where any set cell of the mask touches its inside."""
    fields = []
    for cascade in range(cascades(bound)):
        half = half_side(cascade, bound)
        steps = -half + np.arange(GRID + 1) * (2 * half / GRID)
        flat = np.empty(GRID**3, np.uint8)
        flat[morton().reshape(-1)] = covered(mask, bits, [steps] * 3).reshape(-1)
        fields.append(np.packbits(flat, bitorder="little"))
    return np.concatenate(fields)


def covered(mask: Mapping[str, Any], bits: NDArray[np.uint8], edges: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
    """Which of the cells between ``edges`` (ascending, one array an axis, world) a set cell of a mask reaches into.

    ``mask`` and ``bits`` as in :mod:`pvdconvert.nn.mask` and :mod:`pvdconvert.nn.cascades`. Of nested cubes a cell
    that lies within a finer one counts only there.
    """
    shape = [int(n) for n in mask["shape"]]
    grid = np.unpackbits(bits, count=math.prod(shape), bitorder="little").reshape(shape).astype(bool)
    if "halves" not in mask:
        return _reaching(grid, mask["origin"], float(mask["cell"]), edges)
    out = np.zeros([len(e) - 1 for e in edges], bool)
    for k, (cube, half) in enumerate(zip(grid, mask["halves"])):
        cell = 2 * float(half) / shape[1]
        if k:
            n = int(float(mask["halves"][k - 1]) / cell + 1e-6)  # cells from the centre that the finer cube covers
            middle = slice(shape[1] // 2 - n, shape[1] // 2 + n)
            cube = cube.copy()
            cube[middle, middle, middle] = False
        out |= _reaching(cube, [v - float(half) for v in mask["center"]], cell, edges)
    return out


def _reaching(
    grid: NDArray[np.bool_], origin: Sequence[float], cell: float, edges: Sequence[NDArray[Any]]
) -> NDArray[np.bool_]:
    out = grid
    for axis in range(3):
        at = (edges[axis] - origin[axis]) / cell
        first = np.clip(np.floor(at[:-1] + 1e-6), 0, grid.shape[axis]).astype(int)
        last = np.clip(np.ceil(at[1:] - 1e-6), 0, grid.shape[axis]).astype(int)
        # How many are set before each edge: a difference says whether any is between two.
        before = np.insert(out.cumsum(axis, dtype=np.int32), 0, 0, axis)
        out = before.take(np.maximum(first, last), axis) > before.take(first, axis)
    return out
