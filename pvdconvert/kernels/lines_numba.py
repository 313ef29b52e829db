"""CPU twins of :mod:`pvdconvert.kernels.lines`. Imported only when they run.

Each thread takes a run of points. Going back it adds into lines of its own, which are summed in the order of the
threads: no atomics, and the same bits for the same number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from pvdconvert.kernels.cpu import FAST, cell, share, threads

Floats = NDArray[np.float32]
GRAIN = 256
"""Points that are worth a thread."""


@njit(cache=True, nogil=True, fastmath=FAST)
def _forward(begin: int, stop: int, x: Any, a: Any, b: Any, c: Any, out: Any, summed: bool) -> None:
    """``a`` [n, R] along axis 2, ``b`` along 1, ``c`` along 0; ``out`` [N, 1] if ``summed``, else [N, R]."""
    rank = a.shape[1]
    for n in range(begin, stop):
        i, f = cell(x[n, 2], a.shape[0])
        j, g = cell(x[n, 1], b.shape[0])
        k, h = cell(x[n, 0], c.shape[0])
        i1, j1, k1 = min(i + 1, a.shape[0] - 1), min(j + 1, b.shape[0] - 1), min(k + 1, c.shape[0] - 1)
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


@njit(cache=True, nogil=True, fastmath=FAST)
def _backward(
    begin: int, stop: int, x: Any, a: Any, b: Any, c: Any, grad: Any, summed: bool, ga: Any, gb: Any, gc: Any
) -> None:
    """Add the gradients of each thread's points to ``ga``, ``gb``, ``gc`` [threads, n, R]."""
    rank = a.shape[1]
    count = x.shape[0]
    threads = ga.shape[0]
    chunk = (count + threads - 1) // threads
    one = np.float32(1.0)
    for t in range(begin, stop):
        du, dv, dw = np.empty(rank, np.float32), np.empty(rank, np.float32), np.empty(rank, np.float32)
        ta, tb, tc = ga[t], gb[t], gc[t]
        for n in range(t * chunk, min(count, (t + 1) * chunk)):
            i, f = cell(x[n, 2], a.shape[0])
            j, g = cell(x[n, 1], b.shape[0])
            k, h = cell(x[n, 0], c.shape[0])
            i1, j1, k1 = min(i + 1, a.shape[0] - 1), min(j + 1, b.shape[0] - 1), min(k + 1, c.shape[0] - 1)
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


def _array(tensor: Tensor) -> Floats:
    return tensor.detach().contiguous().numpy()


def forward(x01: Tensor, a: Tensor, b: Tensor, c: Tensor, summed: bool) -> Tensor:
    """:func:`pvdconvert.kernels.lines.cp_sum` if ``summed``, else ``cp_features``; float32 on the CPU."""
    out = torch.empty(len(x01), 1 if summed else a.shape[1], dtype=torch.float32)
    if len(x01):
        given = [_array(t) for t in (x01, a, b, c)]
        share(_forward, len(x01), *given, out.numpy(), summed, grain=GRAIN)
    return out[:, 0] if summed else out


def backward(x01: Tensor, grad: Tensor, a: Tensor, b: Tensor, c: Tensor, summed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the three lines; ``grad`` is [N] if ``summed``, else [N, R]."""
    parts = threads()
    ga, gb, gc = (np.zeros((parts, *line.shape), np.float32) for line in (a, b, c))
    if len(x01):
        g = _array(grad).reshape(len(x01), -1)
        given = [_array(t) for t in (x01, a, b, c)]
        share(_backward, parts, *given, g, summed, ga, gb, gc)
    u, v, w = (torch.from_numpy(g[0] if parts == 1 else g.sum(0)) for g in (ga, gb, gc))
    return u, v, w
