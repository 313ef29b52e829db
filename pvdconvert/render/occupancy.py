"""Our own grid of cells worth evaluating."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pvdconvert.scene import Box

CHUNK = 1 << 20
"""Points looked up at a time: their indices take many times their own memory."""


@dataclasses.dataclass
class Occupancy:
    """Cubic cells of side ``cell`` from ``origin`` [3] (world); ``grid`` uint8 [nx, ny, nz] is 1 where occupied."""

    origin: Tensor
    cell: float
    grid: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        x, y, z = self.grid.shape
        return (x, y, z)

    @property
    def count(self) -> int:
        """Occupied cells."""
        return int(self.grid.sum())

    def span(self) -> tuple[Tensor, Tensor]:
        """int64 [3] each: the first occupied cell along each axis, and the one after the last (all if there are none).

        By axis, not by cell: a list of the cells of a full 256^3 grid would take 400 MB.
        """
        filled = self.grid > 0
        low, high = torch.zeros(3, dtype=torch.long), torch.tensor(self.grid.shape)
        for axis in range(3):
            there = filled.movedim(axis, 0).flatten(1).any(1).nonzero().squeeze(1)
            if len(there):
                low[axis], high[axis] = there[0], there[-1] + 1
        return low, high

    @property
    def box(self) -> Box:
        """The tight box of the occupied cells (of the whole grid if there are none)."""
        low, high = self.span()
        lo = self.origin.cpu().double() + low.cpu().double() * self.cell
        hi = self.origin.cpu().double() + high.cpu().double() * self.cell
        return Box(tuple(lo.tolist()), tuple(hi.tolist()))

    def index(self, x: Tensor) -> Tensor:
        """[N, 3] int64 cell of ``x`` [N, 3]; may lie outside of the grid."""
        return torch.floor((x - self.origin) / self.cell).long()

    def contains(self, x: Tensor) -> Tensor:
        """[N] bool: whether ``x`` [N, 3] lies in an occupied cell."""
        if len(x) > CHUNK:
            return torch.cat([self.contains(part) for part in torch.split(x, CHUNK)])
        i = self.index(x)
        shape = torch.tensor(self.grid.shape, device=x.device)
        inside = ((i >= 0) & (i < shape)).all(-1)
        i = torch.where(inside[:, None], i, 0)
        return inside & (self.grid[i[:, 0], i[:, 1], i[:, 2]] > 0)

    def centers(self) -> Tensor:
        """[count, 3] centres of the occupied cells, world."""
        return self.origin + (self.grid.nonzero().to(self.origin.dtype) + 0.5) * self.cell
