"""Vector-matrix (VM) decomposition: products of planes and lines (TensoRF, arXiv 2203.09517, eq. 4 and 7; layouts 3.3).

Mode 0 is the plane over axes (0, 1) times the line over axis 2, mode 1 (0, 2) x 1, mode 2 (1, 2) x 0. Planes are
channel-last, [H, W, R] with W along the first axis of the pair; lines are [L, R]. Interpolation is linear between
vertices, the outermost of which lie on the faces of the unit cube (``align_corners=True``); positions outside of the
cube are clamped to it. Positions get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pvdconvert.kernels.backend import use_numba

PAIRS = ((0, 1), (0, 2), (1, 2))
"""Axes of plane i: (along W, along H)."""
AXES = (2, 1, 0)
"""Axis of line i."""


def vm_sum(x01: Tensor, planes: Sequence[Tensor], lines: Sequence[Tensor]) -> Tensor:
    """Sum over modes and ranks of plane x line: [N] at ``x01`` [N, 3] in the unit cube."""
    if use_numba(x01, *planes, *lines):
        from pvdconvert.kernels import planes_numba

        return planes_numba.vm_sum(x01, list(planes), list(lines))
    return vm_sum_torch(x01, planes, lines)


def vm_features(x01: Tensor, planes: Sequence[Tensor], lines: Sequence[Tensor]) -> Tensor:
    """Products of every rank, mode after mode: [N, R0 + R1 + R2] at ``x01`` [N, 3] in the unit cube."""
    if use_numba(x01, *planes, *lines):
        from pvdconvert.kernels import planes_numba

        return planes_numba.vm_features(x01, list(planes), list(lines))
    return vm_features_torch(x01, planes, lines)


def vm_sum_torch(x01: Tensor, planes: Sequence[Tensor], lines: Sequence[Tensor]) -> Tensor:
    """:func:`vm_sum` in plain torch: the truth, on any device."""
    total = x01.new_zeros(x01.shape[0])
    for plane, line in _modes(x01, planes, lines):
        total = total + (plane * line).sum(-1)
    return total


def vm_features_torch(x01: Tensor, planes: Sequence[Tensor], lines: Sequence[Tensor]) -> Tensor:
    """:func:`vm_features` in plain torch: the truth, on any device."""
    return torch.cat([plane * line for plane, line in _modes(x01, planes, lines)], dim=-1)


def _modes(x01: Tensor, planes: Sequence[Tensor], lines: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Interpolated (plane [N, R], line [N, R]) of every mode."""
    x01 = x01.detach()
    out = []
    for (a, b), c, plane, line in zip(PAIRS, AXES, planes, lines, strict=True):
        height, width, _ = plane.shape
        i0, i1, fu = _cell(x01[:, a], width)
        j0, j1, fv = _cell(x01[:, b], height)
        k0, k1, fw = _cell(x01[:, c], line.shape[0])
        top = (1 - fu) * plane[j0, i0] + fu * plane[j0, i1]
        bottom = (1 - fu) * plane[j1, i0] + fu * plane[j1, i1]
        out.append(((1 - fv) * top + fv * bottom, (1 - fw) * line[k0] + fw * line[k1]))
    return out


def _cell(u: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper vertex [N] and the fraction between them [N, 1] of ``u`` [N] on ``n`` vertices."""
    pos = u.nan_to_num(0.0).clamp(0, 1) * (n - 1)
    low = pos.long().clamp(max=max(n - 2, 0))
    return low, (low + 1).clamp(max=n - 1), (pos - low)[:, None]
