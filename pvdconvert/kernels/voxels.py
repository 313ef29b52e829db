"""Trilinear interpolation on sparse vertices: a brick map, the plain-torch truth, and the dispatch to numba.

Positions ``xg`` are in vertex units: vertex (i, j, k) lies at exactly (i, j, k). A cell is the unit cube between eight
vertices. Gradients go to the values only, never to positions or to the direction basis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pvdconvert.kernels.backend import twin
from pvdconvert.kernels.operators import define
from pvdconvert.kernels.rowgrad import sink_of

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
    if not torch.compiler.is_compiling() and twin(xg) == "torch":
        return (locate_torch(xg, grid)[0] >= 0).all(-1)
    rows, _ = _locate(xg.detach(), grid.shape, grid.top, grid.bricks, True)
    inside: Tensor = rows[:, 0] >= 0
    return inside


def voxel_interp(xg: Tensor, grid: BrickMap, values: Tensor, missing: Missing = "cell", fill: float = 0.0) -> Tensor:
    """[N, C]: ``values`` [V, C] interpolated at ``xg`` [N, 3]; ``fill`` where no vertex contributes."""
    if not torch.compiler.is_compiling() and twin(xg, values) == "torch":
        return voxel_interp_torch(xg, grid, values, missing, fill)
    rows, weights = _locate(xg.detach(), grid.shape, grid.top, grid.bricks, missing == "cell")
    out: Tensor = _gather(rows, weights, values, fill)
    return out


def voxel_interp_torch(
    xg: Tensor, grid: BrickMap, values: Tensor, missing: Missing = "cell", fill: float = 0.0
) -> Tensor:
    """The truth of :func:`voxel_interp`."""
    return _mix(*locate_torch(xg, grid, missing), values, fill)


def voxel_spread(xg: Tensor, grid: BrickMap, values: Tensor, into: Tensor, missing: Missing = "cell") -> Tensor:
    """``into`` [V, C], to whose rows ``values`` [N, C] at ``xg`` [N, 3] are added in place: the transpose of
    :func:`voxel_interp`. Not differentiable."""
    rows, weights = _locate(xg.detach(), grid.shape, grid.top, grid.bricks, missing == "cell")
    _scatter_into(rows, weights, values, into, None)
    return into


def _mix(rows: Tensor, weights: Tensor, values: Tensor, fill: float) -> Tensor:
    if not len(values) or not len(rows):
        return values.new_full((len(rows), values.shape[1]), fill) + values.sum() * 0
    there = rows >= 0
    w = torch.where(there, weights, 0).to(values.dtype)
    out = F.embedding_bag(rows.clamp_min(0), values, mode="sum", per_sample_weights=w)
    return out if fill == 0.0 else torch.where(there.any(1, keepdim=True), out, fill)


def voxel_sh_color(xg: Tensor, basis: Tensor, grid: BrickMap, sh: Tensor, missing: Missing = "cell") -> Tensor:
    """[N, K, 3]: colours before their activation, ``sum_b basis[n,k,b] * sh(x_n)[c*B + b]``.

    ``basis`` [N, K, B] holds the spherical harmonics of K directions a point; ``sh`` [V, 3*B], colour-major (svox2).
    Fused in the twins: the interpolated coefficients [N, 3*B] are never stored.
    """
    if not torch.compiler.is_compiling() and twin(xg, basis, sh) == "torch":
        return voxel_sh_color_torch(xg, basis, grid, sh, missing)
    rows, weights = _locate(xg.detach(), grid.shape, grid.top, grid.bricks, missing == "cell")
    out: Tensor = _gather_sh(rows, weights, basis.detach(), sh)
    return out


def voxel_sh_color_torch(xg: Tensor, basis: Tensor, grid: BrickMap, sh: Tensor, missing: Missing = "cell") -> Tensor:
    """The truth of :func:`voxel_sh_color`."""
    coefficients = voxel_interp_torch(xg, grid, sh, missing).reshape(len(xg), 3, basis.shape[2])
    return torch.einsum("nkb,ncb->nkc", basis, coefficients)


# ------------------------------------------------------------------------------------ the operators that torch knows
# First the eight rows and weights of each point, then rows are gathered, or scattered with the same rows and weights.


def _run_locate(xg: Tensor, shape: Sequence[int], top: Tensor, bricks: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    which = twin(xg)
    if which == "numba":
        from pvdconvert.kernels import voxels_numba

        return voxels_numba.locate(xg, shape, top, bricks, whole)
    if which == "triton":
        from pvdconvert.kernels import voxels_triton

        return voxels_triton.locate(xg, shape, top, bricks, whole)
    grid = BrickMap((shape[0], shape[1], shape[2]), top, bricks)
    rows, weights = locate_torch(xg, grid, "cell" if whole else "zero")
    return rows.int(), torch.where(rows >= 0, weights, 0)


def _run_gather(rows: Tensor, weights: Tensor, values: Tensor, fill: float) -> Tensor:
    which = twin(weights, values)
    if which == "numba":
        from pvdconvert.kernels import voxels_numba

        return voxels_numba.gather(rows, weights, values, fill)
    if which == "triton":
        from pvdconvert.kernels import voxels_triton

        return voxels_triton.gather(rows, weights, values, fill)
    return _mix(rows.long(), weights, values, fill)


def _run_gather_sh(rows: Tensor, weights: Tensor, basis: Tensor, sh: Tensor) -> Tensor:
    which = twin(weights, basis, sh)
    if which == "numba":
        from pvdconvert.kernels import voxels_numba

        return voxels_numba.gather_sh(rows, weights, basis, sh)
    if which == "triton":
        from pvdconvert.kernels import voxels_triton

        return voxels_triton.gather_sh(rows, weights, basis, sh)
    mixed = _mix(rows.long(), weights, sh, 0.0).reshape(len(rows), 3, basis.shape[2])
    return torch.einsum("nkb,ncb->nkc", basis, mixed)


def _scatter_into(rows: Tensor, weights: Tensor, grad: Tensor, into: Tensor, touched: Tensor | None) -> None:
    """Add ``weights`` x ``grad`` [N, C] to rows of ``into`` [V, C] and set their marks in ``touched`` uint8 [V]."""
    which = twin(weights, grad, into)
    if not len(rows) or not len(into):
        return
    if which == "numba":
        from pvdconvert.kernels import voxels_numba

        return voxels_numba.scatter(rows, weights, grad, into, touched)
    if which == "triton":
        from pvdconvert.kernels import voxels_triton

        return voxels_triton.scatter(rows, weights, grad, into, touched)
    there = rows >= 0
    at = rows[there].long()
    into.index_add_(0, at, (weights[..., None] * grad[:, None])[there])
    if touched is not None:
        touched[at] = 1


def _scatter_sh_into(
    rows: Tensor, weights: Tensor, basis: Tensor, grad: Tensor, into: Tensor, touched: Tensor | None
) -> None:
    """As :func:`_scatter_into` for colours: ``grad`` [N, K, 3], ``into`` [V, 3 * B]."""
    which = twin(weights, basis, grad, into)
    if not grad.numel() or not len(into):
        return
    if which == "numba":
        from pvdconvert.kernels import voxels_numba

        return voxels_numba.scatter_sh(rows, weights, basis, grad, into, touched)
    if which == "triton":
        from pvdconvert.kernels import voxels_triton

        return voxels_triton.scatter_sh(rows, weights, basis, grad, into, touched)
    wide = torch.einsum("nkc,nkb->ncb", grad, basis).reshape(len(rows), -1)
    _scatter_into(rows, weights, wide, into, touched)


def _run_scatter(rows: Tensor, weights: Tensor, grad: Tensor, count: int) -> Tensor:
    into = grad.new_zeros(count, grad.shape[1])
    _scatter_into(rows, weights, grad, into, None)
    return into


def _run_scatter_sh(rows: Tensor, weights: Tensor, basis: Tensor, grad: Tensor, count: int) -> Tensor:
    into = grad.new_zeros(count, 3 * basis.shape[2])
    _scatter_sh_into(rows, weights, basis, grad, into, None)
    return into


def _save_values(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, values = inputs[:3]
    ctx.save_for_backward(rows, weights)
    ctx.values = values  # the very object: rows of its gradient may be collected in place (kernels.rowgrad)


def _save_sh(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, basis, ctx.values = inputs
    ctx.save_for_backward(rows, weights, basis)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor | None, None]:
    sink = sink_of(ctx.values)
    if sink:
        rows, weights = ctx.saved_tensors
        _scatter_into(rows, weights, grad, sink[0], sink[1])
        return None, None, None, None
    return None, None, _scatter(*ctx.saved_tensors, grad, ctx.values.shape[0]), None


def _gather_sh_backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor | None]:
    sink = sink_of(ctx.values)
    if sink:
        rows, weights, basis = ctx.saved_tensors
        _scatter_sh_into(rows, weights, basis, grad, sink[0], sink[1])
        return None, None, None, None
    return None, None, None, _scatter_sh(*ctx.saved_tensors, grad, ctx.values.shape[0])


_locate = define(
    "voxel_locate(Tensor xg, SymInt[] shape, Tensor top, Tensor bricks, bool whole) -> (Tensor, Tensor)",
    _run_locate,
    lambda xg, *_: (xg.new_empty((xg.shape[0], 8), dtype=torch.int32), xg.new_empty((xg.shape[0], 8))),
)
_scatter = define(
    "voxel_scatter(Tensor rows, Tensor weights, Tensor grad, SymInt count) -> Tensor",
    _run_scatter,
    lambda rows, weights, grad, count: grad.new_empty(count, grad.shape[1]),
)
_scatter_sh = define(
    "voxel_scatter_sh(Tensor rows, Tensor weights, Tensor basis, Tensor grad, SymInt count) -> Tensor",
    _run_scatter_sh,
    lambda rows, weights, basis, grad, count: grad.new_empty(count, 3 * basis.shape[2]),
)
_gather = define(
    "voxel_gather(Tensor rows, Tensor weights, Tensor values, float fill) -> Tensor",
    _run_gather,
    lambda rows, weights, values, fill: values.new_empty(rows.shape[0], values.shape[1]),
    save=_save_values,
    backward=_gather_backward,
)
_gather_sh = define(
    "voxel_gather_sh(Tensor rows, Tensor weights, Tensor basis, Tensor sh) -> Tensor",
    _run_gather_sh,
    lambda rows, weights, basis, sh: sh.new_empty(basis.shape[0], basis.shape[1], 3),
    save=_save_sh,
    backward=_gather_sh_backward,
)
