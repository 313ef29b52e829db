"""The distortion loss: a ray's weight should lie in one place (Barron et al. 2022, mip-NeRF 360, equation 15)."""

from __future__ import annotations

import torch
from torch import Tensor


def distortion(weight: Tensor, middle: Tensor, length: Tensor, offsets: Tensor) -> Tensor:
    """Mean over rays of ``sum_ij w_i w_j |s_i - s_j| + sum_i w_i^2 l_i / 3``, in time linear in the samples.

    weight, middle, length [S]: compositing weights w; middles s and lengths l of the samples as shares of the ray;
    ray r owns offsets[r]:offsets[r + 1] [R + 1], ``middle`` ascending within it. Differentiable in ``weight``.
    """
    rays = len(offsets) - 1
    if not rays or not len(weight):
        return weight.sum() * 0.0
    ray = torch.repeat_interleave(torch.arange(rays, device=weight.device), offsets.diff())
    w, s = weight.double(), middle.double()  # sums over all rays lose what one ray has

    def before(values: Tensor) -> Tensor:
        """Sum of those in front on the same ray."""
        total = torch.cumsum(values, 0) - values
        return total - total[offsets[:-1].clamp_max(len(values) - 1)][ray]

    apart = 2.0 * (w * (s * before(w) - before(w * s))).sum()
    return ((apart + (w.square() * length).sum() / 3.0) / rays).to(weight.dtype)
