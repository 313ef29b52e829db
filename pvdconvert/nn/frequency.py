"""Frequency encodings: a coordinate becomes sines and cosines of its octaves."""

from __future__ import annotations

import torch
from torch import Tensor

ORDERS = ("interleaved", "per-coordinate", "channel-major")


def frequency_width(dim: int, frequencies: int, include_input: bool = True) -> int:
    """Columns that :func:`frequency_encode` makes of ``dim`` coordinates."""
    return dim * (2 * frequencies + int(include_input))


def frequency_encode(
    x: Tensor,
    frequencies: int,
    *,
    include_input: bool = True,
    order: str = "interleaved",
    scale: float = 1.0,
    step: float = 1.0,
) -> Tensor:
    """sin and cos of scale 2^(step k) x, k < ``frequencies``: x [N, D] -> [N, D * (2 * frequencies + include_input)].

    ``order`` of the columns, with x, y standing for the D coordinates (layouts section 0.5):

    interleaved     [x, y, sin x, sin y, cos x, cos y, sin 2x, sin 2y, cos 2x, cos 2y, ...]: FE-A, the paper's code
    per-coordinate  [x, sin x, cos x, sin 2x, cos 2x, ..., y, sin y, cos y, ...]: Jiayi-Pan/NeRF
    channel-major   [x, y, sin x, sin 2x, ..., sin y, sin 2y, ..., cos x, cos 2x, ...]: FE-C, TensoRF

    Raises ValueError for another order.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    n, dim = x.shape
    octaves = torch.exp2(torch.arange(frequencies, dtype=x.dtype, device=x.device) * step)
    octaves = octaves if scale == 1.0 else octaves * scale
    if order == "interleaved":
        phase = x[:, None, :] * octaves[:, None]  # [N, F, D]
        waves = torch.stack([phase.sin(), phase.cos()], dim=2).view(n, 2 * frequencies * dim)
        return torch.cat([x, waves], dim=1) if include_input else waves
    phase = x[:, :, None] * octaves  # [N, D, F]
    if order == "channel-major":
        parts = [phase.sin().flatten(1), phase.cos().flatten(1)]
        return torch.cat([x, *parts] if include_input else parts, dim=1)
    waves = torch.stack([phase.sin(), phase.cos()], dim=3).view(n, dim, 2 * frequencies)
    if include_input:
        waves = torch.cat([x[:, :, None], waves], dim=2)
    return waves.flatten(1)
