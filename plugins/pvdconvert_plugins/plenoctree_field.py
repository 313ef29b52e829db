"""The field of PlenOctree: a tree whose leaves hold constant density and colour."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pvdconvert.field import RadianceField
from pvdconvert.kernels.octree import gather_rows, leaf_rows
from pvdconvert.nn.sh import sh_basis
from pvdconvert.nn.voxels import cover, lexicographic, live_relu, unravel
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.plenoctree_spec import PlenoctreeOptions

if TYPE_CHECKING:
    from pvdconvert.render.occupancy import Occupancy

DENSE_START = 32
"""A fresh tree of at most so many leaves along a side starts full; a larger one starts as a single empty node."""
START_THICKNESS = 0.01
"""Optical thickness of a leaf of a fresh field: nearly clear, yet with a gradient."""
SUPPORT_CELLS = 128


class PlenoctreeField(RadianceField):
    """Density and colour of the leaf that holds a point; the latent is the position itself.

    child    int32 [n, N, N, N], see :mod:`pvdconvert.kernels.octree`
    sigma    Parameter [n N^3, 1], before relu; of inner cells too, where it means nothing
    colour   Parameter [n N^3, 3 B], before the sigmoid
    open     bool [n N^3]: the leaves that a student may fill; None = every leaf
    """

    flops_per_point = 100.0

    child: Tensor
    offset: Tensor
    invradius: Tensor
    extra: Tensor
    open: Tensor | None

    def __init__(self, options: PlenoctreeOptions, scene: Scene, seed: int = 0) -> None:
        super().__init__()
        self.seed, self.scene_box = seed, scene.box
        offset, invradius = options.offset, options.invradius3
        if offset is None or invradius is None:
            offset, invradius = placed(scene.box, options)
        self.options = options
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.float32), persistent=False)
        self.register_buffer("invradius", torch.tensor(invradius, dtype=torch.float32), persistent=False)
        self.register_buffer("child", torch.zeros(1, *[options.branching] * 3, dtype=torch.int32), persistent=False)
        self.register_buffer("extra", torch.zeros(0), persistent=False)
        self.register_buffer("open", None, persistent=False)
        self.assign(self.child, torch.zeros(self.child.numel(), 3 * options.coefficients + 1))
        if lattice(options) <= DENSE_START:
            zero = torch.zeros(1, 3, dtype=torch.long)
            side = lattice(options)
            self.allocate(cover(zero, zero + side - 1, (side, side, side)))

    def assign(self, child: Tensor, data: Tensor, extra: Tensor | None = None) -> None:
        """Take this tree with its values [n N^3, 3 B + 1]. New parameters: make the optimiser afterwards."""
        self.child, self.open = child.int().contiguous(), None
        self.sigma = nn.Parameter(data[:, -1:].float().contiguous())
        self.colour = nn.Parameter(data[:, :-1].float().contiguous())
        if extra is not None:
            self.extra = extra.float()

    @property
    def leaf(self) -> float:
        """Mean side of a finest leaf, world units."""
        return float((1 / self.invradius.double()).mean()) / lattice(self.options)

    def allocate(self, leaves: Tensor) -> None:
        """A fresh tree that splits down to these finest leaves [L, 3]: nearly clear, deterministic in the seed."""
        side, n = self.options.branching, lattice(self.options)
        child, rows = grow(leaves.long(), n, side)
        width = 3 * self.options.coefficients
        generator = torch.Generator().manual_seed(self.seed)
        data = torch.zeros(child.numel(), width + 1, device=leaves.device)
        data[rows, :-1] = 0.01 * torch.randn(len(rows), width, generator=generator).to(leaves.device)
        data[rows, -1] = START_THICKNESS / self.leaf
        self.assign(child, data)
        self.open = torch.zeros(child.numel(), dtype=torch.bool, device=leaves.device)
        self.open[rows] = True

    def restrict(self, occupancy: Occupancy) -> None:
        """Split down to every finest leaf that shares volume with an occupied cell and lies within the scene's box."""
        n = lattice(self.options)
        low = occupancy.origin + occupancy.grid.nonzero() * occupancy.cell
        a, b = (self.unit(v).double() * n for v in (low, low + occupancy.cell))
        first, last = torch.floor(a + 1e-3).long(), torch.ceil(b - 1e-3).long() - 1
        keep = ((last >= 0) & (first < n) & (last >= first)).all(-1)
        leaves = cover(first[keep].clamp_min(0), last[keep].clamp_max(n - 1), (n, n, n))
        box = torch.tensor([self.scene_box.min, self.scene_box.max], device=leaves.device)
        inner = self.unit(box) * n
        held = ((leaves >= inner[0] - 1e-2) & (leaves + 1 <= inner[1] + 1e-2)).all(-1)
        self.allocate(leaves[held])

    def unit(self, x: Tensor) -> Tensor:
        """World -> the tree's unit cube."""
        return self.offset + x * self.invradius

    def rows(self, x: Tensor) -> Tensor:
        """int64 [N]: the leaf's row, -1 where nothing is held."""
        rows = leaf_rows(self.unit(x), self.child)
        if self.open is None:
            return rows
        return torch.where(self.open[rows.clamp_min(0)], rows, -1)

    def centers(self) -> tuple[Tensor, Tensor]:
        """(world positions [L, 3], rows int64 [L]) of the open leaves, all of the finest level."""
        side, n = self.options.branching, lattice(self.options)
        level, corner = self.child.new_zeros(1).long(), self.child.new_zeros(1, 3).long()
        steps = unravel(torch.arange(side**3, device=self.child.device), (side, side, side)).long()
        flat, wide = self.child.reshape(len(self.child), -1), side
        while wide < n:
            link = flat[level].long()
            corner = (corner[:, None] * side + steps)[link != 0]
            level, wide = (level[:, None] + link)[link != 0], wide * side
        rows = level[:, None] * side**3 + torch.arange(side**3, device=level.device)
        place = corner[:, None] * side + steps
        keep = torch.ones_like(rows, dtype=torch.bool) if self.open is None else self.open[rows]
        x = ((place[keep].double() + 0.5) / n - self.offset.double()) / self.invradius.double()
        return x.float(), rows[keep]

    def support(self) -> Occupancy | None:
        """The leaves that can be dense, on a grid of at most 128 cells a side; None where the tree is no cube."""
        from pvdconvert.render.occupancy import Occupancy

        size = 1 / self.invradius.double()
        if float(size.max()) > 1.0001 * float(size.min()):
            return None
        side, n = self.options.branching, self.options.branching
        while n * side <= SUPPORT_CELLS:
            n *= side
        grid = torch.zeros(n, n, n, dtype=torch.uint8, device=self.child.device)
        held = (self.sigma.detach()[:, 0] > 0) if self.open is None else self.open
        level = torch.zeros(1, dtype=torch.int64, device=grid.device)
        corner = torch.zeros(1, 3, dtype=torch.int64, device=grid.device)
        flat, cells, wide = self.child.reshape(len(self.child), -1), side**3, side
        steps = unravel(torch.arange(cells, device=grid.device), (side, side, side)).long()
        while len(level):  # a cell of this level is 1 / wide of the cube; ``corner`` counts such cells
            link = flat[level].long()
            place = corner[:, None] * side + steps
            full = (link == 0) & held.view(-1, cells)[level]
            coarse = min(n, wide)
            marks = torch.zeros(coarse, coarse, coarse, dtype=torch.uint8, device=grid.device)
            p = torch.div(place[full] * coarse, wide, rounding_mode="floor")
            marks[p[:, 0], p[:, 1], p[:, 2]] = 1
            for axis in range(3):
                marks = marks.repeat_interleave(n // coarse, axis)
            grid |= marks
            level, corner = (level[:, None] + link)[link != 0], place[link != 0]
            wide *= side
        origin = -self.offset.double() / self.invradius.double()
        return Occupancy(origin.float(), float(size.mean()) / n, grid)

    def encode(self, x: Tensor) -> Tensor:
        return x

    def density(self, latent: Tensor) -> Tensor:
        return live_relu(gather_rows(self.sigma, self.rows(latent))[:, 0])

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        raw = gather_rows(self.colour, self.rows(latent)).view(len(latent), 3, self.options.coefficients)
        return torch.sigmoid(torch.einsum("nkb,ncb->nkc", self.basis(d), raw))

    def basis(self, d: Tensor) -> Tensor:
        """[..., B] at unit directions [..., 3] (layouts 4.2)."""
        count, kind, e = self.options.coefficients, self.options.kind, self.extra
        if kind == "RGBA":
            return torch.ones_like(d[..., :1])
        if kind == "SH":
            return sh_basis(d, math.isqrt(count))
        if kind == "SG":
            return torch.exp(e[:, 0] * (d @ e[:, 1:4].T - 1)) / count
        x, y, z = (d @ e[:, k : k + 3].T for k in (2, 5, 8))
        return z * torch.exp(-e[:, 0] * x * x - e[:, 1] * y * y) / count


def lattice(options: PlenoctreeOptions) -> int:
    """Finest leaves along a side of the tree's cube: the power of the branching that holds ``resolution``."""
    n = options.branching
    while n < options.resolution:
        n *= options.branching
    return n


Vec3 = tuple[float, float, float]


def placed(box: Box, options: PlenoctreeOptions) -> tuple[Vec3, Vec3]:
    """(offset, invradius3) of the cube whose finest leaves lie ``resolution`` to the longest side of ``box``.

    It begins at the box's lower corner, so that leaves and box share their faces there.
    """
    side = box.longest / options.resolution * lattice(options)
    x, y, z = (-v / side for v in box.min)
    return (x, y, z), (1 / side, 1 / side, 1 / side)


def grow(leaves: Tensor, n: int, side: int) -> tuple[Tensor, Tensor]:
    """(child [m, N, N, N], rows [L]) of the smallest tree over ``n``^3 cells that splits down to ``leaves`` [L, 3]."""
    levels: list[Tensor] = []  # keys of the nodes, finest first
    v, wide = leaves, n
    while wide > 1:
        v, wide = torch.div(v, side, rounding_mode="floor"), wide // side
        key = torch.unique(lexicographic(v, (wide, wide, wide)))
        levels.append(key)
        v = unravel(key, (wide, wide, wide)).long()
    levels = [k if len(k) else k.new_zeros(1) for k in levels[-1:]] + levels[-2::-1]
    starts = [0]
    for keys in levels:
        starts.append(starts[-1] + len(keys))
    child = torch.zeros(starts[-1], side**3, dtype=torch.int32, device=leaves.device)
    wide = 1
    for depth in range(1, len(levels)):
        wide *= side
        v = unravel(levels[depth], (wide, wide, wide)).long()
        parent, cell = _hang(v, levels[depth - 1], wide, side)
        mine = starts[depth] + torch.arange(len(v), device=leaves.device)
        child[starts[depth - 1] + parent, cell] = (mine - starts[depth - 1] - parent).int()
    parent, cell = _hang(leaves, levels[-1], n, side)
    return child.view(-1, side, side, side), (starts[-2] + parent) * side**3 + cell


def _hang(v: Tensor, parents: Tensor, wide: int, side: int) -> tuple[Tensor, Tensor]:
    """Which of ``parents`` (sorted keys) cells ``v`` of a lattice ``wide`` hang on, and as which of its cells."""
    up = torch.div(v, side, rounding_mode="floor")
    w = wide // side
    return torch.searchsorted(parents, lexicographic(up, (w, w, w))), lexicographic(v - up * side, (side, side, side))
