"""Sparse voxels with values on their vertices: density and spherical-harmonic coefficients, interpolated trilinearly.

Memory goes with the vertices that exist, plus 4 bytes for each 8^3 vertices of the lattice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pvdconvert.kernels.voxels import BRICK, BrickMap, Missing, voxel_inside, voxel_interp, voxel_sh_color
from pvdconvert.scene import Box

Shape = tuple[int, int, int]
LOG_MAX = 15.0


class _TruncExp(torch.autograd.Function):
    """exp that cannot overflow; its gradient stays alive at and beyond the cut (torch-ngp's trunc_exp)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.exp(x.clamp(max=LOG_MAX))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * torch.exp(x.clamp(max=LOG_MAX))


def trunc_exp(x: Tensor) -> Tensor:
    """exp(min(x, 15)), with the gradient exp(min(x, 15)) everywhere; exactly 0 at -inf."""
    out: Tensor = _TruncExp.apply(x)  # type: ignore[no-untyped-call]
    return out


class _LiveRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where((x > 0) | (g < 0), g, 0.0)


def live_relu(x: Tensor) -> Tensor:
    """max(x, 0), whose gradient below 0 stays alive where it would raise x: a density that fell to 0 can come back."""
    out: Tensor = _LiveRelu.apply(x)  # type: ignore[no-untyped-call]
    return out


def lattice_shape(box: Box, resolution: int) -> Shape:
    """Vertices along x, y, z: ``resolution`` along the longest side of ``box``, cells as near to cubes as whole counts
    allow; the outer vertices lie on the faces of the box."""
    cell = box.longest / (resolution - 1)
    x, y, z = (max(2, round(s / cell) + 1) for s in box.size)
    return (x, y, z)


def lexicographic(vertices: Tensor, shape: Shape) -> Tensor:
    """int64 [V]: the place of each vertex [V, 3] in x-major order over the whole lattice."""
    v = vertices.long()
    return (v[:, 0] * shape[1] + v[:, 1]) * shape[2] + v[:, 2]


def unravel(key: Tensor, shape: Shape) -> Tensor:
    """The inverse of :func:`lexicographic`: [V, 3] int32."""
    yz = shape[1] * shape[2]
    x = torch.div(key, yz, rounding_mode="floor")
    y = torch.div(key - x * yz, shape[2], rounding_mode="floor")
    return torch.stack([x, y, key - x * yz - y * shape[2]], -1).int()


def cover(low: Tensor, high: Tensor, shape: Shape, side: int = BRICK) -> Tensor:
    """Sorted vertices int32 [V, 3] of all ranges ``low[i] .. high[i]`` ([M, 3], ends included, inside the lattice).

    Works brick by brick: memory goes with the result, not with the lattice.
    """
    low, high = low.long(), high.long()
    if not len(low):
        return torch.empty(0, 3, dtype=torch.int32, device=low.device)
    if len(low) > math.prod(shape):  # a coarse lattice under fine cells: most ranges are the same
        both = torch.unique(lexicographic(low, shape) * math.prod(shape) + lexicographic(high, shape))
        low = unravel(torch.div(both, math.prod(shape), rounding_mode="floor"), shape).long()
        high = unravel(both % math.prod(shape), shape).long()
    tops = tuple(-(-n // side) for n in shape)
    bricks = _keys(
        torch.div(low, side, rounding_mode="floor"), torch.div(high, side, rounding_mode="floor"), (tops[1], tops[2])
    )
    ids = torch.unique(torch.cat(list(bricks)))
    top = torch.full((tops[0] * tops[1] * tops[2],), -1, dtype=torch.int32, device=low.device)
    top[ids] = torch.arange(len(ids), dtype=torch.int32, device=low.device)
    marks = torch.zeros(len(ids) * side**3, dtype=torch.bool, device=low.device)
    for v in _steps(low, high):
        b = torch.div(v, side, rounding_mode="floor")
        r = v - b * side
        brick = top[(b[:, 0] * tops[1] + b[:, 1]) * tops[2] + b[:, 2]].long()
        marks[((brick * side + r[:, 0]) * side + r[:, 1]) * side + r[:, 2]] = True
    where = marks.nonzero().squeeze(1)
    brick = torch.div(where, side**3, rounding_mode="floor")
    base = unravel(ids[brick], (tops[0], tops[1], tops[2])) * side
    inner = unravel(where - brick * side**3, (side, side, side))
    return unravel(lexicographic(base + inner, shape).sort().values, shape)


def count_touched(box: Box, shape: Shape, origin: Tensor, cell: float, grid: Tensor, *, cells: bool = False) -> int:
    """How many vertices of a lattice ``shape`` over ``box`` the occupied cells touch (:meth:`SparseVoxels.touching`).

    With ``cells``: how many of the lattice's own cells share volume with an occupied one.
    The cells are cubes of side ``cell`` from ``origin`` [3]; ``grid`` [a, b, c] is non-zero where one is occupied.
    Nothing is allocated: vertices that see the same range of cells along an axis are counted together.
    """
    held, weights = grid != 0, []
    for axis in range(3):
        low = float(origin[axis]) + cell * torch.arange(grid.shape[axis], dtype=torch.float64, device=grid.device)
        a, b = _reach(low, low + cell, box.min[axis], (shape[axis] - 1) / box.size[axis])
        keep = ((b > 0) & (a < shape[axis] - 1)).nonzero().squeeze(1)
        if not len(keep):
            return 0
        x = torch.arange(shape[axis] - cells, device=grid.device)
        b = b - 1 if cells else b
        first = torch.searchsorted(b, x).clamp_min(int(keep[0]))
        last = (torch.searchsorted(a, x, right=True) - 1).clamp_max(int(keep[-1]))
        ranges, count = torch.unique(torch.stack([first, last + 1])[:, last >= first], dim=1, return_counts=True)
        weights.append(count)
        total = torch.nn.functional.pad(torch.cumsum(held.movedim(axis, 0), 0, dtype=torch.int32), (0, 0, 0, 0, 1, 0))
        held = (total[ranges[1]] > total[ranges[0]]).movedim(0, axis)
    x, y, z = weights
    return int((((held * z).sum(2) * y).sum(1) * x).sum())


def _reach(low: Tensor, high: Tensor, origin: float, per_unit: float) -> tuple[Tensor, Tensor]:
    """First and last vertex along an axis of the lattice cells that share length with ``low[i] .. high[i]``."""
    slack = 1e-3  # of a cell: lattices that coincide stay apart by rounding only
    a = torch.floor((low.double() - origin) * per_unit + slack).long()
    return a, torch.ceil((high.double() - origin) * per_unit - slack).long()


def _steps(low: Tensor, high: Tensor) -> Any:
    span = (high - low).amax(0).tolist()
    for x in range(span[0] + 1):
        for y in range(span[1] + 1):
            for z in range(span[2] + 1):
                yield torch.minimum(low + torch.tensor([x, y, z], device=low.device), high)


def _keys(low: Tensor, high: Tensor, strides: tuple[int, int]) -> Any:
    for v in _steps(low, high):
        yield torch.unique((v[:, 0] * strides[0] + v[:, 1]) * strides[1] + v[:, 2])


class SparseVoxels(nn.Module):
    """Values on the existing vertices of a lattice over ``box``.

    shape      vertices along x, y, z; the outer ones lie on the faces of the box
    vertices   int32 [V, 3], sorted x-major: row r of the values belongs to vertices[r]
    density    Parameter [V, 1], before activation
    sh         Parameter [V, 3 * bands^2], before activation; all of red, then green, then blue (svox2's order)
    missing    see :data:`pvdconvert.kernels.voxels.Missing`
    """

    vertices: Tensor
    top: Tensor
    bricks: Tensor
    origin: Tensor
    per_unit: Tensor

    def __init__(self, box: Box, shape: Shape, bands: int, missing: Missing = "cell") -> None:
        super().__init__()
        self.box, self.shape, self.bands, self.missing = box, shape, bands, missing
        steps = [(n - 1) / s for n, s in zip(shape, box.size)]
        self.register_buffer("origin", torch.tensor(box.min, dtype=torch.float32), persistent=False)
        self.register_buffer("per_unit", torch.tensor(steps, dtype=torch.float32), persistent=False)
        for name in ("vertices", "top", "bricks"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        empty = torch.empty(0, 3, dtype=torch.int32)
        self.assign(empty, torch.empty(0, 1), torch.empty(0, 3 * bands**2))

    @property
    def cell(self) -> tuple[float, float, float]:
        """Sides of a cell, world units."""
        x, y, z = (s / (n - 1) for n, s in zip(self.shape, self.box.size))
        return (x, y, z)

    @property
    def grid(self) -> BrickMap:
        return BrickMap(self.shape, self.top, self.bricks)

    def assign(self, vertices: Tensor, density: Tensor, sh: Tensor) -> None:
        """Take these sorted vertices [V, 3] with their values. New parameters: make the optimiser afterwards.

        Raises ValueError: unsorted, out of range, or listed twice.
        """
        key = lexicographic(vertices, self.shape)
        if bool((key[1:] <= key[:-1]).any()):
            raise ValueError("the vertices are not sorted x-major, or one is listed twice")
        grid = BrickMap.from_vertices(vertices, self.shape)
        self.vertices, self.top, self.bricks = vertices.int(), grid.top, grid.bricks
        self.density = nn.Parameter(density.float().contiguous())
        self.sh = nn.Parameter(sh.float().contiguous())

    def coordinates(self, x: Tensor) -> Tensor:
        """World [N, 3] -> vertex units [N, 3]."""
        xg = (x - self.origin) * self.per_unit
        if self.missing == "zero":
            # svox2 extends the border values to the faces of its box (layouts 4.1); the field clips to that box.
            xg = torch.minimum(xg.clamp_min(0), torch.tensor(self.shape, dtype=xg.dtype, device=xg.device) - 1)
        return xg

    def positions(self, vertices: Tensor | None = None) -> Tensor:
        """World positions [V, 3] of ``vertices`` (default: all)."""
        v = self.vertices if vertices is None else vertices
        return self.origin + v.to(self.origin.dtype) / self.per_unit

    def inside(self, x: Tensor) -> Tensor:
        """bool [N]: whether ``x`` lies in a complete cell."""
        return voxel_inside(self.coordinates(x), self.grid)

    def raw_density(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[N], before activation; ``fill`` where nothing is stored."""
        return voxel_interp(self.coordinates(x), self.grid, self.density, self.missing, fill).squeeze(1)

    def raw_color(self, x: Tensor, basis: Tensor) -> Tensor:
        """[N, K, 3], before activation; ``basis`` [N, K, bands^2] of the directions."""
        return voxel_sh_color(self.coordinates(x), basis, self.grid, self.sh, self.missing)

    def touching(self, low: Tensor, high: Tensor) -> Tensor:
        """Sorted vertices of every cell that shares volume with a world box ``low[i] .. high[i]`` ([M, 3] each)."""
        last = torch.tensor(self.shape, device=low.device) - 1
        pairs = [
            _reach(low[:, k], high[:, k], self.box.min[k], (self.shape[k] - 1) / self.box.size[k]) for k in range(3)
        ]
        a, b = torch.stack([p for p, _ in pairs], -1), torch.stack([q for _, q in pairs], -1)
        keep = ((b > 0) & (a < last)).all(-1)
        return cover(a[keep].clamp_min(0), torch.minimum(b[keep], last), self.shape)

    def cells(self) -> Tensor:
        """int32 [C, 3]: the lower corners of the complete cells."""
        if not len(self.vertices):
            return self.vertices
        grid, parts = self.grid, []
        for v in torch.split(self.vertices, 1 << 19):
            whole = torch.ones(len(v), dtype=torch.bool, device=v.device)
            for c in range(8):
                whole &= grid.rows(v + v.new_tensor([c >> 2 & 1, c >> 1 & 1, c & 1])) >= 0
            parts.append(v[whole])
        return torch.cat(parts)

    def resample(self, read: Callable[[Tensor], Tensor], chunk: int = 1 << 18) -> Tensor:
        """``read(x)`` at all vertex positions, chunk by chunk."""
        return torch.cat([read(x) for x in torch.split(self.positions(), chunk)])
