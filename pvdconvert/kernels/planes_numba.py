"""CPU twins of :mod:`pvdconvert.kernels.planes`. Imported only when they run.

Mode i is the product of a plane (axes a, b) and a line (axis c). The forward pass gives each thread a run of points.
The backward pass sorts points by plane cell, gives each thread a slab of plane rows with an equal share of the points,
and keeps the row that two slabs share in a private halo: no atomics, one fixed order of summation, and neighbouring
points reuse rows that are still in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from pvdconvert.kernels.cpu import FAST, cell, share, threads

MODES = ((0, 1, 2), (0, 2, 1), (1, 2, 0))
Floats = NDArray[np.float32]
GRAIN = 256
"""Points that are worth a thread."""


@njit(cache=True, nogil=True, fastmath=FAST)
def _forward_sum(begin: int, stop: int, x: Any, axes: Any, plane: Any, line: Any, out: Any, add: bool) -> None:
    height, width, rank = plane.shape
    length = line.shape[0]
    rows = plane.reshape(height * width, rank)
    for n in range(begin, stop):
        i, fu = cell(x[n, axes[0]], width)
        j, fv = cell(x[n, axes[1]], height)
        k, fw = cell(x[n, axes[2]], length)
        right, down = np.int64(width > 1), np.int64(height > 1) * width
        p = j * width + i
        p00, p01, p10, p11 = rows[p], rows[p + right], rows[p + down], rows[p + down + right]
        l0, l1 = line[k], line[min(k + 1, length - 1)]
        one = np.float32(1.0)
        w00, w01, w10, w11 = (one - fu) * (one - fv), fu * (one - fv), (one - fu) * fv, fu * fv
        total = np.float32(0.0)
        for r in range(rank):
            value = w00 * p00[r] + w01 * p01[r] + w10 * p10[r] + w11 * p11[r]
            total += value * ((one - fw) * l0[r] + fw * l1[r])
        if add:
            out[n] += total
        else:
            out[n] = total


@njit(cache=True, nogil=True, fastmath=FAST)
def _forward_features(begin: int, stop: int, x: Any, axes: Any, plane: Any, line: Any, out: Any, offset: int) -> None:
    height, width, rank = plane.shape
    length = line.shape[0]
    rows = plane.reshape(height * width, rank)
    for n in range(begin, stop):
        i, fu = cell(x[n, axes[0]], width)
        j, fv = cell(x[n, axes[1]], height)
        k, fw = cell(x[n, axes[2]], length)
        right, down = np.int64(width > 1), np.int64(height > 1) * width
        p = j * width + i
        p00, p01, p10, p11 = rows[p], rows[p + right], rows[p + down], rows[p + down + right]
        l0, l1 = line[k], line[min(k + 1, length - 1)]
        one = np.float32(1.0)
        w00, w01, w10, w11 = (one - fu) * (one - fv), fu * (one - fv), (one - fu) * fv, fu * fv
        target = out[n, offset : offset + rank]
        for r in range(rank):
            value = w00 * p00[r] + w01 * p01[r] + w10 * p10[r] + w11 * p11[r]
            target[r] = value * ((one - fw) * l0[r] + fw * l1[r])


@njit(cache=True, nogil=True)
def _sort(x: Any, a: int, b: int, width: int, height: int, order: Any, first: Any) -> None:
    """Stable counting sort of points by plane cell; ``first`` [height + 1]: where the points of each row begin."""
    count = x.shape[0]
    key = np.empty(count, np.int64)
    start = np.zeros(height * width + 1, np.int64)
    for n in range(count):
        i, _ = cell(x[n, a], width)
        j, _ = cell(x[n, b], height)
        key[n] = j * width + i
        start[key[n] + 1] += 1
    for c in range(height * width):
        start[c + 1] += start[c]
    for j in range(height + 1):
        first[j] = start[j * width]
    for n in range(count):
        order[start[key[n]]] = n
        start[key[n]] += 1


@njit(cache=True, nogil=True, fastmath=FAST)
def _backward(
    begin: int,
    stop: int,
    x: Any,
    axes: Any,
    plane: Any,
    line: Any,
    grad: Any,
    offset: int,
    order: Any,
    first: Any,
    cut: Any,
    grad_plane: Any,
    halo: Any,
    lines: Any,
) -> None:
    """Add the gradients of slabs ``begin`` to ``stop`` of one mode; ``grad`` is [N, 1] (of the sum, ``offset`` -1) or
    [N, all ranks]."""
    height, width, rank = plane.shape
    length = line.shape[0]
    rows = plane.reshape(height * width, rank)
    out = grad_plane.reshape(height * width, rank)
    scalar = grad.shape[1] == 1 and rank >= 1 and offset < 0
    right, down = np.int64(width > 1), np.int64(height > 1) * width
    one = np.float32(1.0)
    for t in range(begin, stop):
        last = cut[t + 1] - 1
        spill, own_line = halo[t], lines[t]
        pg, lg = np.empty(rank, np.float32), np.empty(rank, np.float32)
        for s in range(first[cut[t]], first[cut[t + 1]]):
            n = order[s]
            i, fu = cell(x[n, axes[0]], width)
            j, fv = cell(x[n, axes[1]], height)
            k, fw = cell(x[n, axes[2]], length)
            p = j * width + i
            k1 = min(k + 1, length - 1)
            p00, p01, p10, p11 = rows[p], rows[p + right], rows[p + down], rows[p + down + right]
            l0, l1 = line[k], line[k1]
            w00, w01, w10, w11 = (one - fu) * (one - fv), fu * (one - fv), (one - fu) * fv, fu * fv
            v0 = one - fw
            if scalar:
                g = grad[n, 0]
                for r in range(rank):
                    pg[r] = g * (v0 * l0[r] + fw * l1[r])
                    lg[r] = g * (w00 * p00[r] + w01 * p01[r] + w10 * p10[r] + w11 * p11[r])
            else:
                gs = grad[n, offset : offset + rank]
                for r in range(rank):
                    pg[r] = gs[r] * (v0 * l0[r] + fw * l1[r])
                    lg[r] = gs[r] * (w00 * p00[r] + w01 * p01[r] + w10 * p10[r] + w11 * p11[r])
            o0, o1 = out[p], out[p + right]
            if j == last and height > 1:
                o2, o3 = spill[i], spill[i + right]
            else:
                o2, o3 = out[p + down], out[p + down + right]
            for r in range(rank):
                o0[r] += w00 * pg[r]
            for r in range(rank):
                o1[r] += w01 * pg[r]
            for r in range(rank):
                o2[r] += w10 * pg[r]
            for r in range(rank):
                o3[r] += w11 * pg[r]
            a0, a1 = own_line[k], own_line[k1]
            for r in range(rank):
                a0[r] += v0 * lg[r]
            for r in range(rank):
                a1[r] += fw * lg[r]


def _arrays(tensors: list[Tensor]) -> list[Floats]:
    return [t.detach().contiguous().numpy() for t in tensors]


def _into_slabs(
    x: Floats, axes: tuple[int, int, int], plane: Floats, line: Floats, grad: Floats, offset: int,
    grad_plane: Floats, grad_line: Floats,
) -> None:  # fmt: skip
    """Add the gradients of one mode, a slab of plane rows to each thread."""
    height, width, rank = plane.shape
    parts, count = threads(), len(x)
    order, first = np.empty(count, np.int64), np.empty(height + 1, np.int64)
    _sort(x, axes[0], axes[1], width, height, order, first)
    cut = np.searchsorted(first, np.arange(parts + 1) * count // parts).astype(np.int64)
    cut[0], cut[parts] = 0, height
    halo = np.zeros((parts, width, rank), np.float32)
    lines = np.zeros((parts, *line.shape), np.float32)
    share(_backward, parts, x, axes, plane, line, grad, offset, order, first, cut, grad_plane, halo, lines)
    for t in range(parts):
        grad_line += lines[t]
        if cut[t] < cut[t + 1] < height:
            grad_plane[cut[t + 1]] += halo[t]


def forward(x01: Tensor, planes: list[Tensor], lines: list[Tensor], summed: bool) -> Tensor:
    """:func:`pvdconvert.kernels.planes.vm_sum` if ``summed``, else ``vm_features``; float32 on the CPU."""
    x, (plane, line) = x01.detach().contiguous().numpy(), (_arrays(planes), _arrays(lines))
    ranks = [a.shape[-1] for a in plane]
    out = torch.empty(len(x) if summed else (len(x), sum(ranks)), dtype=torch.float32)
    if len(x):
        for m, axes in enumerate(MODES):
            if summed:
                share(_forward_sum, len(x), x, axes, plane[m], line[m], out.numpy(), m > 0, grain=GRAIN)
            else:
                at = sum(ranks[:m])
                share(_forward_features, len(x), x, axes, plane[m], line[m], out.numpy(), at, grain=GRAIN)
    return out


def backward(x01: Tensor, grad: Tensor, planes: list[Tensor], lines: list[Tensor], summed: bool) -> list[Tensor]:
    """Gradients of the planes, then of the lines; ``grad`` is [N] if ``summed``, else [N, R0 + R1 + R2]."""
    x, (plane, line) = x01.detach().contiguous().numpy(), (_arrays(planes), _arrays(lines))
    grads = [torch.zeros(a.shape, dtype=torch.float32) for a in (*plane, *line)]
    g = grad.contiguous().numpy()
    offset = 0
    if len(x):
        for m, axes in enumerate(MODES):
            where = -1 if summed else offset
            into, along = grads[m].numpy(), grads[3 + m].numpy()
            _into_slabs(x, axes, plane[m], line[m], g.reshape(len(x), -1), where, into, along)
            offset += plane[m].shape[-1]
    return grads
