"""Figures of a pair of pictures: mean squared error, PSNR, SSIM."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CAP = 100.0
"""dB at which a view counts in a mean. 200-px views that differ in a single byte have 98.9 dB, equal ones infinity."""
SSIM_WINDOW = 11
"""Pixels along a side of the window of :func:`ssim`."""

Picture = NDArray[Any] | Tensor


def unit(a: Picture) -> NDArray[np.float64]:
    """float64 in [0, 1]: bytes are divided by 255, floats pass."""
    array = a.detach().cpu().numpy() if isinstance(a, Tensor) else np.asarray(a)
    return array / 255.0 if array.dtype == np.uint8 else array.astype(np.float64)


def mse(a: Picture, b: Picture, mask: NDArray[np.bool_] | None = None) -> float:
    """Mean squared difference; bytes count as n/255. ``mask`` [H, W] picks pixels (ValueError if none)."""
    return masked_mean((unit(a) - unit(b)) ** 2, mask)


def psnr(a: Picture, b: Picture, mask: NDArray[np.bool_] | None = None) -> float:
    """Peak signal-to-noise ratio in dB, peak 1; infinity for equal pictures."""
    error = mse(a, b, mask)
    return math.inf if error == 0.0 else -10.0 * math.log10(error)


def ssim(a: Picture, b: Picture, mask: NDArray[np.bool_] | None = None) -> float:
    """Structural similarity of [H, W, C] pictures, each side >= 11 (Wang et al. 2004).

    Gaussian window 11 x 11, sigma 1.5; K1 = 0.01, K2 = 0.03, range 1; population covariance; the mean over all windows
    that lie inside the picture, and over channels. ``mask`` [H, W] picks windows by their central pixel (ValueError if
    there is none).
    """
    x, y = (torch.from_numpy(unit(v)).movedim(-1, 0)[:, None] for v in (a, b))
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim needs {SSIM_WINDOW} pixels a side, got {tuple(x.shape[-2:])}")
    edge = SSIM_WINDOW // 2
    g = torch.exp(-0.5 * ((torch.arange(SSIM_WINDOW, dtype=torch.float64) - edge) / 1.5) ** 2)
    g = g / g.sum()

    def blur(v: Tensor) -> Tensor:
        v = torch.nn.functional.conv2d(v, g[None, None, :, None])
        return torch.nn.functional.conv2d(v, g[None, None, None, :])

    c1, c2 = 0.01**2, 0.03**2
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return masked_mean(value[:, 0].movedim(0, -1).numpy(), None if mask is None else mask[edge:-edge, edge:-edge])


def masked_mean(values: NDArray[np.float64], mask: NDArray[np.bool_] | None) -> float:
    """The mean of ``values`` [H, W, ...] where ``mask`` [H, W] is true. Raises ValueError where it nowhere is."""
    chosen = values if mask is None else values[mask]
    if chosen.size == 0:
        raise ValueError("no pixels to compare")
    return float(chosen.mean())
