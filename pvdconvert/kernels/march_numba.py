"""numba twin of :mod:`pvdconvert.kernels.march`: walks the grid cell by cell and never leaves the ray's lattice."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvdconvert.kernels.cpu import share

if TYPE_CHECKING:
    from pvdconvert.kernels.march import Cells

# Empty space is skipped in blocks of 4 and of 16 cells a side.
RUNS = 4
"""Runs of samples side by side that the first pass remembers of each ray."""

GRAIN = 64
"""Rays that are worth a thread."""

SLOW = 0.25
"""Cells a step below which it pays to reckon where an empty cell ends; above, the next sample is looked at sooner."""

# No fastmath: lattice points must round as in the truth, and infinities are part of the walk.


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _clip(a: Any, b: Any, low: Any, high: Any, t0: Any, t1: Any) -> Any:
    """The part of [t0, t1] in which low - 1 <= a + t b <= high + 1: a cell of margin, the exact test is made on the
    samples."""
    if b == 0.0:
        if a < low - 1.0 or a > high + 1.0:
            t1 = -math.inf
    else:
        p, q = (low - 1.0 - a) / b, (high + 1.0 - a) / b
        t0, t1 = max(t0, min(p, q)), min(t1, max(p, q))
    return t0, t1


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _axis(a: Any, b: Any) -> Any:
    """(rate, shift, side): the ray a + t b leaves cells [low, low + size] at (low + side * size) * rate + shift."""
    if b == 0.0:
        return 0.0, math.inf, 0  # never
    rate = 1.0 / np.float64(b)
    return rate, -np.float64(a) * rate, np.int64(rate > 0.0)


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _cell(a: Any, b: Any, t: Any) -> Any:
    """The cell of the point at ``t``, unsigned: below 0 it is a number beyond any grid, and an index needs no check."""
    return np.uint64(np.int64(np.floor(a + t * b)))


def _blocks(grid: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Which blocks of 4^3 cells hold an occupied one."""
    x, y, z = (-(-n // 4) for n in grid.shape)
    if grid.shape != (4 * x, 4 * y, 4 * z):
        grid = np.pad(grid, [(0, 4 * n - m) for n, m in zip((x, y, z), grid.shape)])
    words = np.ascontiguousarray(grid).view(np.uint32)  # four cells along z in one number
    found: NDArray[np.bool_] = np.bitwise_or.reduce(words.reshape(x, 4, y, 4, z), axis=(1, 3)) != 0
    return found.view(np.uint8)


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _march(
    begin: int,
    stop: int,
    o: Any,
    d: Any,
    t0: Any,
    t1: Any,
    phase: Any,
    origin: Any,
    grid: Any,
    blocks: Any,
    coarse: Any,
    around: Any,
    scale: Any,
    step: Any,
    runs: Any,
    offsets: Any,
    out: Any,
) -> None:
    """First pass (``out`` empty): the number of samples, to offsets[r + 1]; places and lengths of the first RUNS runs.

    Second pass: the samples, to out[offsets[r]:offsets[r + 1]]. Only rays with more runs are walked again, behind them.
    """
    nx, ny, nz = np.uint64(grid.shape[0]), np.uint64(grid.shape[1]), np.uint64(grid.shape[2])
    write = out.shape[0] > 0
    rate = 1.0 / np.float64(step)
    for r in range(begin, stop):
        first, last, shift = t0[r], t1[r], phase[r]
        ax, ay, az = (o[r, 0] - origin[0]) * scale, (o[r, 1] - origin[1]) * scale, (o[r, 2] - origin[2]) * scale
        bx, by, bz = d[r, 0] * scale, d[r, 1] * scale, d[r, 2] * scale
        enter, leave = np.float64(first), np.float64(last)
        enter, leave = _clip(np.float64(ax), np.float64(bx), around[0, 0], around[0, 1], enter, leave)
        enter, leave = _clip(np.float64(ay), np.float64(by), around[1, 0], around[1, 1], enter, leave)
        enter, leave = _clip(np.float64(az), np.float64(bz), around[2, 0], around[2, 1], enter, leave)
        (ix, ox, sx), (iy, oy, sy), (iz, oz, sz) = _axis(ax, bx), _axis(ay, by), _axis(az, bz)
        slow = max(abs(bx), abs(by), abs(bz)) * step < SLOW
        at, count, run = offsets[r], 0, 0
        todo = enter < leave
        k: Any = 0
        if write:
            for i in range(RUNS):
                k = np.int64(runs[r, i, 0])
                for _ in range(runs[r, i, 1]):
                    out[at + count] = (np.float32(k) + shift) * step + first
                    count += 1
                    k += 1
            todo = at + count < offsets[r + 1]
        elif todo:
            k = max(0, np.int64(np.floor((enter - first) * rate)) - 2)
        begun = k
        while todo:
            t = (np.float32(k) + shift) * step + first
            todo = t < last and t <= leave
            x, y, z = _cell(ax, bx, t), _cell(ay, by, t), _cell(az, bz, t)
            inside = todo and x < nx and y < ny and z < nz
            if inside and grid[x, y, z]:
                k += 1
                continue
            if k > begun:  # a run has ended
                if write:
                    for i in range(begun, k):
                        out[at + count + i - begun] = (np.float32(i) + shift) * step + first
                elif run < RUNS:
                    runs[r, run, 0], runs[r, run, 1] = begun, k - begun
                count += k - begun
                run += 1
                todo = todo and not (write and at + count == offsets[r + 1])
            k += 1
            if inside:
                size, x, y, z = 1, np.int64(x), np.int64(y), np.int64(z)
                if not blocks[x >> 2, y >> 2, z >> 2]:
                    size = 4 if coarse[x >> 4, y >> 4, z >> 4] else 16
                if size > 1 or slow:
                    x, y, z = x & -size, y & -size, z & -size
                    end = min((x + size * sx) * ix + ox, (y + size * sy) * iy + oy, (z + size * sz) * iz + oz)
                    # First lattice point behind the empty cells; the slack lets rounding add a look, never skip one.
                    k = max(k, np.int64(np.ceil((end - first) * rate - shift - 0.01)))
            begun = k
        if not write:
            offsets[r + 1] = count


def _around(blocks: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[3, 2]: between which cells the occupied blocks lie."""
    found = np.zeros((3, 2))
    for axis in range(3):
        some = np.flatnonzero(blocks.max(axis=tuple(k for k in range(3) if k != axis), initial=0))
        found[axis] = (4 * some[0], 4 * some[-1] + 4) if len(some) else (0, 0)
    return found


def march_numba(
    o: Tensor, d: Tensor, t0: Tensor, t1: Tensor, occ: Cells, step: float, jitter: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`pvdconvert.kernels.march.march`; counts first, then fills, in parallel over rays."""
    grid = occ.grid.contiguous().numpy()
    blocks = _blocks(grid)
    coarse = _blocks(blocks)
    runs = np.zeros((o.shape[0], RUNS, 2), dtype=np.int32)
    arrays: list[Any] = [v.detach().contiguous().numpy() for v in (o, d, t0, t1, jitter, occ.origin)]
    arrays += [grid, blocks, coarse, _around(blocks), np.float32(1.0 / occ.cell), np.float32(step), runs]
    offsets = np.zeros(o.shape[0] + 1, dtype=np.int64)
    share(_march, len(o), *arrays, offsets, np.empty(0, dtype=np.float32), grain=GRAIN, uneven=8)
    np.cumsum(offsets, out=offsets)
    t = np.empty(int(offsets[-1]), dtype=np.float32)
    if t.size:
        share(_march, len(o), *arrays, offsets, t, grain=GRAIN, uneven=8)
    return torch.from_numpy(offsets), torch.from_numpy(t)
