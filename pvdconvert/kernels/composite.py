"""Compositing of packed samples along rays (layouts section 0.4): weights, and sums over the samples of a ray.

Samples of all rays stand in one array; ray r owns rows ``offsets[r]:offsets[r+1]``, front to back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pvdconvert.kernels.backend import use_numba

OPAQUE = 100.0
"""Optical thickness beyond which a sample is opaque: exp(-100) is 4e-44. Bounds sums, so inf is a legal ``tau``."""


def render_weights(tau: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Compositing weights ``w_i = T_i (1 - exp(-tau_i))`` and what is left behind the last sample of each ray.

    tau [S] = density * length, >= 0; offsets [R+1] int64 -> w [S], T_end [R] (1 for a ray without samples).
    ``T_i = exp(-sum of tau_j before i on the ray)``. Both outputs are differentiable in ``tau``.
    """
    if use_numba(tau, offsets):
        from pvdconvert.kernels.composite_numba import render_weights_numba

        return render_weights_numba(tau, offsets)
    return render_weights_torch(tau, offsets)


def render_weights_torch(tau: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The truth of :func:`render_weights`."""
    counts = offsets[1:] - offsets[:-1]
    # One running sum over all rays, in double: rays are told apart by differences, which single precision would eat.
    thick = tau.double().clamp(max=OPAQUE)
    total = torch.cat([thick.new_zeros(1), torch.cumsum(thick, 0)])
    start = total[offsets[:-1]]
    before = total[:-1] - torch.repeat_interleave(start, counts)
    w = torch.exp(-before) * -torch.expm1(-thick)
    end = torch.exp(start - total[offsets[1:]])
    return w.to(tau.dtype), end.to(tau.dtype)


def ray_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums over the samples of each ray: values [S, C] (or [S]), offsets [R+1] int64 -> [R, C] (or [R]).

    Differentiable in ``values``; each ray is summed front to back, so equal inputs give equal bits. One operator serves
    all devices: torch's segmented sum costs about 1 ns a number on a CPU core.
    """
    flat = values.dim() == 1
    table = values[:, None] if flat else values
    out = torch.segment_reduce(table.contiguous(), "sum", offsets=offsets, axis=0, initial=0)
    return out[:, 0] if flat else out
