"""The numba twin of :func:`pvdconvert.kernels.octree.leaf_rows`: CPU, float32, bit for bit the same leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from pvdconvert.kernels.cpu import share

Array = NDArray[Any]


@njit(nogil=True, cache=True)
def _descend(begin: int, stop: int, u: Array, child: Array, rows: Array) -> None:
    side = child.shape[1]
    wide = np.float32(side)
    for p in range(begin, stop):
        x, y, z = u[p, 0], u[p, 1], u[p, 2]
        # Written so that NaN falls outside.
        if not (x >= 0 and x <= 1 and y >= 0 and y <= 1 and z >= 0 and z <= 1):
            rows[p] = -1
            continue
        node = np.int64(0)
        while True:
            x, y, z = x * wide, y * wide, z * wide
            i, j, k = min(int(x), side - 1), min(int(y), side - 1), min(int(z), side - 1)
            x, y, z = x - np.float32(i), y - np.float32(j), z - np.float32(k)
            link = child[node, i, j, k]
            if link == 0:
                rows[p] = ((node * side + i) * side + j) * side + k
                break
            node += link


def leaf_rows(u: Tensor, child: Tensor) -> Tensor:
    """int64 [N]; see :func:`pvdconvert.kernels.octree.leaf_rows`."""
    rows = np.empty(len(u), np.int64)
    if len(u):
        points = u.detach().contiguous().numpy()
        share(_descend, len(u), points, child.contiguous().numpy(), rows, grain=1024)
    return torch.from_numpy(rows)
