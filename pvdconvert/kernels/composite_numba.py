"""numba twin of :mod:`pvdconvert.kernels.composite`: one pass over each ray, parallel over rays."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from pvdconvert.kernels.cpu import use_threads

# No fastmath: a density may be infinite, and NaN must stay NaN on its own ray.


@numba.njit(inline="always", error_model="numpy")
def alpha(x: Any) -> Any:
    """1 - exp(-x) in double precision for ``x`` >= 0 in single."""
    if x < np.float32(0.25):
        # Series to x^8 (error 1e-11): single precision would cancel, and thin samples are many, so errors would add up.
        v = np.float64(x)
        a = 1 / 24 - v * (1 / 120 - v * (1 / 720 - v * (1 / 5040 - v * (1 / 40320))))
        a = v * (1.0 - v * (0.5 - v * (1 / 6 - v * a)))
    else:
        a = 1.0 - np.float64(math.exp(-x))
    return a


@numba.njit(parallel=True, error_model="numpy", cache=True)
def _forward(tau: Any, offsets: Any, w: Any, end: Any) -> None:
    for r in numba.prange(offsets.shape[0] - 1):
        left = 1.0
        for i in range(offsets[r], offsets[r + 1]):
            a = alpha(tau[i])
            w[i] = left * a
            left *= 1.0 - a
        end[r] = left


@numba.njit(parallel=True, error_model="numpy", cache=True)
def _backward(w: Any, end: Any, offsets: Any, grad_w: Any, grad_end: Any, grad: Any) -> None:
    for r in numba.prange(offsets.shape[0] - 1):
        # What is left behind sample i is T_end plus all weights behind it: summed back to front, no exp, no cancelling.
        left = np.float64(end[r])
        behind = left * grad_end[r]
        for i in range(offsets[r + 1] - 1, offsets[r] - 1, -1):
            grad[i] = left * grad_w[i] - behind
            left += w[i]
            behind += np.float64(w[i]) * grad_w[i]


@numba.njit(parallel=True, error_model="numpy", cache=True)
def _blend(weight: Any, values: Any, offsets: Any, out: Any) -> None:
    for r in numba.prange(out.shape[0]):
        for i in range(offsets[r], offsets[r + 1]):
            for c in range(out.shape[1]):
                out[r, c] += weight[i] * values[i, c]


@numba.njit(parallel=True, error_model="numpy", cache=True)
def _blend_backward(grad: Any, weight: Any, values: Any, offsets: Any, grad_weight: Any, grad_values: Any) -> None:
    for r in numba.prange(grad.shape[0]):
        for i in range(offsets[r], offsets[r + 1]):
            total = np.float32(0.0)
            for c in range(grad.shape[1]):
                total += grad[r, c] * values[i, c]
                grad_values[i, c] = grad[r, c] * weight[i]
            grad_weight[i] = total


def forward(tau: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`pvdconvert.kernels.composite.render_weights`; float32 on the CPU."""
    use_threads()
    tau, offsets = tau.detach().contiguous(), offsets.contiguous()
    w, end = torch.empty_like(tau), tau.new_empty(offsets.shape[0] - 1)
    _forward(tau.numpy(), offsets.numpy(), w.numpy(), end.numpy())
    return w, end


def backward(w: Tensor, end: Tensor, offsets: Tensor, grad_w: Tensor, grad_end: Tensor) -> Tensor:
    """The gradient of ``tau``."""
    use_threads()
    w = w.detach().contiguous()
    grad = torch.empty_like(w)
    given: list[Any] = [t.detach().contiguous().numpy() for t in (w, end, offsets, grad_w, grad_end)]
    _backward(*given, grad.numpy())  # type: ignore[call-arg]
    return grad


def _arrays(*tensors: Tensor) -> list[Any]:
    return [t.detach().contiguous().numpy() for t in tensors]


def ray_blend(weight: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    """Sums of ``weight * values`` [S, C] over the samples of each ray: [R, C]."""
    use_threads()
    out = torch.zeros(offsets.shape[0] - 1, values.shape[1])
    _blend(*_arrays(weight, values, offsets, out))
    return out


def ray_blend_backward(grad: Tensor, weight: Tensor, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``weight`` and ``values``."""
    use_threads()
    grad_weight, grad_values = torch.empty(weight.shape), torch.empty(values.shape)
    _blend_backward(*_arrays(grad, weight, values, offsets, grad_weight, grad_values))
    return grad_weight, grad_values
