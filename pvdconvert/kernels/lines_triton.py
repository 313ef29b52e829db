"""CUDA twin of :mod:`pvdconvert.kernels.lines` in Triton, float32; see :mod:`pvdconvert.kernels.planes_triton`."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pvdconvert.kernels.axes_triton import cell, mix, spread
from pvdconvert.kernels.gpu import blocks, cdiv, copies, launch


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, a, b, c, out, count, na, nb, nc,
    RANK: tl.constexpr, SUMMED: tl.constexpr, POINTS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    live = n < count
    i0, i1, f = cell(x, n, live, 2, na)
    j0, j1, g = cell(x, n, live, 1, nb)
    k0, k1, h = cell(x, n, live, 0, nc)
    total = tl.zeros([POINTS], tl.float32)
    for first in range(0, RANK, RANKS):
        r = first + tl.arange(0, RANKS)
        mask = live[:, None] & (r < RANK)[None, :]
        value = mix(a, i0, i1, f, r, mask, RANK) * mix(b, j0, j1, g, r, mask, RANK) * mix(c, k0, k1, h, r, mask, RANK)
        if SUMMED:
            total += tl.sum(value, axis=1)
        else:
            tl.store(out + n[:, None] * RANK + r[None, :], value, mask=mask)
    if SUMMED:
        tl.store(out + n, total, mask=live)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x, a, b, c, grad, ga, gb, gc, count, na, nb, nc, along, across,
    RANK: tl.constexpr, SUMMED: tl.constexpr, COPIES: tl.constexpr, POINTS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    n = program * POINTS + tl.arange(0, POINTS)
    live = n < count
    i0, i1, f = cell(x, n, live, 2, na)
    j0, j1, g = cell(x, n, live, 1, nb)
    k0, k1, h = cell(x, n, live, 0, nc)
    copy = program % COPIES
    for first in range(0, RANK, RANKS):
        r = first + tl.arange(0, RANKS)
        mask = live[:, None] & (r < RANK)[None, :]
        if SUMMED:
            up = tl.load(grad + n * along, mask=live, other=0.0)[:, None]
        else:
            up = tl.load(grad + n[:, None] * along + r[None, :] * across, mask=mask, other=0.0)
        u = mix(a, i0, i1, f, r, mask, RANK)
        v = mix(b, j0, j1, g, r, mask, RANK)
        w = mix(c, k0, k1, h, r, mask, RANK)
        spread(ga + copy * na * RANK, i0, i1, f, r, up * v * w, mask, RANK)
        spread(gb + copy * nb * RANK, j0, j1, g, r, up * u * w, mask, RANK)
        spread(gc + copy * nc * RANK, k0, k1, h, r, up * u * v, mask, RANK)


def _meta(rank: int, summed: bool) -> dict[str, Any]:
    points, ranks = blocks(rank)
    return {"RANK": rank, "SUMMED": summed, "POINTS": points, "RANKS": ranks}


def forward(x01: Tensor, a: Tensor, b: Tensor, c: Tensor, summed: bool) -> Tensor:
    """See :func:`pvdconvert.kernels.lines_numba.forward`."""
    count, rank = len(x01), a.shape[1]
    out = x01.new_zeros(count) if summed else x01.new_empty(count, rank)
    if count and rank:
        arrays = [t.detach().contiguous() for t in (x01, a, b, c)]
        meta = _meta(rank, summed)
        launch(_forward, (cdiv(count, meta["POINTS"]),), x01, *arrays, out, count, len(a), len(b), len(c), **meta)
    return out


def backward(x01: Tensor, grad: Tensor, a: Tensor, b: Tensor, c: Tensor, summed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`pvdconvert.kernels.lines_numba.backward`; ``grad`` may have any strides."""
    count, rank = len(x01), a.shape[1]
    own = [line.new_zeros(copies(count), *line.shape) for line in (a, b, c)]
    if count and rank:
        arrays = [t.detach().contiguous() for t in (x01, a, b, c)]
        meta = _meta(rank, summed)
        strides = (grad[:, None] if summed else grad).stride()
        numbers = (count, len(a), len(b), len(c), *strides)
        launch(
            _backward, (cdiv(count, meta["POINTS"]),), x01, *arrays, grad, *own, *numbers, COPIES=len(own[0]), **meta
        )
    u, v, w = (g[0] if len(g) == 1 else g.sum(0) for g in own)
    return u, v, w
