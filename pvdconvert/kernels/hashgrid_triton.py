"""CUDA twin of the hash encoding, in Triton: float32, one kernel for all levels.

A program owns a block of points on one level. Programs of a level are neighbours in the launch, so its rows stay in
the L2 cache. Hashes are uint32, addresses are 64 bits wide. Going back, rows are added by float32 atomics: the order,
and so the last bits, may differ from run to run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdconvert.kernels.gpu import cdiv, launch, power_of_two
from pvdconvert.kernels.hashgrid_spec import DENSE, INTERPOLATIONS, POWER, PRIMES

_BLOCK = 256
_P1, _P2 = tl.constexpr(PRIMES[1]), tl.constexpr(PRIMES[2])
_DENSE, _POWER = tl.constexpr(DENSE), tl.constexpr(POWER)
_SMOOTHSTEP = tl.constexpr(INTERPOLATIONS.index("smoothstep"))
_NEAREST = tl.constexpr(INTERPOLATIONS.index("nearest"))


@triton.jit
def _axis(a, scale, shift, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Lower corner (uint32) and fraction."""
    pos = a * scale + shift
    low = tl.floor(pos)
    f = pos - low
    if MODE == _SMOOTHSTEP:
        f = f * f * (3.0 - 2.0 * f)
    if MODE == _NEAREST:
        f = f * 0.0
    return low.to(tl.int32).to(tl.uint32, bitcast=True), f


@triton.jit
def _points(x, n, live, low, high, scale, shift, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Lower corners and fractions of points ``n``, and 1 inside of the domain, 0 outside (and for NaN)."""
    a = tl.load(x + n * 3, mask=live, other=0.0)
    b = tl.load(x + n * 3 + 1, mask=live, other=0.0)
    c = tl.load(x + n * 3 + 2, mask=live, other=0.0)
    ok = (a >= low) & (a <= high) & (b >= low) & (b <= high) & (c >= low) & (c <= high)
    i, u = _axis(tl.where(ok, a, 0.0), scale, shift, MODE)
    j, v = _axis(tl.where(ok, b, 0.0), scale, shift, MODE)
    k, w = _axis(tl.where(ok, c, 0.0), scale, shift, MODE)
    return i, j, k, u, v, w, tl.where(ok, 1.0, 0.0)


@triton.jit
def _row(x, y, z, stride, entries, kind):  # type: ignore[no-untyped-def]
    """:meth:`Level.index`: ``kind`` is the same for all points of a level."""
    if kind >= _POWER:
        i = x ^ (y * _P1) ^ (z * _P2)
    else:
        i = x + y * stride + z * (stride * stride)
    if kind == _POWER:
        i = i & (entries - 1)
    elif kind != _DENSE:
        i = i % entries
    return i


@triton.jit
def address(row, width, column):  # type: ignore[no-untyped-def]
    """Element ``column`` of row ``row``: 64 bits, as rows x width may pass 2^31."""
    return row.to(tl.int64)[:, None] * width + column[None, :]


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, table, out, scales, ints, count, low, high, shift,
    F: tl.constexpr, FP: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    level = tl.program_id(1)
    live = n < count
    stride, entries = tl.load(ints + level * 4).to(tl.uint32), tl.load(ints + level * 4 + 1).to(tl.uint32)
    first, kind = tl.load(ints + level * 4 + 2), tl.load(ints + level * 4 + 3).to(tl.int32)
    i, j, k, u, v, w, inside = _points(x, n, live, low, high, tl.load(scales + level), shift, MODE)
    f = tl.arange(0, FP)
    mask = live[:, None] & (f < F)[None, :]
    total = tl.zeros([BLOCK, FP], tl.float32)
    for c in tl.static_range(8):
        row = _row(i + (c & 1), j + (c >> 1 & 1), k + (c >> 2 & 1), stride, entries, kind)
        wx = u if c & 1 else 1.0 - u
        wy = v if c >> 1 & 1 else 1.0 - v
        wz = w if c >> 2 & 1 else 1.0 - w
        value = tl.load(table + address(first + row.to(tl.int64), F, f), mask=mask, other=0.0)
        total += (wx * inside * wy * wz)[:, None] * value
    column = level.to(tl.int64) * F + f
    tl.store(out + column[None, :] * count + n[:, None], total, mask=mask)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x, grad, table, scales, ints, count, along, across, low, high, shift,
    F: tl.constexpr, FP: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    level = tl.program_id(1)
    live = n < count
    stride, entries = tl.load(ints + level * 4).to(tl.uint32), tl.load(ints + level * 4 + 1).to(tl.uint32)
    first, kind = tl.load(ints + level * 4 + 2), tl.load(ints + level * 4 + 3).to(tl.int32)
    i, j, k, u, v, w, inside = _points(x, n, live, low, high, tl.load(scales + level), shift, MODE)
    f = tl.arange(0, FP)
    column = level.to(tl.int64) * F + f
    mask = live[:, None] & (f < F)[None, :]
    g = tl.load(grad + n[:, None] * along + column[None, :] * across, mask=mask, other=0.0)
    mask = mask & (inside > 0.0)[:, None]
    for c in tl.static_range(8):
        row = _row(i + (c & 1), j + (c >> 1 & 1), k + (c >> 2 & 1), stride, entries, kind)
        wx = u if c & 1 else 1.0 - u
        wy = v if c >> 1 & 1 else 1.0 - v
        wz = w if c >> 2 & 1 else 1.0 - w
        at = table + address(first + row.to(tl.int64), F, f)
        tl.atomic_add(at, (wx * wy * wz)[:, None] * g, mask=mask, sem="relaxed")


@functools.lru_cache(maxsize=64)
def _on_device(scales: tuple[float, ...], ints: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The levels on the device: copied once, so that a step waits for nothing."""
    return torch.tensor(scales, dtype=torch.float32, device=device), torch.tensor(ints, device=device)


def forward(
    x01: Tensor, table: Tensor, scales: Sequence[float], ints: Sequence[int], low: float, high: float, mode: int,
    shift: float,
) -> Tensor:  # fmt: skip
    """[N, L*F], a transposed view; see :func:`pvdconvert.kernels.hashgrid.hash_encode`."""
    count, width = len(x01), table.shape[1]
    out = table.new_empty(len(scales) * width, count)
    if count:
        levels = _on_device(tuple(scales), tuple(ints), x01.device)
        meta: dict[str, Any] = {"F": width, "FP": power_of_two(width), "MODE": mode, "BLOCK": _BLOCK}
        arrays = (x01.detach().contiguous(), table.detach().contiguous(), out, *levels)
        launch(_forward, (cdiv(count, _BLOCK), len(scales)), x01, *arrays, count, low, high, shift, **meta)
    return out.t()


def backward(
    x01: Tensor, grad: Tensor, rows: int, scales: Sequence[float], ints: Sequence[int], low: float, high: float,
    mode: int, shift: float,
) -> Tensor:  # fmt: skip
    """The gradient [rows, F] of the table; ``grad`` [N, L*F] may have any strides."""
    count, width = len(x01), grad.shape[1] // len(scales)
    out = grad.new_zeros(rows, width)
    if count:
        levels = _on_device(tuple(scales), tuple(ints), x01.device)
        meta: dict[str, Any] = {"F": width, "FP": power_of_two(width), "MODE": mode, "BLOCK": _BLOCK}
        arrays = (x01.detach().contiguous(), grad, out, *levels)
        numbers = (count, *grad.stride(), low, high, shift)
        launch(_backward, (cdiv(count, _BLOCK), len(scales)), x01, *arrays, *numbers, **meta)
    return out
