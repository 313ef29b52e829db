"""Trilinear interpolation on sparse vertices: a brick map, the plain-torch truth, and the dispatch to numba.

Positions ``xg`` are in vertex units: vertex (i, j, k) lies at exactly (i, j, k). A cell is the unit cube between eight
vertices. Gradients go to the values only, never to positions or to the direction basis.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pvdconvert.kernels.backend import use_numba

BRICK = 8
"""Side of a brick, in vertices: a power of two."""

Missing = Literal["cell", "zero"]
"""What a missing vertex means. ``cell``: the cell contributes nothing unless its eight vertices exist. ``zero``:
missing vertices count as 0 (svox2; layouts 4.1)."""


@dataclasses.dataclass(frozen=True)
class BrickMap:
    """Which vertices of a lattice exist, and in which row of a table their values stand.

    shape    vertices along x, y, z, each >= 2
    top      int32 [ceil(nx/B), ceil(ny/B), ceil(nz/B)]: the brick there, or -1
    bricks   int32 [M, B^3]: the row of each vertex of a brick (x-major inside), or -1
    """

    shape: tuple[int, int, int]
    top: Tensor
    bricks: Tensor

    @property
    def side(self) -> int:
        """B."""
        side: int = round(self.bricks.size(1) ** (1 / 3))
        return side

    @classmethod
    def from_vertices(cls, vertices: Tensor, shape: tuple[int, int, int], side: int = BRICK) -> BrickMap:
        """Row r belongs to ``vertices[r]`` ([V, 3] integers). Raises ValueError: out of range, or listed twice."""
        v = vertices.long()
        device = v.device
        tops = tuple(-(-n // side) for n in shape)
        if min(shape) < 2:
            raise ValueError(f"a voxel lattice needs two vertices along each axis, got {shape}")
        if bool(((v < 0) | (v >= torch.tensor(shape, device=device))).any()):
            raise ValueError(f"a vertex lies outside of the lattice {shape}")
        key, local = _brick_key(v, tops, side)
        ids, brick_of = torch.unique(key, return_inverse=True)
        top = torch.full((tops[0] * tops[1] * tops[2],), -1, dtype=torch.int32, device=device)
        top[ids] = torch.arange(len(ids), dtype=torch.int32, device=device)
        bricks = torch.full((len(ids), side**3), -1, dtype=torch.int32, device=device)
        bricks.view(-1)[brick_of * side**3 + local] = torch.arange(len(v), dtype=torch.int32, device=device)
        if int((bricks >= 0).sum()) != len(v):
            raise ValueError("a vertex is listed twice")
        return cls(shape, top.view(tops), bricks)

    def rows(self, ijk: Tensor) -> Tensor:
        """int64 [...]: the row of each vertex ``ijk`` [..., 3], or -1 where there is none."""
        side = self.side
        inside = ((ijk >= 0) & (ijk < torch.tensor(self.shape, device=ijk.device))).all(-1)
        v = torch.where(inside[..., None], ijk, 0).long()
        key, local = _brick_key(v, tuple(self.top.shape), side)
        brick = self.top.view(-1)[key].long()
        found = inside & (brick >= 0)
        if not len(self.bricks):
            return torch.full(found.shape, -1, device=ijk.device)
        row = self.bricks.view(-1)[torch.where(found, brick, 0) * side**3 + local].long()
        return torch.where(found, row, -1)


def _brick_key(v: Tensor, tops: tuple[int, ...], side: int) -> tuple[Tensor, Tensor]:
    b = torch.div(v, side, rounding_mode="floor")
    r = v - b * side
    key = (b[..., 0] * tops[1] + b[..., 1]) * tops[2] + b[..., 2]
    return key, (r[..., 0] * side + r[..., 1]) * side + r[..., 2]


def locate_torch(xg: Tensor, grid: BrickMap, missing: Missing = "cell") -> tuple[Tensor, Tensor]:
    """Rows int64 [N, 8] (-1 = contributes nothing) and trilinear weights [N, 8] of the corners, z fastest."""
    last = torch.tensor(grid.shape, device=xg.device) - 1
    valid = ((xg >= 0) & (xg <= last)).all(-1)
    x = torch.where(valid[:, None], xg, 0)
    cell = torch.minimum(torch.floor(x).long(), last - 1)
    f = x - cell
    steps = torch.tensor([[c >> 2 & 1, c >> 1 & 1, c & 1] for c in range(8)], device=xg.device)
    rows = grid.rows(cell[:, None, :] + steps)
    keep = valid[:, None].expand(-1, 8)
    if missing == "cell":
        keep = keep & (rows >= 0).all(1, keepdim=True)
    weights = torch.where(steps.bool(), f[:, None, :], 1 - f[:, None, :]).prod(-1)
    return torch.where(keep, rows, -1), weights


def voxel_inside(xg: Tensor, grid: BrickMap) -> Tensor:
    """bool [N]: whether ``xg`` [N, 3] lies in a cell whose eight vertices exist."""
    if use_numba(xg):
        from pvdconvert.kernels import voxels_numba

        return voxels_numba.inside(xg, grid)
    return (locate_torch(xg, grid)[0] >= 0).all(-1)


def voxel_interp(xg: Tensor, grid: BrickMap, values: Tensor, missing: Missing = "cell", fill: float = 0.0) -> Tensor:
    """[N, C]: ``values`` [V, C] interpolated at ``xg`` [N, 3]; ``fill`` where no vertex contributes."""
    if use_numba(xg, values):
        from pvdconvert.kernels import voxels_numba

        return voxels_numba.interp(xg, grid, values, missing, fill)
    return voxel_interp_torch(xg, grid, values, missing, fill)


def voxel_interp_torch(
    xg: Tensor, grid: BrickMap, values: Tensor, missing: Missing = "cell", fill: float = 0.0
) -> Tensor:
    """The truth of :func:`voxel_interp`."""
    rows, weights = locate_torch(xg, grid, missing)
    if not len(values) or not len(xg):
        return values.new_full((len(xg), values.shape[1]), fill) + values.sum() * 0
    there = rows >= 0
    w = torch.where(there, weights, 0).to(values.dtype)
    out = F.embedding_bag(rows.clamp_min(0), values, mode="sum", per_sample_weights=w)
    return out if fill == 0.0 else torch.where(there.any(1, keepdim=True), out, fill)


def voxel_sh_color(xg: Tensor, basis: Tensor, grid: BrickMap, sh: Tensor, missing: Missing = "cell") -> Tensor:
    """[N, K, 3]: colours before their activation, ``sum_b basis[n,k,b] * sh(x_n)[c*B + b]``.

    ``basis`` [N, K, B] holds the spherical harmonics of K directions a point; ``sh`` [V, 3*B], colour-major (svox2).
    Fused in numba: the interpolated coefficients [N, 3*B] are never stored.
    """
    if use_numba(xg, basis, sh):
        from pvdconvert.kernels import voxels_numba

        return voxels_numba.sh_color(xg, basis, grid, sh, missing)
    return voxel_sh_color_torch(xg, basis, grid, sh, missing)


def voxel_sh_color_torch(xg: Tensor, basis: Tensor, grid: BrickMap, sh: Tensor, missing: Missing = "cell") -> Tensor:
    """The truth of :func:`voxel_sh_color`."""
    coefficients = voxel_interp_torch(xg, grid, sh, missing).reshape(len(xg), 3, basis.shape[2])
    return torch.einsum("nkb,ncb->nkc", basis, coefficients)
