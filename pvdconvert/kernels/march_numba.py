"""numba twin of :mod:`pvdconvert.kernels.march`: walks the grid cell by cell and never leaves the ray's lattice."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from torch import Tensor

from pvdconvert.kernels.composite_numba import set_threads

if TYPE_CHECKING:
    from pvdconvert.kernels.march import Cells

# No fastmath: lattice points must round as in the truth, and infinities are part of the walk.


@numba.njit(inline="always", error_model="numpy")
def _clip(o: Any, d: Any, low: Any, high: Any, t0: Any, t1: Any) -> Any:
    """The part of [t0, t1] in one slab, double precision."""
    if d == 0.0:
        if o < low or o > high:
            t1 = -math.inf
    else:
        a, b = (low - o) / d, (high - o) / d
        t0, t1 = max(t0, min(a, b)), min(t1, max(a, b))
    return t0, t1


@numba.njit(inline="always", error_model="numpy")
def _leave(o: Any, d: Any, edge: Any, cell: Any, i: Any, t: Any) -> Any:
    """Where the ray leaves cell ``i`` of one axis, if that is before ``t``."""
    if d != 0.0:
        t = min(t, (edge + (i + (1 if d > 0.0 else 0)) * cell - o) / d)
    return t


@numba.njit(error_model="numpy", cache=True)
def _walk(
    o: Any, d: Any, t0: Any, t1: Any, phase: Any, origin: Any, grid: Any, cell: Any, step: Any, out: Any, at: Any
) -> Any:
    """Samples of one ray: their number; written to ``out[at:]`` unless that is empty."""
    nx, ny, nz = grid.shape
    wide, stride = np.float64(cell), np.float64(step)
    write = out.shape[0] > 0
    enter, leave = np.float64(t0), np.float64(t1)
    for axis in range(3):
        low, n = np.float64(origin[axis]), grid.shape[axis]
        # A cell of margin: the exact test is the one on the sample below.
        enter, leave = _clip(np.float64(o[axis]), np.float64(d[axis]), low - wide, low + (n + 1) * wide, enter, leave)
    if not enter < leave:
        return 0
    k = max(0, math.floor((enter - t0) / stride) - 2)
    count = 0
    while True:
        t = (np.float32(k) + phase) * step + t0
        if not (t < t1 and t <= leave + stride):
            return count
        ix = math.floor((o[0] + t * d[0] - origin[0]) / cell)
        iy = math.floor((o[1] + t * d[1] - origin[1]) / cell)
        iz = math.floor((o[2] + t * d[2] - origin[2]) / cell)
        if ix < 0 or iy < 0 or iz < 0 or ix >= nx or iy >= ny or iz >= nz:
            k += 1
        elif grid[ix, iy, iz]:
            if write:
                out[at + count] = t
            count += 1
            k += 1
        else:
            end = leave
            end = _leave(np.float64(o[0]), np.float64(d[0]), np.float64(origin[0]), wide, ix, end)
            end = _leave(np.float64(o[1]), np.float64(d[1]), np.float64(origin[1]), wide, iy, end)
            end = _leave(np.float64(o[2]), np.float64(d[2]), np.float64(origin[2]), wide, iz, end)
            # First lattice point behind the empty cell; the slack lets rounding add a look, never skip a sample.
            k = max(k + 1, math.ceil((end - t0) / stride - phase - 0.01))


@numba.njit(parallel=True, error_model="numpy", cache=True)
def _count(
    o: Any, d: Any, t0: Any, t1: Any, phase: Any, origin: Any, grid: Any, cell: Any, step: Any, offsets: Any
) -> None:
    none = np.empty(0, dtype=np.float32)
    for r in numba.prange(o.shape[0]):
        offsets[r + 1] = _walk(o[r], d[r], t0[r], t1[r], phase[r], origin, grid, cell, step, none, 0)


@numba.njit(parallel=True, error_model="numpy", cache=True)
def _fill(
    o: Any, d: Any, t0: Any, t1: Any, phase: Any, origin: Any, grid: Any, cell: Any, step: Any, offsets: Any, out: Any
) -> None:
    for r in numba.prange(o.shape[0]):
        if offsets[r + 1] > offsets[r]:
            _walk(o[r], d[r], t0[r], t1[r], phase[r], origin, grid, cell, step, out, offsets[r])


def march_numba(
    o: Tensor, d: Tensor, t0: Tensor, t1: Tensor, occ: Cells, step: float, jitter: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`pvdconvert.kernels.march.march`; counts first, then fills, in parallel over rays."""
    set_threads()
    arrays: list[Any] = [v.detach().contiguous().numpy() for v in (o, d, t0, t1, jitter, occ.origin, occ.grid)]
    offsets = np.zeros(o.shape[0] + 1, dtype=np.int64)
    cell, pace = np.float32(occ.cell), np.float32(step)
    _count(*arrays, cell, pace, offsets)  # type: ignore[call-arg]
    np.cumsum(offsets, out=offsets)
    t = np.empty(int(offsets[-1]), dtype=np.float32)
    if t.size:
        _fill(*arrays, cell, pace, offsets, t)  # type: ignore[call-arg]
    return torch.from_numpy(offsets), torch.from_numpy(t)
