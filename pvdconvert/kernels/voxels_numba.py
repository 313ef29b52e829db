"""The numba twin of :mod:`pvdconvert.kernels.voxels`: CPU, float32.

Two passes: ``_locate`` finds the eight rows and weights of each point, then rows are gathered or scattered. The scatter
gives every thread a range of rows of its own: all threads read all points, each adds to its rows only, in the order of
the points. So there are no atomics, hardly a shared cache line, and sums that do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from pvdconvert.kernels.cpu import FAST, share, threads

Array = NDArray[Any]
GRAIN = 256
"""Points that are worth a thread."""


@njit(nogil=True, cache=True, fastmath=FAST)
def _locate(
    begin: int, stop: int, xg: Array, shape: Array, top: Array, bricks: Array, shift: int, whole: bool,
    rows: Array, w: Array,
) -> None:  # fmt: skip
    mask = (1 << shift) - 1
    lx, ly, lz = shape[0] - 1, shape[1] - 1, shape[2] - 1
    for p in range(begin, stop):
        x, y, z = xg[p, 0], xg[p, 1], xg[p, 2]
        # Written so that NaN falls outside.
        if not (x >= 0 and x <= lx and y >= 0 and y <= ly and z >= 0 and z <= lz):
            for c in range(8):
                rows[p, c] = -1
                w[p, c] = 0
            continue
        i, j, k = min(int(x), lx - 1), min(int(y), ly - 1), min(int(z), lz - 1)
        fx, fy, fz = x - np.float32(i), y - np.float32(j), z - np.float32(k)
        one = np.float32(1)
        complete = True
        for c in range(8):
            di, dj, dk = c >> 2 & 1, c >> 1 & 1, c & 1
            a, b, d = i + di, j + dj, k + dk
            brick = top[a >> shift, b >> shift, d >> shift]
            row = np.int32(-1)
            if brick >= 0:
                row = bricks[brick, ((((a & mask) << shift) | (b & mask)) << shift) | (d & mask)]
            rows[p, c] = row
            if row < 0:
                complete = False
                w[p, c] = 0
            else:
                wx = fx if di else one - fx
                wy = fy if dj else one - fy
                wz = fz if dk else one - fz
                w[p, c] = wx * wy * wz
        if whole and not complete:
            for c in range(8):
                rows[p, c] = -1
                w[p, c] = 0


@njit(nogil=True, cache=True, fastmath=FAST)
def _mix(rows: Array, w: Array, p: int, values: Array, width: int, out: Array) -> bool:
    """out[:width] = the interpolated row; False where nothing contributes."""
    r0, r1, r2, r3 = rows[p, 0], rows[p, 1], rows[p, 2], rows[p, 3]
    r4, r5, r6, r7 = rows[p, 4], rows[p, 5], rows[p, 6], rows[p, 7]
    if r0 >= 0 and r1 >= 0 and r2 >= 0 and r3 >= 0 and r4 >= 0 and r5 >= 0 and r6 >= 0 and r7 >= 0:
        w0, w1, w2, w3, w4, w5, w6, w7 = w[p, 0], w[p, 1], w[p, 2], w[p, 3], w[p, 4], w[p, 5], w[p, 6], w[p, 7]
        for c in range(width):
            out[c] = (
                (w0 * values[r0, c] + w1 * values[r1, c]) + (w2 * values[r2, c] + w3 * values[r3, c])
                + ((w4 * values[r4, c] + w5 * values[r5, c]) + (w6 * values[r6, c] + w7 * values[r7, c]))
            )  # fmt: skip
        return True
    some = False
    for c in range(width):
        out[c] = 0
    for q in range(8):
        r = rows[p, q]
        if r >= 0:
            some = True
            for c in range(width):
                out[c] += w[p, q] * values[r, c]
    return some


@njit(nogil=True, cache=True, fastmath=FAST)
def _gather(begin: int, stop: int, rows: Array, w: Array, values: Array, fill: float, out: Array) -> None:
    width = out.shape[1]
    for p in range(begin, stop):
        line = out[p]
        if not _mix(rows, w, p, values, width, line):
            for c in range(width):
                line[c] = fill


@njit(nogil=True, cache=True, fastmath=FAST)
def _gather_sh(begin: int, stop: int, rows: Array, w: Array, basis: Array, sh: Array, out: Array) -> None:
    _, count, bands = basis.shape
    width = sh.shape[1]
    line = np.empty(width, dtype=np.float32)
    for p in range(begin, stop):
        _mix(rows, w, p, sh, width, line)
        for k in range(count):
            for c in range(3):
                total = np.float32(0)
                for b in range(bands):
                    total += basis[p, k, b] * line[c * bands + b]
                out[p, k, c] = total


@njit(nogil=True, cache=True, fastmath=FAST)
def _scatter(begin: int, stop: int, rows: Array, w: Array, g: Array, grad: Array, touched: Array, edges: Array) -> None:
    n, width = g.shape
    mark = touched.shape[0] > 0
    for part in range(begin, stop):
        low, high = edges[part], edges[part + 1]
        for p in range(n):
            for q in range(8):
                r = rows[p, q]
                if r >= low and r < high:
                    if mark:
                        touched[r] = 1
                    for c in range(width):
                        grad[r, c] += w[p, q] * g[p, c]


@njit(nogil=True, cache=True, fastmath=FAST)
def _scatter_sh(
    begin: int, stop: int, rows: Array, w: Array, basis: Array, g: Array, grad: Array, touched: Array, edges: Array
) -> None:
    n, count, bands = basis.shape
    width = grad.shape[1]
    mark = touched.shape[0] > 0
    for part in range(begin, stop):
        low, high = edges[part], edges[part + 1]
        line = np.empty(width, dtype=np.float32)
        for p in range(n):
            mine = False
            for q in range(8):
                r = rows[p, q]
                mine |= r >= low and r < high
            if not mine:
                continue
            for c in range(3):
                for b in range(bands):
                    line[c * bands + b] = g[p, 0, c] * basis[p, 0, b]
                for k in range(1, count):
                    for b in range(bands):
                        line[c * bands + b] += g[p, k, c] * basis[p, k, b]
            for q in range(8):
                r = rows[p, q]
                if r >= low and r < high:
                    if mark:
                        touched[r] = 1
                    for c in range(width):
                        grad[r, c] += w[p, q] * line[c]


def locate(xg: Tensor, shape: Sequence[int], top: Tensor, bricks: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    """Rows int32 [N, 8] (-1 = contributes nothing) and weights [N, 8]; the twin of ``locate_torch``."""
    rows, w = np.empty((len(xg), 8), np.int32), np.empty((len(xg), 8), np.float32)
    if len(xg):
        x = xg.detach().contiguous().numpy()
        shift = (round(bricks.shape[1] ** (1 / 3))).bit_length() - 1
        sides = np.array(shape, np.int64)
        share(_locate, len(x), x, sides, top.numpy(), bricks.numpy(), shift, whole, rows, w, grain=GRAIN)
    return torch.from_numpy(rows), torch.from_numpy(w)


def gather(rows: Tensor, w: Tensor, values: Tensor, fill: float) -> Tensor:
    """[N, C]: rows mixed by weights; ``fill`` where none contributes."""
    out = np.empty((len(rows), values.shape[1]), np.float32)
    if len(rows):
        share(_gather, len(out), rows.numpy(), w.numpy(), _array(values), fill, out, grain=GRAIN)
    return torch.from_numpy(out)


def gather_sh(rows: Tensor, w: Tensor, basis: Tensor, sh: Tensor) -> Tensor:
    """[N, K, 3]: the same for the coefficients of a colour, taken in K directions."""
    out = np.empty((*basis.shape[:2], 3), np.float32)
    if out.size:
        share(_gather_sh, len(out), rows.numpy(), w.numpy(), _array(basis), _array(sh), out, grain=GRAIN)
    return torch.from_numpy(out)


def scatter(rows: Tensor, w: Tensor, g: Tensor, into: Tensor, touched: Tensor | None) -> None:
    """The transpose of :func:`gather`: adds to rows of ``into`` and marks them."""
    edges = _edges(rows.numpy(), len(into))
    given = (rows.numpy(), w.numpy(), _array(g), into.numpy(), _marks(touched), edges)
    share(_scatter, len(edges) - 1, *given)


def scatter_sh(rows: Tensor, w: Tensor, basis: Tensor, g: Tensor, into: Tensor, touched: Tensor | None) -> None:
    """The transpose of :func:`gather_sh`."""
    edges = _edges(rows.numpy(), len(into))
    given = (rows.numpy(), w.numpy(), _array(basis), _array(g), into.numpy(), _marks(touched), edges)
    share(_scatter_sh, len(edges) - 1, *given)


def _array(tensor: Tensor) -> Array:
    return tensor.detach().contiguous().numpy()


def _marks(touched: Tensor | None) -> Array:
    return np.empty(0, np.uint8) if touched is None else touched.numpy()


def _edges(rows: Array, count: int) -> Array:
    """Bounds of the row ranges that threads own: about equal work. The result of a scatter does not depend on them."""
    parts = threads()
    sample = np.sort(rows[:: max(1, len(rows) // 4096), 0])
    inner = [int(sample[len(sample) * i // parts]) for i in range(1, parts)] if len(sample) else []
    return np.array([0, *np.clip(inner, 0, count), count], np.int64)
