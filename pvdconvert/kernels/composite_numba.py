"""numba twin of :mod:`pvdconvert.kernels.composite`: one pass over each ray, parallel over rays."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

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


def set_threads() -> None:
    """As many numba threads as torch has been given."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


class _RenderWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tau: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        set_threads()
        tau, offsets = tau.contiguous(), offsets.contiguous()
        w, end = torch.empty_like(tau), tau.new_empty(offsets.shape[0] - 1)
        _forward(tau.detach().numpy(), offsets.numpy(), w.numpy(), end.numpy())
        ctx.save_for_backward(w, end, offsets)
        return w, end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_w: Tensor, grad_end: Tensor) -> tuple[Tensor, None]:
        set_threads()
        w, end, offsets = ctx.saved_tensors
        grad = torch.empty_like(w)
        _backward(
            w.numpy(),
            end.numpy(),
            offsets.numpy(),
            grad_w.contiguous().numpy(),
            grad_end.contiguous().numpy(),
            grad.numpy(),
        )
        return grad, None


def render_weights_numba(tau: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`pvdconvert.kernels.composite.render_weights`; float32 on the CPU."""
    w, end = _RenderWeights.apply(tau, offsets)  # type: ignore[no-untyped-call]
    return w, end
