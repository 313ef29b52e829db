"""CPU twin of the hash encoding: numba, all cores, float32.

Forward: every thread owns a run of points and walks it level by level, so that one level's rows stay in its cache.
Backward: every thread owns whole levels and adds in the order of the points: no atomics, and the same bits for any
number of threads.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from pvdconvert.kernels.hashgrid_spec import PRIMES, HashGridSpec

_P1, _P2 = PRIMES[1], PRIMES[2]
_UINT32 = 0xFFFFFFFF
_ONE, _HALF, _TWO, _THREE = np.float32(1), np.float32(0.5), np.float32(2), np.float32(3)
_DENSE, _POWER, _HASHED = 0, 1, 2
# Neither nnan nor ninf: positions may be NaN, and must then be found outside.
_FAST = {"contract", "nsz", "arcp"}


@njit(cache=True, inline="always")
def _row(ix, iy, iz, stride, entries, kind):  # type: ignore[no-untyped-def]
    # int64 throughout: positions are bounded by the domain, so that no product leaves 63 bits.
    if kind == _POWER:
        return (ix ^ (iy * _P1) ^ (iz * _P2)) & (entries - 1)
    if kind == _DENSE:
        row = ix + (iy + iz * stride) * stride
        if row < 0 or row >= entries:
            row = (row & _UINT32) % entries
        return row
    return ((ix ^ (iy * _P1) ^ (iz * _P2)) & _UINT32) % entries


@njit(cache=True, fastmath=_FAST, error_model="numpy")
def _forward_level(x, table, out, column, begin, end, scale, stride, entries, kind, low, high, smooth):  # type: ignore[no-untyped-def]
    width = table.shape[1]
    for n in range(begin, end):
        a, b, c = x[n, 0], x[n, 1], x[n, 2]
        if not (a >= low and a <= high and b >= low and b <= high and c >= low and c <= high):
            for f in range(width):
                out[column + f, n] = 0
            continue
        a, b, c = a * scale + _HALF, b * scale + _HALF, c * scale + _HALF
        fa, fb, fc = np.floor(a), np.floor(b), np.floor(c)
        ix, iy, iz = np.int64(fa), np.int64(fb), np.int64(fc)
        u, v, w = a - fa, b - fb, c - fc
        if smooth:
            u, v, w = u * u * (_THREE - _TWO * u), v * v * (_THREE - _TWO * v), w * w * (_THREE - _TWO * w)
        if width == 2:
            s0 = np.float32(0)
            s1 = np.float32(0)
            for k in range(8):
                row = _row(ix + (k & 1), iy + (k >> 1 & 1), iz + (k >> 2), stride, entries, kind)
                q = (u if k & 1 else _ONE - u) * (v if k & 2 else _ONE - v) * (w if k & 4 else _ONE - w)
                s0 += q * table[row, 0]
                s1 += q * table[row, 1]
            out[column, n] = s0
            out[column + 1, n] = s1
        else:
            for f in range(width):
                out[column + f, n] = 0
            for k in range(8):
                row = _row(ix + (k & 1), iy + (k >> 1 & 1), iz + (k >> 2), stride, entries, kind)
                q = (u if k & 1 else _ONE - u) * (v if k & 2 else _ONE - v) * (w if k & 4 else _ONE - w)
                for f in range(width):
                    out[column + f, n] += q * table[row, f]


@njit(cache=True, parallel=True)
def _forward(x, table, out, scales, ints, low, high, smooth, threads):  # type: ignore[no-untyped-def]
    count, width = x.shape[0], table.shape[1]
    chunk = (count + threads - 1) // threads
    for t in prange(threads):
        begin = min(count, t * chunk)
        end = min(count, begin + chunk)
        for level in range(scales.shape[0]):
            stride, entries, first, kind = ints[level, 0], ints[level, 1], ints[level, 2], ints[level, 3]
            rows = table[first : first + entries]
            _forward_level(
                x, rows, out, level * width, begin, end, scales[level], stride, entries, kind, low, high, smooth
            )


@njit(cache=True, fastmath=_FAST, error_model="numpy")
def _backward_level(x, grad, table, column, scale, stride, entries, kind, low, high, smooth):  # type: ignore[no-untyped-def]
    width = table.shape[1]
    for n in range(x.shape[0]):
        a, b, c = x[n, 0], x[n, 1], x[n, 2]
        if not (a >= low and a <= high and b >= low and b <= high and c >= low and c <= high):
            continue
        a, b, c = a * scale + _HALF, b * scale + _HALF, c * scale + _HALF
        fa, fb, fc = np.floor(a), np.floor(b), np.floor(c)
        ix, iy, iz = np.int64(fa), np.int64(fb), np.int64(fc)
        u, v, w = a - fa, b - fb, c - fc
        if smooth:
            u, v, w = u * u * (_THREE - _TWO * u), v * v * (_THREE - _TWO * v), w * w * (_THREE - _TWO * w)
        for k in range(8):
            row = _row(ix + (k & 1), iy + (k >> 1 & 1), iz + (k >> 2), stride, entries, kind)
            q = (u if k & 1 else _ONE - u) * (v if k & 2 else _ONE - v) * (w if k & 4 else _ONE - w)
            if width == 2:
                table[row, 0] += q * grad[n, column]
                table[row, 1] += q * grad[n, column + 1]
            else:
                for f in range(width):
                    table[row, f] += q * grad[n, column + f]


@njit(cache=True, parallel=True)
def _backward(x, grad, table, scales, ints, low, high, smooth, threads):  # type: ignore[no-untyped-def]
    width, levels = table.shape[1], scales.shape[0]
    for t in prange(threads):
        # Interleaved: coarse levels are cheap, and every thread gets its share of them.
        for level in range(t, levels, threads):
            stride, entries, first, kind = ints[level, 0], ints[level, 1], ints[level, 2], ints[level, 3]
            rows = table[first : first + entries]
            _backward_level(x, grad, rows, level * width, scales[level], stride, entries, kind, low, high, smooth)


@functools.lru_cache(maxsize=16)
def _arrays(spec: HashGridSpec) -> tuple[Any, Any, np.float32, np.float32, bool]:
    scales = np.array([level.scale for level in spec.levels], dtype=np.float32)
    rows = []
    for v in spec.levels:
        kind = _DENSE if not v.hashed else _POWER if v.entries & (v.entries - 1) == 0 else _HASHED
        rows.append((v.stride, v.entries, v.offset, kind))
    ints = np.array(rows, dtype=np.int64)
    low, high = spec.domain
    return scales, ints, np.float32(low), np.float32(high), spec.interpolation == "smoothstep"


def _threads() -> int:
    limit: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    threads = max(1, min(torch.get_num_threads(), limit))
    numba.set_num_threads(threads)
    return threads


class _HashEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x01: Tensor, table: Tensor, spec: HashGridSpec) -> Tensor:
        x, rows = x01.detach().contiguous(), table.detach().contiguous()
        # Feature-major, so that each level writes one run of memory; the transpose is free for what follows (a GEMM).
        out = torch.empty(spec.width, x.shape[0])
        if x.shape[0]:
            _forward(x.numpy(), rows.numpy(), out.numpy(), *_arrays(spec), _threads())
        ctx.save_for_backward(x)
        ctx.spec = spec
        return out.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (x,) = ctx.saved_tensors
        spec: HashGridSpec = ctx.spec
        table = torch.zeros(spec.entries, spec.features)
        if x.shape[0]:
            _backward(x.numpy(), grads[0].contiguous().numpy(), table.numpy(), *_arrays(spec), _threads())
        return None, table, None


def hash_encode_numba(x01: Tensor, table: Tensor, spec: HashGridSpec) -> Tensor:
    """:func:`pvdconvert.kernels.hashgrid.hash_encode` for float32 on the CPU; differentiable in ``table`` only."""
    result: Tensor = _HashEncode.apply(x01, table, spec)  # type: ignore[no-untyped-call]
    return result
