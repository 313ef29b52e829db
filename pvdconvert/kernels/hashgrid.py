"""Multiresolution hash encoding (Mueller et al. 2022, section 3): the operator and its plain-torch truth.

The twin for CPUs is :mod:`pvdconvert.kernels.hashgrid_numba`; the index rules are in
:mod:`pvdconvert.kernels.hashgrid_spec`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pvdconvert.kernels.backend import use_numba
from pvdconvert.kernels.hashgrid_spec import PRIMES, HashGridSpec, Level, growth

__all__ = ["HashGridSpec", "Level", "growth", "hash_encode", "hash_encode_torch"]

_UINT32 = 0xFFFFFFFF


def hash_encode(x01: Tensor, table: Tensor, spec: HashGridSpec) -> Tensor:
    """Interpolated table rows: ``x01`` [N, 3] in box units, ``table`` [E, F] -> [N, L*F], level-major.

    Outside of ``spec.domain`` the features are 0. Differentiable in ``table``; gradients in ``x01`` are answered by the
    plain-torch truth only, which runs whenever ``x01`` asks for them. The result may be a transposed view.
    Raises ValueError where the shapes do not fit ``spec``.
    """
    if x01.ndim != 2 or x01.shape[1] != 3:
        raise ValueError(f"positions must be [N, 3], got {list(x01.shape)}")
    if tuple(table.shape) != (spec.entries, spec.features):
        raise ValueError(f"the table is {list(table.shape)}, the grid needs {[spec.entries, spec.features]}")
    if use_numba(x01, table) and not (x01.requires_grad and torch.is_grad_enabled()):
        from pvdconvert.kernels.hashgrid_numba import hash_encode_numba

        return hash_encode_numba(x01, table, spec)
    return hash_encode_torch(x01, table, spec)


def hash_encode_torch(x01: Tensor, table: Tensor, spec: HashGridSpec) -> Tensor:
    """The truth of :func:`hash_encode` in plain torch: any device and float type, differentiable in both arguments."""
    low, high = spec.domain
    inside = ((x01 >= low) & (x01 <= high)).all(-1)[:, None]
    x = torch.where(inside, x01, 0)
    parts = []
    for level in spec.levels:
        pos = x * level.scale + spec.shift
        cell = pos.detach().floor()
        f = pos - cell
        if spec.interpolation == "smoothstep":
            f = f * f * (3 - 2 * f)
        elif spec.interpolation == "nearest":
            f = torch.zeros_like(f)
        corner = cell.long()
        near = (1 - f).unbind(-1)
        far = f.unbind(-1)
        total: Tensor | None = None
        for k in range(8):
            bits = (k & 1, k >> 1 & 1, k >> 2 & 1)
            weight = torch.ones_like(near[0])
            for axis in range(3):
                weight = weight * (far[axis] if bits[axis] else near[axis])
            rows = level.offset + _index(corner + corner.new_tensor(bits), level)
            term = weight[:, None] * table[rows]
            total = term if total is None else total + term
        assert total is not None
        parts.append(total)
    return torch.where(inside, torch.cat(parts, dim=-1), 0)


def _index(corner: Tensor, level: Level) -> Tensor:
    """:meth:`Level.index` for corners [N, 3] int64. Products may wrap in int64: their low 32 bits are right."""
    x, y, z = corner.unbind(-1)
    if level.hashed:
        i = (x * PRIMES[0]) ^ (y * PRIMES[1]) ^ (z * PRIMES[2])
    else:
        i = x + y * level.stride + z * (level.stride * level.stride)
    return (i & _UINT32) % level.entries
