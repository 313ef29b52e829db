"""CUDA twin of :mod:`pvdconvert.kernels.planes` in Triton, float32: one launch a mode.

A program owns a block of points and walks the ranks; rows are channel-last, so neighbouring threads read neighbouring
channels. Going back, rows are added by float32 atomics. A line has few rows for many points: programs add to one of
several copies of it, which are summed in the end.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pvdconvert.kernels.axes_triton import cell, mix, spread
from pvdconvert.kernels.gpu import blocks, cdiv, copies, launch

MODES = ((0, 1, 2), (0, 2, 1), (1, 2, 0))


@triton.jit
def _mix_plane(rows, j0, j1, width, i0, i1, fu, fv, r, mask, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    top = mix(rows, j0 * width + i0, j0 * width + i1, fu, r, mask, RANK)
    bottom = mix(rows, j1 * width + i0, j1 * width + i1, fu, r, mask, RANK)
    return top + fv[:, None] * (bottom - top)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, plane, line, out, count, width, height, length, stride, offset,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, RANK: tl.constexpr, SUMMED: tl.constexpr, ADD: tl.constexpr,
    POINTS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    live = n < count
    i0, i1, fu = cell(x, n, live, A, width)
    j0, j1, fv = cell(x, n, live, B, height)
    k0, k1, fw = cell(x, n, live, C, length)
    total = tl.zeros([POINTS], tl.float32)
    for first in range(0, RANK, RANKS):
        r = first + tl.arange(0, RANKS)
        mask = live[:, None] & (r < RANK)[None, :]
        p = _mix_plane(plane, j0, j1, width, i0, i1, fu, fv, r, mask, RANK)
        value = p * mix(line, k0, k1, fw, r, mask, RANK)
        if SUMMED:
            total += tl.sum(value, axis=1)
        else:
            tl.store(out + n[:, None] * stride + offset + r[None, :], value, mask=mask)
    if SUMMED:
        if ADD:
            total += tl.load(out + n, mask=live, other=0.0)
        tl.store(out + n, total, mask=live)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x, plane, line, grad, grad_plane, grad_line, count, width, height, length, along, across, offset,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, RANK: tl.constexpr, SUMMED: tl.constexpr,
    COPIES: tl.constexpr, POINTS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    n = program * POINTS + tl.arange(0, POINTS)
    live = n < count
    i0, i1, fu = cell(x, n, live, A, width)
    j0, j1, fv = cell(x, n, live, B, height)
    k0, k1, fw = cell(x, n, live, C, length)
    own = grad_line + (program % COPIES) * length * RANK
    for first in range(0, RANK, RANKS):
        r = first + tl.arange(0, RANKS)
        mask = live[:, None] & (r < RANK)[None, :]
        if SUMMED:
            g = tl.load(grad + n * along, mask=live, other=0.0)[:, None]
        else:
            g = tl.load(grad + n[:, None] * along + (offset + r)[None, :] * across, mask=mask, other=0.0)
        up = g * mix(line, k0, k1, fw, r, mask, RANK)
        spread(grad_plane, j0 * width + i0, j0 * width + i1, fu, r, up * (1.0 - fv)[:, None], mask, RANK)
        spread(grad_plane, j1 * width + i0, j1 * width + i1, fu, r, up * fv[:, None], mask, RANK)
        p = _mix_plane(plane, j0, j1, width, i0, i1, fu, fv, r, mask, RANK)
        spread(own, k0, k1, fw, r, g * p, mask, RANK)


def _meta(mode: int, rank: int, summed: bool) -> dict[str, Any]:
    points, ranks = blocks(rank)
    axes = dict(zip("ABC", MODES[mode]))
    return {**axes, "RANK": rank, "SUMMED": summed, "POINTS": points, "RANKS": ranks}


def forward(x01: Tensor, planes: list[Tensor], lines: list[Tensor], summed: bool) -> Tensor:
    """See :func:`pvdconvert.kernels.planes_numba.forward`."""
    count, ranks = len(x01), [p.shape[2] for p in planes]
    out = x01.new_zeros(count) if summed else x01.new_empty(count, sum(ranks))
    x = x01.detach().contiguous()
    for mode, (plane, line) in enumerate(zip(planes, lines)):
        if not count or not ranks[mode]:
            continue
        meta = _meta(mode, ranks[mode], summed)
        height, width = plane.shape[:2]
        numbers = (count, width, height, len(line), sum(ranks), sum(ranks[:mode]))
        arrays = (x, plane.detach().contiguous(), line.detach().contiguous(), out)
        launch(_forward, (cdiv(count, meta["POINTS"]),), x, *arrays, *numbers, ADD=mode > 0, **meta)
    return out


def backward(x01: Tensor, grad: Tensor, planes: list[Tensor], lines: list[Tensor], summed: bool) -> list[Tensor]:
    """See :func:`pvdconvert.kernels.planes_numba.backward`; ``grad`` may have any strides."""
    count, ranks = len(x01), [p.shape[2] for p in planes]
    x, wide = x01.detach().contiguous(), grad[:, None] if summed else grad
    grads = [p.new_zeros(p.shape) for p in planes]
    for mode, (plane, line) in enumerate(zip(planes, lines)):
        meta = _meta(mode, ranks[mode], summed)
        own = line.new_zeros(copies(count), *line.shape)
        grads.append(own[0])
        if not count or not ranks[mode]:
            continue
        height, width = plane.shape[:2]
        numbers = (count, width, height, len(line), *wide.stride(), sum(ranks[:mode]))
        arrays = (x, plane.detach().contiguous(), line.detach().contiguous(), grad, grads[mode], own)
        launch(_backward, (cdiv(count, meta["POINTS"]),), x, *arrays, *numbers, COPIES=len(own), **meta)
        grads[-1] = own[0] if len(own) == 1 else own.sum(0)
    return grads
