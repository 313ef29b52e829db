"""CPU twins of :mod:`pvdconvert.kernels.lines`. Imported only when they run.

Each thread takes a run of points. Going back it adds into lines of its own, which are summed in the order of the
threads: no atomics, and the same bits for the same number of threads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

# Sums may be reordered for vector units; NaN and infinities keep their meaning (they guard the indices).
FAST = {"contract", "reassoc", "nsz", "arcp"}
Floats = NDArray[np.float32]


def _threads() -> int:
    count = max(1, min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]
    numba.set_num_threads(count)
    return count


@njit(cache=True, fastmath=FAST, inline="always")
def _cell(u: Any, n: Any) -> Any:
    """Lower vertex, upper vertex and fraction of ``u`` in [0, 1] on ``n`` vertices; outside (or NaN) is clamped."""
    pos = np.float32(0.0)
    if u > 0.0:
        pos = min(u, np.float32(1.0)) * np.float32(n - 1)
    i = max(min(np.int64(pos), n - 2), 0)
    return i, min(i + 1, n - 1), pos - np.float32(i)


@njit(cache=True, fastmath=FAST, parallel=True)
def _forward(x: Any, a: Any, b: Any, c: Any, out: Any, summed: bool, threads: int) -> None:
    """``a`` [n, R] along axis 2, ``b`` along 1, ``c`` along 0; ``out`` [N, 1] if ``summed``, else [N, R]."""
    rank = a.shape[1]
    count = x.shape[0]
    chunk = (count + threads - 1) // threads
    for t in prange(threads):
        for n in range(t * chunk, min(count, (t + 1) * chunk)):
            i, i1, f = _cell(x[n, 2], a.shape[0])
            j, j1, g = _cell(x[n, 1], b.shape[0])
            k, k1, h = _cell(x[n, 0], c.shape[0])
            a0, a1, b0, b1, c0, c1 = a[i], a[i1], b[j], b[j1], c[k], c[k1]
            if summed:
                total = np.float32(0.0)
                for r in range(rank):
                    u, v, w = a0[r] + f * (a1[r] - a0[r]), b0[r] + g * (b1[r] - b0[r]), c0[r] + h * (c1[r] - c0[r])
                    total += u * v * w
                out[n, 0] = total
            else:
                row = out[n]
                for r in range(rank):
                    u, v, w = a0[r] + f * (a1[r] - a0[r]), b0[r] + g * (b1[r] - b0[r]), c0[r] + h * (c1[r] - c0[r])
                    row[r] = u * v * w


@njit(cache=True, fastmath=FAST, parallel=True)
def _backward(x: Any, a: Any, b: Any, c: Any, grad: Any, summed: bool, ga: Any, gb: Any, gc: Any, threads: int) -> None:
    """Add the gradients of each thread's points to ``ga``, ``gb``, ``gc`` [threads, n, R]."""
    rank = a.shape[1]
    count = x.shape[0]
    chunk = (count + threads - 1) // threads
    one = np.float32(1.0)
    for t in prange(threads):
        du, dv, dw = np.empty(rank, np.float32), np.empty(rank, np.float32), np.empty(rank, np.float32)
        ta, tb, tc = ga[t], gb[t], gc[t]
        for n in range(t * chunk, min(count, (t + 1) * chunk)):
            i, i1, f = _cell(x[n, 2], a.shape[0])
            j, j1, g = _cell(x[n, 1], b.shape[0])
            k, k1, h = _cell(x[n, 0], c.shape[0])
            a0, a1, b0, b1, c0, c1 = a[i], a[i1], b[j], b[j1], c[k], c[k1]
            if summed:
                s = grad[n, 0]
                for r in range(rank):
                    u, v, w = a0[r] + f * (a1[r] - a0[r]), b0[r] + g * (b1[r] - b0[r]), c0[r] + h * (c1[r] - c0[r])
                    du[r] = s * v * w
                    dv[r] = s * u * w
                    dw[r] = s * u * v
            else:
                row = grad[n]
                for r in range(rank):
                    u, v, w = a0[r] + f * (a1[r] - a0[r]), b0[r] + g * (b1[r] - b0[r]), c0[r] + h * (c1[r] - c0[r])
                    du[r] = row[r] * v * w
                    dv[r] = row[r] * u * w
                    dw[r] = row[r] * u * v
            # One row at a time: the two rows of a line of one vertex are the same.
            p, q = ta[i], ta[i1]
            for r in range(rank):
                p[r] += (one - f) * du[r]
            for r in range(rank):
                q[r] += f * du[r]
            p, q = tb[j], tb[j1]
            for r in range(rank):
                p[r] += (one - g) * dv[r]
            for r in range(rank):
                q[r] += g * dv[r]
            p, q = tc[k], tc[k1]
            for r in range(rank):
                p[r] += (one - h) * dw[r]
            for r in range(rank):
                q[r] += h * dw[r]


def _arrays(tensors: tuple[Tensor, ...]) -> list[Floats]:
    return [t.detach().contiguous().numpy() for t in tensors]


class _Lines(torch.autograd.Function):
    """``summed`` or listed products of three lines."""

    @staticmethod
    def forward(ctx: Any, x01: Tensor, summed: bool, *lines: Tensor) -> Tensor:
        x, (a, b, c) = x01.detach().contiguous().numpy(), _arrays(lines)
        ctx.save_for_backward(x01, *lines)
        ctx.summed = summed
        out = torch.empty(len(x), 1 if summed else a.shape[1], dtype=torch.float32)
        if len(x):
            _forward(x, a, b, c, out.numpy(), summed, _threads())
        return out[:, 0] if summed else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x01, *lines = ctx.saved_tensors
        x, (a, b, c) = x01.detach().contiguous().numpy(), _arrays(tuple(lines))
        threads = _threads()
        ga, gb, gc = (np.zeros((threads, *line.shape), np.float32) for line in (a, b, c))
        if len(x):
            g = grad.contiguous().numpy().reshape(len(x), -1)
            _backward(x, a, b, c, g, ctx.summed, ga, gb, gc, threads)
        return (None, None, *(torch.from_numpy(g[0] if threads == 1 else g.sum(0)) for g in (ga, gb, gc)))


def cp_sum(x01: Tensor, lines: list[Tensor]) -> Tensor:
    """See :func:`pvdconvert.kernels.lines.cp_sum`."""
    result: Tensor = _Lines.apply(x01, True, *lines)  # type: ignore[no-untyped-call]
    return result


def cp_features(x01: Tensor, lines: list[Tensor]) -> Tensor:
    """See :func:`pvdconvert.kernels.lines.cp_features`."""
    result: Tensor = _Lines.apply(x01, False, *lines)  # type: ignore[no-untyped-call]
    return result
