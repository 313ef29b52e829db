"""numba twin of :mod:`pvdconvert.kernels.composite`: one pass over each ray, parallel over rays."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from pvdconvert.kernels.cpu import share

GRAIN = 256
"""Rays that are worth a thread."""
BLOCK = 512
"""Samples whose opacity is computed in one go."""

# No fastmath: a density may be infinite, and NaN must stay NaN on its own ray.


@numba.njit(error_model="numpy", nogil=True, cache=True)
def alpha(x: Any) -> Any:
    """1 - exp(-x) in double precision for ``x`` >= 0 in single: relative error below 1e-11 up to x = 10.

    Without a branch or a call, so that loops over it are vectorised: the series of 1 - exp(-x / 64), then six times
    1 - (1 - a)^2 = a (2 - a), which cancels nothing. From 40 on nothing is left in double precision; NaN stays NaN.
    """
    v = np.float64(40.0) if x > np.float32(40.0) else np.float64(x)
    v *= 1 / 64
    a = 1 / 120 - v * (1 / 720 - v * (1 / 5040 - v * (1 / 40320)))
    a = v * (1.0 - v * (1 / 2 - v * (1 / 6 - v * (1 / 24 - v * a))))
    a *= 2.0 - a
    a *= 2.0 - a
    a *= 2.0 - a
    a *= 2.0 - a
    a *= 2.0 - a
    a *= 2.0 - a
    return a


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _forward(begin: int, stop: int, tau: Any, offsets: Any, w: Any, end: Any) -> None:
    ahead = np.empty(BLOCK)
    first: Any = 0
    filled: Any = 0
    last = offsets[stop]
    for r in range(begin, stop):
        left = 1.0
        for i in range(offsets[r], offsets[r + 1]):
            if i >= filled:
                first, filled = i, min(i + BLOCK, last)
                for k in range(filled - first):
                    ahead[k] = alpha(tau[first + k])
            a = ahead[i - first]
            w[i] = left * a
            left *= 1.0 - a
        end[r] = left


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _backward(begin: int, stop: int, w: Any, end: Any, offsets: Any, grad_w: Any, grad_end: Any, grad: Any) -> None:
    for r in range(begin, stop):
        # What is left behind sample i is T_end plus all weights behind it: summed back to front, no exp, no cancelling.
        left = np.float64(end[r])
        behind = left * grad_end[r]
        for i in range(offsets[r + 1] - 1, offsets[r] - 1, -1):
            grad[i] = left * grad_w[i] - behind
            left += w[i]
            behind += np.float64(w[i]) * grad_w[i]


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _blend(begin: int, stop: int, weight: Any, values: Any, offsets: Any, out: Any) -> None:
    for r in range(begin, stop):
        if out.shape[1] == 3:
            x, y, z = np.float32(0.0), np.float32(0.0), np.float32(0.0)
            for i in range(offsets[r], offsets[r + 1]):
                x += weight[i] * values[i, 0]
                y += weight[i] * values[i, 1]
                z += weight[i] * values[i, 2]
            out[r, 0], out[r, 1], out[r, 2] = x, y, z
            continue
        for i in range(offsets[r], offsets[r + 1]):
            for c in range(out.shape[1]):
                out[r, c] += weight[i] * values[i, c]


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _blend_backward(
    begin: int, stop: int, grad: Any, weight: Any, values: Any, offsets: Any, grad_weight: Any, grad_values: Any
) -> None:
    for r in range(begin, stop):
        if grad.shape[1] == 3:
            x, y, z = grad[r, 0], grad[r, 1], grad[r, 2]
            for i in range(offsets[r], offsets[r + 1]):
                grad_weight[i] = x * values[i, 0] + y * values[i, 1] + z * values[i, 2]
                grad_values[i, 0], grad_values[i, 1], grad_values[i, 2] = x * weight[i], y * weight[i], z * weight[i]
            continue
        for i in range(offsets[r], offsets[r + 1]):
            total = np.float32(0.0)
            for c in range(grad.shape[1]):
                total += grad[r, c] * values[i, c]
                grad_values[i, c] = grad[r, c] * weight[i]
            grad_weight[i] = total


def forward(tau: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`pvdconvert.kernels.composite.render_weights`; float32 on the CPU."""
    tau, offsets = tau.detach().contiguous(), offsets.contiguous()
    w, end = torch.empty_like(tau), tau.new_empty(offsets.shape[0] - 1)
    share(_forward, len(end), tau.numpy(), offsets.numpy(), w.numpy(), end.numpy(), grain=GRAIN)
    return w, end


def backward(w: Tensor, end: Tensor, offsets: Tensor, grad_w: Tensor, grad_end: Tensor) -> Tensor:
    """The gradient of ``tau``."""
    w = w.detach().contiguous()
    grad = torch.empty_like(w)
    given: list[Any] = [t.detach().contiguous().numpy() for t in (w, end, offsets, grad_w, grad_end)]
    share(_backward, len(end), *given, grad.numpy(), grain=GRAIN)
    return grad


def _arrays(*tensors: Tensor) -> list[Any]:
    return [t.detach().contiguous().numpy() for t in tensors]


def ray_blend(weight: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    """Sums of ``weight * values`` [S, C] over the samples of each ray: [R, C]."""
    out = torch.zeros(offsets.shape[0] - 1, values.shape[1])
    share(_blend, len(out), *_arrays(weight, values, offsets, out), grain=GRAIN)
    return out


def ray_blend_backward(grad: Tensor, weight: Tensor, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``weight`` and ``values``."""
    grad_weight, grad_values = torch.empty(weight.shape), torch.empty(values.shape)
    given = _arrays(grad, weight, values, offsets, grad_weight, grad_values)
    share(_blend_backward, len(grad), *given, grain=GRAIN)
    return grad_weight, grad_values
