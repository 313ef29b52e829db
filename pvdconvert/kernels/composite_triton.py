"""CUDA twin of :mod:`pvdconvert.kernels.composite` in Triton, float32: a warp a ray, samples in runs of a block.

Optical thickness is summed in double precision, as in the truth; exponentials are single.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pvdconvert.kernels.gpu import blocks, cdiv, launch

_BLOCK = 64


@triton.jit
def _alpha(x):  # type: ignore[no-untyped-def]
    """1 - exp(-x) for x >= 0: a series where single precision would cancel (error 5e-8)."""
    a = 1 / 24 - x * (1 / 120 - x * (1 / 720 - x * (1 / 5040)))
    a = x * (1.0 - x * (0.5 - x * (1 / 6 - x * a)))
    return tl.where(x < 0.25, a, 1.0 - tl.exp(-x))


@triton.jit
def _forward(tau, offsets, w, end, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    r = tl.program_id(0).to(tl.int64)
    begin, stop = tl.load(offsets + r), tl.load(offsets + r + 1)
    before = tl.full((), 0.0, tl.float64)
    for first in range(begin, stop, BLOCK):
        i = first + tl.arange(0, BLOCK)
        live = i < stop
        x = tl.load(tau + i, mask=live, other=0.0)
        x = tl.where(x > 100.0, 100.0, x)  # OPAQUE; NaN stays
        thick = x.to(tl.float64)
        past = before + (tl.cumsum(thick, axis=0) - thick)
        tl.store(w + i, tl.exp(-past.to(tl.float32)) * _alpha(x), mask=live)
        before += tl.sum(thick, axis=0)
    tl.store(end + r, tl.exp(-before.to(tl.float32)))


@triton.jit
def _backward(w, end, offsets, grad_w, grad_end, grad, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    r = tl.program_id(0).to(tl.int64)
    begin, stop = tl.load(offsets + r), tl.load(offsets + r + 1)
    # What is left behind a sample is T_end and all weights behind it: summed back to front, nothing cancels.
    left = tl.load(end + r).to(tl.float64)
    behind = left * tl.load(grad_end + r).to(tl.float64)
    for last in range(0, stop - begin, BLOCK):
        i = stop - 1 - last - tl.arange(0, BLOCK)
        live = i >= begin
        v = tl.load(w + i, mask=live, other=0.0).to(tl.float64)
        g = tl.load(grad_w + i, mask=live, other=0.0).to(tl.float64)
        after = left + (tl.cumsum(v, axis=0) - v)
        u = v * g
        later = behind + (tl.cumsum(u, axis=0) - u)
        tl.store(grad + i, (after * g - later).to(tl.float32), mask=live)
        left += tl.sum(v, axis=0)
        behind += tl.sum(u, axis=0)


@triton.jit
def _sum(  # type: ignore[no-untyped-def]
    values, offsets, out, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    begin, stop = tl.load(offsets + r), tl.load(offsets + r + 1)
    total = tl.zeros([CHANNELS], tl.float32)
    for first in range(begin, stop, ROWS):
        i = first + tl.arange(0, ROWS)
        mask = (i < stop)[:, None] & (c < C)[None, :]
        total += tl.sum(tl.load(values + i[:, None] * C + c[None, :], mask=mask, other=0.0), axis=0)
    tl.store(out + r * C + c, total, mask=c < C)


@triton.jit
def _spread(  # type: ignore[no-untyped-def]
    grad, offsets, out, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    begin, stop = tl.load(offsets + r), tl.load(offsets + r + 1)
    g = tl.load(grad + r * C + c, mask=c < C, other=0.0)
    for first in range(begin, stop, ROWS):
        i = first + tl.arange(0, ROWS)
        mask = (i < stop)[:, None] & (c < C)[None, :]
        tl.store(out + i[:, None] * C + c[None, :], tl.zeros([ROWS, CHANNELS], tl.float32) + g[None, :], mask=mask)


def forward(tau: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`pvdconvert.kernels.composite.render_weights`."""
    rays = len(offsets) - 1
    w, end = tau.new_empty(tau.shape), tau.new_empty(rays)
    if rays:
        arrays = (tau.detach().contiguous(), offsets.contiguous(), w, end)
        launch(_forward, (rays,), tau, *arrays, BLOCK=_BLOCK, num_warps=1)
    return w, end


def backward(w: Tensor, end: Tensor, offsets: Tensor, grad_w: Tensor, grad_end: Tensor) -> Tensor:
    """The gradient of ``tau``."""
    rays, grad = len(end), w.new_empty(w.shape)
    if rays:
        arrays = [t.detach().contiguous() for t in (w, end, offsets, grad_w, grad_end)]
        launch(_backward, (rays,), w, *arrays, grad, BLOCK=_BLOCK, num_warps=1)
    return grad


def ray_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """See :func:`pvdconvert.kernels.composite.ray_sum`: values [S, C] -> [R, C]."""
    rays, width = len(offsets) - 1, values.shape[1]
    out = values.new_empty(rays, width)
    if out.numel():
        _, channels = blocks(width)
        meta = {"C": width, "ROWS": max(1, 256 // channels), "CHANNELS": channels, "num_warps": 1}
        arrays = (values.detach().contiguous(), offsets.contiguous(), out)
        launch(_sum, (rays, cdiv(width, channels)), values, *arrays, **meta)
    return out


def ray_sum_backward(grad: Tensor, offsets: Tensor, samples: int) -> Tensor:
    """The gradient [samples, C] of the values."""
    rays, width = grad.shape
    out = grad.new_empty(samples, width)
    if out.numel():
        _, channels = blocks(width)
        meta = {"C": width, "ROWS": max(1, 256 // channels), "CHANNELS": channels, "num_warps": 1}
        launch(_spread, (rays, cdiv(width, channels)), grad, grad.contiguous(), offsets.contiguous(), out, **meta)
    return out
