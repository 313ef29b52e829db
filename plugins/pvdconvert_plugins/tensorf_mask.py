"""TensoRF's alphaMask: a volume of bits whose trilinear interpolation says where the program renders anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pvdconvert.errors import InputError
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box

MAX_VERTICES = 1 << 31
MAX_CELLS = 1 << 25
"""Most cells of the cubic grid that :meth:`AlphaMask.support` makes."""


class AlphaMask(nn.Module):
    """Vertices [nx, ny, nz] over ``box``, the outermost on its faces (layouts 3.4; ``align_corners=True``).

    The interpolated value is > 0 exactly inside of the cells that have a vertex set at some corner; beyond the faces
    the volume counts as 0, so cells reach one voxel further out. ``cells`` uint8 [nx + 1, ny + 1, nz + 1]: cell i lies
    between vertices i - 1 and i.
    """

    cells: Tensor
    low: Tensor
    spacing: Tensor

    def __init__(self, config: Mapping[str, Any], bits: Tensor) -> None:
        """``config`` {"shape": [nx, ny, nz], "box"}; ``bits`` uint8: axes z, y, x, big-endian bits, as in the file."""
        super().__init__()
        try:
            shape = [int(v) for v in config["shape"]]
            box = Box.from_json(config["box"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"config 'alpha_mask' is malformed: {error}") from error
        count = math.prod(shape)
        if len(shape) != 3 or min(shape) < 2 or count > MAX_VERTICES:
            raise InputError(f"config 'alpha_mask' has an impossible shape {shape}")
        if tuple(bits.shape) != ((count + 7) // 8,):
            raise InputError(f"'alphaMask.mask' is {list(bits.shape)} bytes, {shape} needs {[(count + 7) // 8]}")
        self.config = {"shape": shape, "box": box.to_json()}
        self.bits = bits.detach().cpu().to(torch.uint8).clone()
        volume = np.unpackbits(self.bits.numpy(), count=count).reshape(shape[::-1])
        grid = np.pad(volume.transpose(2, 1, 0), 1)
        for axis in range(3):
            first = grid.take(range(grid.shape[axis] - 1), axis)
            grid = first | grid.take(range(1, grid.shape[axis]), axis)
        self.register_buffer("cells", torch.from_numpy(np.ascontiguousarray(grid)), persistent=False)
        # As the program computes it, in float32: positions first, then vertices.
        low, high = torch.tensor(box.min), torch.tensor(box.max)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("spacing", (high - low) / (torch.tensor(shape) - 1), persistent=False)

    def inside(self, x: Tensor) -> Tensor:
        """[N] bool: whether the program renders ``x`` [N, 3] (world)."""
        i = torch.floor((x - self.low) / self.spacing).long() + 1
        shape = torch.tensor(self.cells.shape, device=x.device)
        within = ((i >= 0) & (i < shape)).all(-1)
        i = torch.where(within[:, None], i, 0)
        flat = (i[:, 0] * self.cells.shape[1] + i[:, 1]) * self.cells.shape[2] + i[:, 2]
        return within & (self.cells.view(-1)[flat] > 0)

    def support(self) -> Occupancy:
        """Cubic cells, of the shortest spacing if that is affordable, that cover every cell that is set."""
        spacing = self.spacing.double().cpu().numpy()
        origin = self.low.double().cpu().numpy() - spacing
        extent = spacing * np.array(self.cells.shape)
        side = max(float(spacing.min()), float((extent.prod() / MAX_CELLS) ** (1 / 3)))
        grid = self.cells.cpu().numpy()
        for axis in range(3):
            edges = np.arange(math.ceil(extent[axis] / side - 1e-6) + 1) * side / spacing[axis]
            # A hair wider than it should be: rounding must not lose a cell.
            first = np.clip(np.floor(edges[:-1] - 1e-4), 0, grid.shape[axis] - 1).astype(int)
            last = np.clip(np.ceil(edges[1:] + 1e-4), 1, grid.shape[axis]).astype(int)
            total = np.concatenate([np.zeros_like(grid.take([0], axis), np.int32), grid.cumsum(axis, np.int32)], axis)
            grid = (total.take(last, axis) > total.take(first, axis)).astype(np.uint8)
        device = self.cells.device
        low = torch.tensor(origin, dtype=torch.float32, device=device)
        return Occupancy(low, side, torch.from_numpy(np.ascontiguousarray(grid)).to(device))
