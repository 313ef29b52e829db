"""Adam on the rows that a step touched, in one pass: moments, parameters, and the gradient's return to zero."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pvdconvert.kernels.cpu import FAST, share

BLOCK = 1024
TABLE = 2000
Array = NDArray[Any]


@njit(nogil=True, cache=True, fastmath=FAST)
def _mark(begin: int, stop: int, grad: Array, touched: Array) -> None:
    for r in range(begin, stop):
        for c in range(grad.shape[1]):
            if grad[r, c] != 0:
                touched[r] = 1
                break


@njit(nogil=True, cache=True, fastmath=FAST)
def _step(
    begin: int, stop: int, param: Array, grad: Array, m: Array, v: Array, steps: Array, touched: Array,
    lr: float, b1: float, b2: float, eps: float, table: Array,
) -> None:  # fmt: skip
    width = param.shape[1]
    k1, k2 = np.float32(1 - b1), np.float32(1 - b2)
    for r in range(begin, stop):
        if touched[r] == 0:
            continue
        touched[r] = 0
        steps[r] += 1
        t = int(steps[r])
        if t < table.shape[1]:
            scale, root = table[0, t], table[1, t]
        else:
            scale = np.float32(lr / (1 - b1**t))
            root = np.float32(1 / np.sqrt(1 - b2**t))
        tiny = np.float32(eps)
        for c in range(width):
            g = grad[r, c]
            grad[r, c] = 0
            m1 = m[r, c] + k1 * (g - m[r, c])
            v1 = v[r, c] + k2 * (g * g - v[r, c])
            m[r, c] = m1
            v[r, c] = v1
            param[r, c] -= scale * m1 / (np.sqrt(v1) * root + tiny)


def mark(grad: Array, touched: Array) -> None:
    """Set ``touched`` uint8 [R] where a row of ``grad`` [R, F] is not zero (NaN counts)."""
    share(_mark, len(grad), grad, touched, grain=BLOCK)


def step(
    param: Array, grad: Array, m: Array, v: Array, steps: Array, touched: Array,
    lr: float, b1: float, b2: float, eps: float,
) -> None:  # fmt: skip
    """One Adam step on the touched rows of [R, F] float32 arrays; clears their ``grad`` and ``touched``."""
    # Two powers a row would cost more than the row itself.
    t = np.arange(1, TABLE + 1, dtype=np.float64)
    table = np.ones((2, TABLE + 1), np.float32)
    table[0, 1:], table[1, 1:] = lr / (1 - b1**t), 1 / np.sqrt(1 - b2**t)
    # Many pieces: what a step touches is often one stretch of the table.
    share(_step, len(param), param, grad, m, v, steps, touched, lr, b1, b2, eps, table, grain=BLOCK, uneven=16)
