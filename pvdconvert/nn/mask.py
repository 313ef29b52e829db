"""Cells outside of which a field is exactly zero: part of its function, stored with it as bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pvdconvert.errors import InputError

if TYPE_CHECKING:
    from pvdconvert.render.occupancy import Occupancy

MAX_CELLS = 1 << 31


class Mask(nn.Module):
    """Cubic cells of side ``cell`` (world) from ``origin``; ``grid`` uint8 [nx, ny, nz] is 1 inside.

    On disk: the C-order grid packed eight cells a byte, least significant bit first (``bits``), and a JSON object
    {"shape", "origin", "cell"}.
    """

    grid: Tensor

    def __init__(self, grid: Tensor, origin: tuple[float, float, float], cell: float) -> None:
        super().__init__()
        self.register_buffer("grid", grid.to(torch.uint8).contiguous(), persistent=False)
        self.origin = origin
        self.cell = float(cell)

    @classmethod
    def from_occupancy(cls, occupancy: Occupancy) -> Mask:
        x, y, z = (float(v) for v in occupancy.origin.double().cpu())
        return cls(occupancy.grid.clone(), (x, y, z), occupancy.cell)

    @classmethod
    def from_parts(cls, config: Mapping[str, Any], bits: Tensor) -> Mask:
        """The inverse of :meth:`to_config` and :attr:`bits`. Raises InputError where they do not fit each other.

        Nested cubes ({"halves", ...}) become a :class:`pvdconvert.nn.cascades.CascadedMask`.
        """
        if "halves" in config:
            from pvdconvert.nn.cascades import CascadedMask

            return CascadedMask.from_parts(config, bits)
        try:
            nx, ny, nz = (int(v) for v in config["shape"])
            x, y, z = (float(v) for v in config["origin"])
            cell = float(config["cell"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"config 'mask' is malformed: {error}") from error
        count = nx * ny * nz
        if min(nx, ny, nz) < 1 or count > MAX_CELLS or not cell > 0:
            raise InputError(f"config 'mask' has an impossible shape {[nx, ny, nz]} or cell {cell}")
        if bits.numel() != (count + 7) // 8:
            raise InputError(f"'mask.bits' holds {bits.numel()} bytes, {[nx, ny, nz]} needs {(count + 7) // 8}")
        raw = bits.detach().cpu().to(torch.uint8).numpy().reshape(-1)
        grid = np.unpackbits(raw, count=count, bitorder="little").reshape(nx, ny, nz)
        return cls(torch.from_numpy(grid), (x, y, z), cell)

    @property
    def bits(self) -> Tensor:
        """[ceil(cells / 8)] uint8."""
        return torch.from_numpy(np.packbits(self.grid.cpu().numpy().reshape(-1), bitorder="little"))

    def to_config(self) -> dict[str, Any]:
        return {"shape": list(self.grid.shape), "origin": list(self.origin), "cell": self.cell}

    def inside(self, x: Tensor) -> Tensor:
        """[N] bool: whether ``x`` [N, 3] (world) lies in a cell that is set."""
        origin = torch.tensor(self.origin, dtype=x.dtype, device=x.device)
        i = torch.floor((x - origin) / self.cell).long()
        shape = torch.tensor(self.grid.shape, device=x.device)
        within = ((i >= 0) & (i < shape)).all(-1)
        i = torch.where(within[:, None], i, 0)
        flat = (i[:, 0] * self.grid.shape[1] + i[:, 1]) * self.grid.shape[2] + i[:, 2]
        return within & (self.grid.view(-1)[flat] > 0)
