"""CUDA twin of :mod:`pvdconvert.kernels.march` in Triton, float32: a thread walks a ray, as in the numba twin.

The walk never leaves the ray's lattice. Lattice points round as in the truth (no fused multiply-add); where the next
cell begins is reckoned in double precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdconvert.kernels.gpu import cdiv, launch

if TYPE_CHECKING:
    from pvdconvert.kernels.march import Cells

_SIDE = 4  # cells a side of the blocks in which empty space is skipped
_BLOCK = 128
_FAR = tl.constexpr(1e300)  # where a ray leaves a slab that it never leaves


@triton.jit
def _clip(a, b, n, t0, t1):  # type: ignore[no-untyped-def]
    """The part of [t0, t1] in which -1 <= a + t b <= n + 1: a cell of margin, the exact test is made on the samples."""
    flat = b == 0.0
    inverse = 1.0 / tl.where(flat, 1.0, b)
    p, q = (-1.0 - a) * inverse, (n + 1.0 - a) * inverse
    beside = flat & ((a < -1.0) | (a > n + 1.0))
    t0 = tl.where(flat, t0, tl.maximum(t0, tl.minimum(p, q)))
    t1 = tl.where(flat, tl.where(beside, t0 - 1.0, t1), tl.minimum(t1, tl.maximum(p, q)))
    return t0, t1


@triton.jit
def _leave(a, b, low, size):  # type: ignore[no-untyped-def]
    """Where the ray leaves [low, low + size] of one axis."""
    flat = b == 0.0
    edge = low + tl.where(b > 0.0, size, 0)
    return tl.where(flat, _FAR, (edge.to(tl.float64) - a) / tl.where(flat, 1.0, b))


@triton.jit
def _march(  # type: ignore[no-untyped-def]
    o, d, t0, t1, phase, origin, grid, coarse, scale, step, rays, nx, ny, nz, cy, cz, start, offsets, out,
    WRITE: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Without ``WRITE``: the first sample's place and the number of samples, to start[r] and offsets[r + 1].

    With it: the samples, to out[offsets[r]:offsets[r + 1]].
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = r < rays
    first = tl.load(t0 + r, mask=live, other=0.0)
    last = tl.load(t1 + r, mask=live, other=0.0)
    shift = tl.load(phase + r, mask=live, other=0.0)
    ax = (tl.load(o + r * 3, mask=live, other=0.0) - tl.load(origin)) * scale
    ay = (tl.load(o + r * 3 + 1, mask=live, other=0.0) - tl.load(origin + 1)) * scale
    az = (tl.load(o + r * 3 + 2, mask=live, other=0.0) - tl.load(origin + 2)) * scale
    bx = tl.load(d + r * 3, mask=live, other=0.0) * scale
    by = tl.load(d + r * 3 + 1, mask=live, other=0.0) * scale
    bz = tl.load(d + r * 3 + 2, mask=live, other=0.0) * scale
    wax, way, waz = ax.to(tl.float64), ay.to(tl.float64), az.to(tl.float64)
    wbx, wby, wbz = bx.to(tl.float64), by.to(tl.float64), bz.to(tl.float64)
    begin = first.to(tl.float64)
    enter, leave = _clip(wax, wbx, nx, begin, last.to(tl.float64))
    enter, leave = _clip(way, wby, ny, enter, leave)
    enter, leave = _clip(waz, wbz, nz, enter, leave)
    stride = tl.full([BLOCK], 0.0, tl.float64) + step
    at = tl.load(offsets + r, mask=live, other=0)
    found = tl.zeros([BLOCK], tl.int64)
    if WRITE:
        total = tl.load(offsets + r + 1, mask=live, other=0) - at
        todo = live & (total > 0)
        k = tl.load(start + r, mask=live, other=0)
    else:
        total = found
        todo = live & (enter < leave)
        k = tl.maximum(tl.floor(tl.where(todo, (enter - begin) / stride, 0.0)).to(tl.int64) - 2, 0)
    place = k
    while tl.max(todo.to(tl.int32), axis=0) > 0:
        t = (k.to(tl.float32) + shift) * step + first
        todo = todo & (t < last) & (t.to(tl.float64) <= leave)
        x = tl.floor(tl.where(todo, ax + t * bx, -1.0)).to(tl.int32)
        y = tl.floor(tl.where(todo, ay + t * by, -1.0)).to(tl.int32)
        z = tl.floor(tl.where(todo, az + t * bz, -1.0)).to(tl.int32)
        within = todo & (x >= 0) & (y >= 0) & (z >= 0) & (x < nx) & (y < ny) & (z < nz)
        hit = within & (tl.load(grid + (x.to(tl.int64) * ny + y) * nz + z, mask=within, other=0) > 0)
        if WRITE:
            tl.store(out + at + found, t, mask=hit)
        else:
            place = tl.where(hit & (found == 0), k, place)
        found += hit.to(tl.int64)
        empty = within & (hit == 0)
        x, y, z = tl.where(empty, x, 0), tl.where(empty, y, 0), tl.where(empty, z, 0)
        cube = ((x // SIDE).to(tl.int64) * cy + y // SIDE) * cz + z // SIDE
        whole = empty & (tl.load(coarse + cube, mask=empty, other=1) == 0)
        size = tl.where(whole, SIDE, 1)
        end = tl.minimum(_leave(wax, wbx, x // size * size, size), _leave(way, wby, y // size * size, size))
        end = tl.minimum(tl.minimum(end, _leave(waz, wbz, z // size * size, size)), leave + stride)
        # First lattice point behind the empty cells; the slack lets rounding add a look, never skip a sample.
        ahead = (tl.where(empty, end, begin) - begin) / stride - shift.to(tl.float64) - 0.01
        k = tl.maximum(k + 1, tl.where(empty, tl.ceil(ahead), 0.0).to(tl.int64))
        if WRITE:
            todo = todo & (found < total)
    if not WRITE:
        tl.store(start + r, place, mask=live)
        tl.store(offsets + r + 1, found, mask=live)


def _coarse(grid: Tensor) -> Tensor:
    """Which blocks of cells hold an occupied one."""
    x, y, z = (cdiv(n, _SIDE) for n in grid.shape)
    pads = [side * _SIDE - n for side, n in zip((z, y, x), reversed(grid.shape))]
    padded = torch.nn.functional.pad(grid, [0, pads[0], 0, pads[1], 0, pads[2]])
    return padded.view(x, _SIDE, y, _SIDE, z, _SIDE).amax((1, 3, 5)).contiguous()


def march_triton(
    o: Tensor, d: Tensor, t0: Tensor, t1: Tensor, occ: Cells, step: float, jitter: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`pvdconvert.kernels.march.march`; counts first, then fills."""
    rays, grid = o.shape[0], occ.grid.contiguous()
    offsets = torch.zeros(rays + 1, dtype=torch.int64, device=o.device)
    start = torch.zeros(rays, dtype=torch.int64, device=o.device)
    if not rays:
        return offsets, o.new_empty(0)
    coarse = _coarse(grid)
    arrays = [v.detach().float().contiguous() for v in (o, d, t0, t1, jitter, occ.origin)]
    numbers = (1.0 / occ.cell, step, rays, *grid.shape, *coarse.shape[1:], start)
    meta: dict[str, Any] = {"SIDE": _SIDE, "BLOCK": _BLOCK, "enable_fp_fusion": False}
    blocks = (cdiv(rays, _BLOCK),)
    launch(_march, blocks, o, *arrays, grid, coarse, *numbers, offsets, o.new_empty(0), WRITE=False, **meta)
    torch.cumsum(offsets.clone(), 0, out=offsets)
    t = o.new_empty(int(offsets[-1]))
    if t.numel():
        launch(_march, blocks, o, *arrays, grid, coarse, *numbers, offsets, t, WRITE=True, **meta)
    return offsets, t
