"""Seeing through fog that no camera can tell from the background.

A network trained on a white background is free to fill empty space with white: its own cameras cannot see it. Taken for
matter it bloats the box and wastes every student. A short scouting pass over pseudo-views finds the cells that show
something else than the background in some direction; occupancy is cut back to them and their surroundings.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pvdconvert.distill.store import Store
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.render.occupy import dilate, tight

SHOWN = 5e-3
"""Compositing weight from which a sample counts as seen."""

LIKE = 0.02
"""Largest difference from the background, over channels, of what is taken for it."""

MARGIN = 2
"""Cells kept around everything that was seen."""


@dataclasses.dataclass(frozen=True)
class Cleared:
    """Occupancy cut back to what shows; ``fog`` cells were seen and look like the background from every side."""

    occupancy: Occupancy
    fog: int
    unseen: int


def clear(store: Store) -> Cleared:
    """Cut ``store.occupancy`` back to the surroundings of the cells that show something.

    A cell is fog where each of its seen samples, in the direction it was seen from, has the backdrop's colour. Cells
    that no ray saw and that lie far from all that was seen (the inside of solids, hidden fog) go as well.
    """
    occupancy = store.occupancy
    index = occupancy.index(store.x)
    shape = torch.tensor(occupancy.grid.shape, device=index.device)
    inside = ((index >= 0) & (index < shape)).all(-1)
    seen = inside & (store.weight > SHOWN) & store.colored
    backdrop = torch.tensor(store.scene.backdrop, device=index.device)
    differs = seen & ((store.rgb - backdrop).abs().amax(1) > LIKE)
    visible, solid = _cells(occupancy, index[seen]), _cells(occupancy, index[differs])
    kept = dilate(solid, MARGIN) & occupancy.grid
    fog = int((visible & ~solid & ~kept & 1).sum())
    unseen = int((occupancy.grid & ~kept & 1).sum()) - fog
    return Cleared(tight(Occupancy(occupancy.origin, occupancy.cell, kept)), fog, unseen)


def _cells(occupancy: Occupancy, index: Tensor) -> Tensor:
    grid = torch.zeros_like(occupancy.grid)
    grid[index[:, 0], index[:, 1], index[:, 2]] = 1
    return grid
