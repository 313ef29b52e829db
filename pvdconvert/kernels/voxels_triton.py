"""CUDA twin of :mod:`pvdconvert.kernels.voxels` in Triton, float32.

As on the CPU, rows and weights of a point's eight corners are found first; then a program gathers or scatters a block
of channels for a block of points. Channels are the fastest axis of blocks and tables. Scattering adds by float32
atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdconvert.kernels.gpu import blocks, cdiv, launch, power_of_two

_BLOCK = 256


@triton.jit
def _corner(top, bricks, i, j, k, by, bz, mask, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row of vertex (i, j, k), or -1."""
    at = ((i >> SHIFT).to(tl.int64) * by + (j >> SHIFT)) * bz + (k >> SHIFT)
    brick = tl.load(top + at, mask=mask, other=-1)
    low = (1 << SHIFT) - 1
    local = ((((i & low) << SHIFT) | (j & low)) << SHIFT) | (k & low)
    found = mask & (brick >= 0)
    return tl.load(bricks + (brick.to(tl.int64) << (3 * SHIFT)) + local, mask=found, other=-1)


@triton.jit
def _locate(  # type: ignore[no-untyped-def]
    xg, top, bricks, rows, weights, count, nx, ny, nz, by, bz,
    SHIFT: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = n < count
    x = tl.load(xg + n * 3, mask=live, other=-1.0)
    y = tl.load(xg + n * 3 + 1, mask=live, other=-1.0)
    z = tl.load(xg + n * 3 + 2, mask=live, other=-1.0)
    # Written so that NaN falls outside.
    ok = live & (x >= 0) & (x <= nx - 1) & (y >= 0) & (y <= ny - 1) & (z >= 0) & (z <= nz - 1)
    x, y, z = tl.where(ok, x, 0.0), tl.where(ok, y, 0.0), tl.where(ok, z, 0.0)
    i = tl.minimum(x.to(tl.int32), nx - 2)
    j = tl.minimum(y.to(tl.int32), ny - 2)
    k = tl.minimum(z.to(tl.int32), nz - 2)
    fx, fy, fz = x - i.to(tl.float32), y - j.to(tl.float32), z - k.to(tl.float32)
    keep = ok
    if WHOLE:
        for c in tl.static_range(8):
            row = _corner(top, bricks, i + (c >> 2 & 1), j + (c >> 1 & 1), k + (c & 1), by, bz, ok, SHIFT)
            keep = keep & (row >= 0)
    for c in tl.static_range(8):
        row = _corner(top, bricks, i + (c >> 2 & 1), j + (c >> 1 & 1), k + (c & 1), by, bz, keep, SHIFT)
        wx = fx if c >> 2 & 1 else 1.0 - fx
        wy = fy if c >> 1 & 1 else 1.0 - fy
        wz = fz if c & 1 else 1.0 - fz
        tl.store(rows + n * 8 + c, row, mask=live)
        tl.store(weights + n * 8 + c, tl.where(row >= 0, wx * wy * wz, 0.0), mask=live)


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    rows, weights, values, out, count, fill, C: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live = n < count
    mask = live[:, None] & (c < C)[None, :]
    total = tl.zeros([POINTS, CHANNELS], tl.float32)
    some = n < 0
    for q in tl.static_range(8):
        row = tl.load(rows + n * 8 + q, mask=live, other=-1)
        w = tl.load(weights + n * 8 + q, mask=live, other=0.0)
        there = row >= 0
        some = some | there
        at = values + row.to(tl.int64)[:, None] * C + c[None, :]
        total += w[:, None] * tl.load(at, mask=mask & there[:, None], other=0.0)
    tl.store(out + n[:, None] * C + c[None, :], tl.where(some[:, None], total, fill), mask=mask)


@triton.jit
def _scatter(  # type: ignore[no-untyped-def]
    rows, weights, grad, into, touched, count, along, across,
    C: tl.constexpr, MARK: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live = n < count
    mask = live[:, None] & (c < C)[None, :]
    g = tl.load(grad + n[:, None] * along + c[None, :] * across, mask=mask, other=0.0)
    for q in tl.static_range(8):
        row = tl.load(rows + n * 8 + q, mask=live, other=-1)
        w = tl.load(weights + n * 8 + q, mask=live, other=0.0)
        there = row >= 0
        at = into + row.to(tl.int64)[:, None] * C + c[None, :]
        tl.atomic_add(at, w[:, None] * g, mask=mask & there[:, None], sem="relaxed")
        if MARK:
            tl.store(touched + row, 1, mask=there)


@triton.jit
def _gather_sh(  # type: ignore[no-untyped-def]
    rows, weights, basis, sh, out, count, directions,
    BANDS: tl.constexpr, POINTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    color = tl.program_id(1)
    b = tl.arange(0, WIDTH)
    live = n < count
    mask = live[:, None] & (b < BANDS)[None, :]
    mixed = tl.zeros([POINTS, WIDTH], tl.float32)
    for q in tl.static_range(8):
        row = tl.load(rows + n * 8 + q, mask=live, other=-1)
        w = tl.load(weights + n * 8 + q, mask=live, other=0.0)
        at = sh + row.to(tl.int64)[:, None] * (3 * BANDS) + (color * BANDS + b)[None, :]
        mixed += w[:, None] * tl.load(at, mask=mask & (row >= 0)[:, None], other=0.0)
    for k in range(0, directions):
        place = n * directions + k
        y = tl.load(basis + place[:, None] * BANDS + b[None, :], mask=mask, other=0.0)
        tl.store(out + place * 3 + color, tl.sum(mixed * y, axis=1), mask=live)


@triton.jit
def _scatter_sh(  # type: ignore[no-untyped-def]
    rows, weights, basis, grad, into, touched, count, directions,
    BANDS: tl.constexpr, MARK: tl.constexpr, POINTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    color = tl.program_id(1)
    b = tl.arange(0, WIDTH)
    live = n < count
    mask = live[:, None] & (b < BANDS)[None, :]
    line = tl.zeros([POINTS, WIDTH], tl.float32)
    for k in range(0, directions):
        place = n * directions + k
        y = tl.load(basis + place[:, None] * BANDS + b[None, :], mask=mask, other=0.0)
        line += tl.load(grad + place * 3 + color, mask=live, other=0.0)[:, None] * y
    for q in tl.static_range(8):
        row = tl.load(rows + n * 8 + q, mask=live, other=-1)
        w = tl.load(weights + n * 8 + q, mask=live, other=0.0)
        there = row >= 0
        at = into + row.to(tl.int64)[:, None] * (3 * BANDS) + (color * BANDS + b)[None, :]
        tl.atomic_add(at, w[:, None] * line, mask=mask & there[:, None], sem="relaxed")
        if MARK:
            tl.store(touched + row, 1, mask=there)


def locate(xg: Tensor, shape: Sequence[int], top: Tensor, bricks: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    """See :func:`pvdconvert.kernels.voxels_numba.locate`."""
    count = len(xg)
    rows, weights = xg.new_empty((count, 8), dtype=torch.int32), xg.new_empty((count, 8))
    if count:
        shift = round(bricks.shape[1] ** (1 / 3)).bit_length() - 1
        arrays = (xg.detach().contiguous(), top.contiguous(), bricks.contiguous(), rows, weights)
        numbers = (count, *shape, *top.shape[1:])
        launch(_locate, (cdiv(count, _BLOCK),), xg, *arrays, *numbers, SHIFT=shift, WHOLE=whole, BLOCK=_BLOCK)
    return rows, weights


def gather(rows: Tensor, weights: Tensor, values: Tensor, fill: float) -> Tensor:
    """See :func:`pvdconvert.kernels.voxels_numba.gather`."""
    count, width = len(rows), values.shape[1]
    out = values.new_empty(count, width)
    if out.numel():
        points, channels = blocks(width)
        grid = (cdiv(count, points), cdiv(width, channels))
        arrays = (rows, weights, values.detach().contiguous(), out)
        launch(_gather, grid, values, *arrays, count, float(fill), C=width, POINTS=points, CHANNELS=channels)
    return out


def scatter(rows: Tensor, weights: Tensor, grad: Tensor, into: Tensor, touched: Tensor | None) -> None:
    """See :func:`pvdconvert.kernels.voxels_numba.scatter`; ``grad`` may have any strides."""
    count, width = grad.shape
    points, channels = blocks(width)
    grid = (cdiv(count, points), cdiv(width, channels))
    arrays = (rows, weights, grad, into, into if touched is None else touched)
    meta = {"C": width, "MARK": touched is not None, "POINTS": points, "CHANNELS": channels}
    launch(_scatter, grid, grad, *arrays, count, *grad.stride(), **meta)


def gather_sh(rows: Tensor, weights: Tensor, basis: Tensor, sh: Tensor) -> Tensor:
    """See :func:`pvdconvert.kernels.voxels_numba.gather_sh`."""
    count, directions, bands = basis.shape
    out = sh.new_empty(count, directions, 3)
    if out.numel():
        points, _ = blocks(bands)
        arrays = (rows, weights, basis.contiguous(), sh.detach().contiguous(), out)
        meta = {"BANDS": bands, "POINTS": points, "WIDTH": power_of_two(bands)}
        launch(_gather_sh, (cdiv(count, points), 3), sh, *arrays, count, directions, **meta)
    return out


def scatter_sh(
    rows: Tensor, weights: Tensor, basis: Tensor, grad: Tensor, into: Tensor, touched: Tensor | None
) -> None:
    """See :func:`pvdconvert.kernels.voxels_numba.scatter_sh`."""
    count, directions, bands = basis.shape
    points, _ = blocks(bands)
    arrays = (rows, weights, basis.contiguous(), grad.contiguous(), into, into if touched is None else touched)
    meta = {"BANDS": bands, "MARK": touched is not None, "POINTS": points, "WIDTH": power_of_two(bands)}
    launch(_scatter_sh, (cdiv(count, points), 3), grad, *arrays, count, directions, **meta)
