"""CANDECOMP/PARAFAC (CP) decomposition: products of three lines (TensoRF, arXiv 2203.09517, eq. 3; layouts 3.3).

``lines[i]`` [L_i, R] runs along axis 2, 1, 0 for i = 0, 1, 2, as in :mod:`pvdconvert.kernels.planes`, channel-last.
Interpolation is linear between vertices, the outermost of which lie on the faces of the unit cube
(``align_corners=True``); positions outside of the cube are clamped to it. Positions get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pvdconvert.kernels.backend import use_numba

AXES = (2, 1, 0)
"""Axis of line i."""


def cp_sum(x01: Tensor, lines: Sequence[Tensor]) -> Tensor:
    """Sum over ranks of the products of three lines: [N] at ``x01`` [N, 3] in the unit cube."""
    if use_numba(x01, *lines):
        from pvdconvert.kernels import lines_numba

        return lines_numba.cp_sum(x01, list(lines))
    return cp_sum_torch(x01, lines)


def cp_features(x01: Tensor, lines: Sequence[Tensor]) -> Tensor:
    """Products of three lines of every rank: [N, R] at ``x01`` [N, 3] in the unit cube."""
    if use_numba(x01, *lines):
        from pvdconvert.kernels import lines_numba

        return lines_numba.cp_features(x01, list(lines))
    return cp_features_torch(x01, lines)


def cp_sum_torch(x01: Tensor, lines: Sequence[Tensor]) -> Tensor:
    """:func:`cp_sum` in plain torch: the truth, on any device."""
    return cp_features_torch(x01, lines).sum(-1)


def cp_features_torch(x01: Tensor, lines: Sequence[Tensor]) -> Tensor:
    """:func:`cp_features` in plain torch: the truth, on any device."""
    x01 = x01.detach()
    out: Tensor | None = None
    for axis, line in zip(AXES, lines, strict=True):
        n = line.shape[0]
        pos = x01[:, axis].nan_to_num(0.0).clamp(0, 1) * (n - 1)
        low = pos.long().clamp(max=max(n - 2, 0))
        part = (pos - low)[:, None]
        value = torch.lerp(line[low], line[(low + 1).clamp(max=n - 1)], part)
        out = value if out is None else out * value
    assert out is not None
    return out
