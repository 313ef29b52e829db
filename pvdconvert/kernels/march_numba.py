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

# No fastmath: lattice points must round as in the truth, and infinities are part of the walk.


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _clip(a: Any, b: Any, n: Any, t0: Any, t1: Any) -> Any:
    """The part of [t0, t1] in which -1 <= a + t b <= n + 1: a cell of margin, the exact test is made on the samples."""
    if b == 0.0:
        if a < -1.0 or a > n + 1.0:
            t1 = -math.inf
    else:
        p, q = (-1.0 - a) / b, (n + 1.0 - a) / b
        t0, t1 = max(t0, min(p, q)), min(t1, max(p, q))
    return t0, t1


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _inverse(b: Any) -> Any:
    """1 / b; a ray that never leaves a slab leaves it at infinity."""
    return 1.0 / np.float64(b) if b != 0.0 else math.inf


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _leave(a: Any, inverse: Any, low: Any, size: Any) -> Any:
    """Where the ray leaves [low, low + size] of one axis."""
    return (low + (size if inverse > 0.0 else 0) - a) * inverse if inverse < math.inf else math.inf


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
    scale: Any,
    step: Any,
    runs: Any,
    offsets: Any,
    out: Any,
) -> None:
    """First pass (``out`` empty): the number of samples, to offsets[r + 1]; places and lengths of the first RUNS runs.

    Second pass: the samples, to out[offsets[r]:offsets[r + 1]]. Only rays with more runs are walked again, behind them.
    """
    nx, ny, nz = grid.shape
    write = out.shape[0] > 0
    rate = 1.0 / np.float64(step)
    for r in range(begin, stop):
        first, last, shift = t0[r], t1[r], phase[r]
        ax, ay, az = (o[r, 0] - origin[0]) * scale, (o[r, 1] - origin[1]) * scale, (o[r, 2] - origin[2]) * scale
        bx, by, bz = d[r, 0] * scale, d[r, 1] * scale, d[r, 2] * scale
        enter, leave = _clip(np.float64(ax), np.float64(bx), nx, np.float64(first), np.float64(last))
        enter, leave = _clip(np.float64(ay), np.float64(by), ny, enter, leave)
        enter, leave = _clip(np.float64(az), np.float64(bz), nz, enter, leave)
        ix, iy, iz = _inverse(bx), _inverse(by), _inverse(bz)
        at, count, run, behind = offsets[r], 0, -1, -1
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
            k = max(0, math.floor((enter - first) * rate) - 2)
        while todo:
            t = (np.float32(k) + shift) * step + first
            if not (t < last and t <= leave):
                break
            x, y, z = math.floor(ax + t * bx), math.floor(ay + t * by), math.floor(az + t * bz)
            if x < 0 or y < 0 or z < 0 or x >= nx or y >= ny or z >= nz:
                k += 1
                continue
            size = 1
            if not coarse[x >> 4, y >> 4, z >> 4]:
                size, x, y, z = 16, x & ~15, y & ~15, z & ~15
            elif not blocks[x >> 2, y >> 2, z >> 2]:
                size, x, y, z = 4, x & ~3, y & ~3, z & ~3
            elif grid[x, y, z]:
                if write:
                    out[at + count] = t
                    todo = at + count + 1 < offsets[r + 1]
                else:
                    if k != behind and run < RUNS:
                        run += 1
                        if run < RUNS:
                            runs[r, run, 0] = k
                    if run < RUNS:
                        runs[r, run, 1] += 1
                    behind = k + 1
                count += 1
                k += 1
                continue
            end = min(_leave(ax, ix, x, size), _leave(ay, iy, y, size), _leave(az, iz, z, size), leave + step)
            # First lattice point behind the empty cells; the slack lets rounding add a look, never skip a sample.
            k = max(k + 1, math.ceil((end - first) * rate - shift - 0.01))
        if not write:
            offsets[r + 1] = count


def march_numba(
    o: Tensor, d: Tensor, t0: Tensor, t1: Tensor, occ: Cells, step: float, jitter: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`pvdconvert.kernels.march.march`; counts first, then fills, in parallel over rays."""
    grid = occ.grid.contiguous().numpy()
    blocks = _blocks(grid)
    coarse = _blocks(blocks)
    runs = np.zeros((o.shape[0], RUNS, 2), dtype=np.int32)
    arrays: list[Any] = [v.detach().contiguous().numpy() for v in (o, d, t0, t1, jitter, occ.origin)]
    arrays += [grid, blocks, coarse, np.float32(1.0 / occ.cell), np.float32(step), runs]
    offsets = np.zeros(o.shape[0] + 1, dtype=np.int64)
    share(_march, len(o), *arrays, offsets, np.empty(0, dtype=np.float32), grain=GRAIN, uneven=8)
    np.cumsum(offsets, out=offsets)
    t = np.empty(int(offsets[-1]), dtype=np.float32)
    if t.size:
        share(_march, len(o), *arrays, offsets, t, grain=GRAIN, uneven=8)
    return torch.from_numpy(offsets), torch.from_numpy(t)
