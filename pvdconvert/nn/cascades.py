"""Masks of nested cubes, fine in the middle and coarse outside: the density grids of Instant-NGP and its relatives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvdconvert.errors import InputError
from pvdconvert.nn.mask import MAX_CELLS, Mask

MAX_COVER = 256
"""Cells along an axis of the uniform grid that stands for the cubes."""


class CascadedMask(Mask):
    """Cubes of half sides ``halves`` (ascending, world) around ``center``, each cut into n^3 cells; a point is looked
    up in the smallest cube that contains it (layouts sections 1.6 and 8.4).

    ``cascades`` uint8 [C, n, n, n]. ``grid`` (with ``origin`` and ``cell``) is a uniform grid that covers all that is
    set, for those who ask where the field may be non-empty. On disk: C-order cascades, eight cells a byte, least
    significant bit first, and {"shape": [C, n, n, n], "center": [x, y, z], "halves": [...]}.
    """

    cascades: Tensor

    def __init__(self, cascades: Tensor, center: tuple[float, float, float], halves: tuple[float, ...]) -> None:
        n, outer = cascades.shape[1], halves[-1]
        size = n
        while size * 2 <= MAX_COVER and n * outer > size * halves[0]:
            size *= 2
        cover = np.zeros((size,) * 3, bool)
        for cube, half in zip(cascades.cpu().numpy(), halves):
            cover |= _cover(cube.astype(bool), half, outer, size)
        x, y, z = (c - outer for c in center)
        super().__init__(torch.from_numpy(cover), (x, y, z), 2 * outer / size)
        self.register_buffer("cascades", cascades.to(torch.uint8).contiguous(), persistent=False)
        self.center, self.halves = center, halves

    @classmethod
    def from_parts(cls, config: Mapping[str, Any], bits: Tensor) -> CascadedMask:
        """The inverse of :meth:`to_config` and :attr:`bits`. Raises InputError where they do not fit each other."""
        try:
            count, *sides = (int(v) for v in config["shape"])
            x, y, z = (float(v) for v in config["center"])
            halves = tuple(float(v) for v in config["halves"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"config 'mask' is malformed: {error}") from error
        if len(sides) != 3 or len(set(sides)) != 1 or sides[0] < 1 or len(halves) != count:
            raise InputError(f"config 'mask' has the impossible shape {[count, *sides]} for {len(halves)} cubes")
        if not 0 < halves[0] < math.inf or not all(a < b < math.inf for a, b in itertools.pairwise(halves)):
            raise InputError(f"config 'mask': half sides {list(halves)} do not ascend from above 0")
        cells = count * math.prod(sides)
        if cells > MAX_CELLS or bits.numel() != (cells + 7) // 8:
            raise InputError(f"'mask.bits' holds {bits.numel()} bytes, {[count, *sides]} needs {(cells + 7) // 8}")
        raw = bits.detach().cpu().to(torch.uint8).numpy().reshape(-1)
        grid = np.unpackbits(raw, count=cells, bitorder="little").reshape(count, *sides)
        return cls(torch.from_numpy(grid), (x, y, z), halves)

    @property
    def bits(self) -> Tensor:
        return torch.from_numpy(np.packbits(self.cascades.cpu().numpy().reshape(-1), bitorder="little"))

    def to_config(self) -> dict[str, Any]:
        return {"shape": list(self.cascades.shape), "center": list(self.center), "halves": list(self.halves)}

    def inside(self, x: Tensor) -> Tensor:
        n = self.cascades.shape[1]
        p = x - torch.tensor(self.center, dtype=x.dtype, device=x.device)
        halves = torch.tensor(self.halves, dtype=x.dtype, device=x.device)
        level = (p.abs().amax(-1)[:, None] >= halves[:-1]).sum(-1)
        i = torch.floor((p / halves[level][:, None] + 1) * (0.5 * n)).long()
        within = ((i >= 0) & (i < n)).all(-1)
        i = torch.where(within[:, None], i, 0)
        flat = ((level * n + i[:, 0]) * n + i[:, 1]) * n + i[:, 2]
        return within & (self.cascades.view(-1)[flat] > 0)


def _cover(cube: NDArray[np.bool_], half: float, outer: float, size: int) -> NDArray[np.bool_]:
    """Cells of the outer cube's uniform grid, [size] along an axis, that a set cell of ``cube`` reaches into."""
    n = len(cube)
    edges = ((np.arange(size + 1) * (2 * outer / size) - outer) / half + 1) * (0.5 * n)
    first = np.clip(np.floor(edges[:-1] + 1e-6), 0, n).astype(int)
    last = np.clip(np.ceil(edges[1:] - 1e-6), 0, n).astype(int)
    out = cube
    for axis in range(3):
        # How many are set before each edge: a difference says whether any is between two.
        before = np.insert(out.cumsum(axis, dtype=np.int32), 0, 0, axis)
        out = before.take(np.maximum(first, last), axis) > before.take(first, axis)
    return out
