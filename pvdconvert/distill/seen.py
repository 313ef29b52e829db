"""From where places were seen: directions in which a teacher's colours mean something.

From behind, through what lies before it, no picture ever showed a point; what a teacher answers there is chance, and a
student that must meet it has the less for what shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pvdconvert.distill.store import Store

FEWEST = 4
"""Directions that a cell must have for others to be drawn from them."""

KNOWN = 0.9
"""Share of what showed that must lie in cells with so many, or the cells grow."""

COARSEST = 8
"""Times that they may grow."""

MOST = 1 << 20
"""Directions that are kept."""


class Seen:
    """Directions of the rays that saw something, by cell.

    x, d   [N, 3] positions that showed, and unit directions of the rays that met them
    cell   edge of the cells within which places are seen from the same directions, world units
    """

    def __init__(self, x: Tensor, d: Tensor, cell: float) -> None:
        every = -(-len(x) // MOST) or 1
        x, d = x[::every], d[::every]
        self.cell = cell
        self.low = x.amin(0) if len(x) else torch.zeros(3, device=x.device)
        self.shape = ((x - self.low) / cell).long().amax(0) + 1 if len(x) else self.low.long()
        self.keys, order = self._keys(x).sort()
        self.d = d[order]

    @classmethod
    def of(cls, store: Store, weight: float, cell: float) -> Seen:
        """What the samples of ``store`` with at least this compositing weight were seen from, in cells of this size or
        twice, four times, ... as large: where most of the samples have enough others in theirs. The scene is bounded.
        """
        shown = (store.weight >= weight).nonzero().squeeze(1)
        x, d = store.x[shown], store.d[store.ray_of()[shown]]
        found = cls(x, d, cell)
        while len(x) and found.cell < COARSEST * cell and found.crowded < KNOWN:
            found = cls(x, d, 2 * found.cell)
        return found

    @property
    def crowded(self) -> float:
        """Share of the directions in whose cells there are enough."""
        _, counts = torch.unique_consecutive(self.keys, return_counts=True)
        return float(counts[counts >= FEWEST].sum()) / max(1, len(self.keys))

    def _keys(self, x: Tensor) -> Tensor:
        """[N] int64: the number of the cell, -1 outside."""
        i = torch.floor((x - self.low) / self.cell).long()
        inside = ((i >= 0) & (i < self.shape)).all(-1)
        return torch.where(inside, (i[:, 0] * self.shape[1] + i[:, 1]) * self.shape[2] + i[:, 2], -1)

    def draw(self, x: Tensor, count: int, generator: torch.Generator, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Unit directions [N, count, 3] that spread by ``spread`` [N] about some from which the cells of ``x`` [N, 3]
        were seen, and whether there were enough of those [N]: where not, they mean nothing."""
        u = torch.rand(len(x), count, generator=generator).to(x.device)
        turned = (spread[:, None, None] * torch.randn(len(x), count, 3, generator=generator)).to(x.device)
        if not len(self.d):
            return torch.nn.functional.normalize(turned, dim=-1), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        keys = self._keys(x)
        first, last = torch.searchsorted(self.keys, keys), torch.searchsorted(self.keys, keys, right=True)
        pick = first[:, None] + (u * (last - first)[:, None]).long()
        d = torch.nn.functional.normalize(self.d[pick.clamp_max(len(self.d) - 1)] + turned, dim=-1)
        return d, (keys >= 0) & (last - first >= FEWEST)
