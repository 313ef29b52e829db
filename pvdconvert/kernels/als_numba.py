"""CPU twin of one block update of :mod:`pvdconvert.solve.als`. Imported only when it runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from pvdconvert.kernels.cpu import FAST, share


@njit(cache=True, nogil=True, fastmath=FAST)
def _update(
    begin: int,
    stop: int,
    fixed: Any,
    fixed_row: Any,
    solved: Any,
    solved_row: Any,
    offsets: Any,
    order: Any,
    target: Any,
    weight: Any,
    limit: Any,
    fit: Any,
    ridge: float,
) -> None:
    rank = fixed.shape[1]
    a, b, v = np.empty((rank, rank)), np.empty(rank), np.empty(rank)
    for g in range(begin, stop):
        x = solved[solved_row[g]]
        a[:, :] = 0.0
        b[:] = 0.0
        for i in range(rank):
            a[i, i] = ridge
        for s in range(offsets[g], offsets[g + 1]):
            m = order[s]
            f = fixed[fixed_row[m]]
            own = 0.0
            for i in range(rank):
                v[i] = f[i]
                own += v[i] * x[i]
            e = np.float64(target[m]) - fit[m]
            if e * limit[m] < 0.0:
                e = 0.0
            w = np.float64(weight[m])
            e = w * (own + e)
            for i in range(rank):
                b[i] += e * v[i]
                wi = w * v[i]
                row = a[i]
                for j in range(rank):
                    row[j] += wi * v[j]
        # Cholesky in place (lower), then two triangular solves.
        for i in range(rank):
            for j in range(i + 1):
                total = a[i, j]
                for k in range(j):
                    total -= a[i, k] * a[j, k]
                if i == j:
                    a[i, i] = np.sqrt(max(total, 1e-30))
                else:
                    a[i, j] = total / a[j, j]
        for i in range(rank):
            total = b[i]
            for k in range(i):
                total -= a[i, k] * b[k]
            b[i] = total / a[i, i]
        for i in range(rank - 1, -1, -1):
            total = b[i]
            for k in range(i + 1, rank):
                total -= a[k, i] * b[k]
            b[i] = total / a[i, i]
        for i in range(rank):
            new = np.float32(b[i])
            b[i] = np.float64(new) - x[i]
            x[i] = new
        for s in range(offsets[g], offsets[g + 1]):
            m = order[s]
            f = fixed[fixed_row[m]]
            change = 0.0
            for i in range(rank):
                change += f[i] * b[i]
            fit[m] += change


def update(
    fixed: torch.Tensor,
    fixed_row: torch.Tensor,
    solved: torch.Tensor,
    solved_row: torch.Tensor,
    offsets: torch.Tensor,
    order: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    limit: torch.Tensor,
    fit: torch.Tensor,
    ridge: float,
) -> None:
    """See ``_update_torch`` in :mod:`pvdconvert.solve.als`; every array contiguous, ``solved`` and ``fit`` in place."""
    arrays: list[Any] = [t.numpy() for t in (fixed, fixed_row, solved, solved_row, offsets, order)]
    points: list[Any] = [t.numpy() for t in (target, weight, limit, fit)]
    share(_update, len(offsets) - 1, *arrays, *points, ridge, uneven=64)
