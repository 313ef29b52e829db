"""The field of Plenoxels: sparse voxels whose vertices hold density and spherical-harmonic colour."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from pvdconvert.field import RadianceField
from pvdconvert.nn.clipped import clipped_exp
from pvdconvert.nn.sh import sh_basis
from pvdconvert.nn.voxels import Shape, SparseVoxels, cover, lattice_shape, live_relu, trunc_exp
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.plenoxels_spec import PlenoxelsOptions

if TYPE_CHECKING:
    from pvdconvert.render.occupancy import Occupancy

DENSE_START = 1 << 18
"""A fresh lattice of at most so many vertices starts full; a larger one starts empty, and ``restrict`` allocates it."""
START_THICKNESS = 0.01
"""Optical thickness of a cell of a fresh field: nearly clear, yet with a gradient."""
SUPPORT_CELLS = 128


class PlenoxelsField(RadianceField):
    """Density and colour by trilinear interpolation; the latent is the position itself."""

    flops_per_point = 100.0
    batch_sides = 6  # the rows of eight vertices are what costs

    def __init__(self, options: PlenoxelsOptions, scene: Scene, seed: int = 0) -> None:
        super().__init__()
        self.options, self.seed = options, seed
        box = Box.from_json(options.box) if options.box is not None else scene.box
        shape = options.shape or lattice_shape(box, options.resolution)
        self.voxels = SparseVoxels(box, shape, options.bands, cast(Literal["cell", "zero"], options.missing))
        self.clip = _within(scene.box, grown(box, shape)) if options.missing == "zero" else None
        if math.prod(shape) <= DENSE_START:
            zero = torch.zeros(1, 3, dtype=torch.long)
            self.allocate(cover(zero, torch.tensor([shape]) - 1, shape))

    def allocate(self, vertices: Tensor) -> None:
        """Start afresh on these vertices: nearly clear and grey, deterministic in the seed."""
        thin = START_THICKNESS / (sum(self.voxels.cell) / 3) / self.options.density_scale
        start = math.log(thin) if self.options.density_activation == "exp" else thin
        generator = torch.Generator().manual_seed(self.seed)
        sh = 0.01 * torch.randn(len(vertices), 3 * self.options.bands**2, generator=generator)
        self.voxels.assign(
            vertices, torch.full((len(vertices), 1), start, device=vertices.device), sh.to(vertices.device)
        )

    def restrict(self, occupancy: Occupancy) -> None:
        """Allocate the vertices of every cell that shares volume with an occupied one. Makes new parameters."""
        device = self.voxels.origin.device
        low = occupancy.origin.to(device) + occupancy.grid.nonzero().to(device) * occupancy.cell
        self.allocate(self.voxels.touching(low, low + occupancy.cell))

    def support(self) -> Occupancy | None:
        """Cells that can be dense, gathered into cubes so that the grid stays within 128 along the longest side."""
        from pvdconvert.render.occupancy import Occupancy

        if self.mask is not None:
            return super().support()
        v = self.voxels
        cell = v.cell
        if max(cell) > min(cell) * 1.0001:
            return None
        if v.missing == "cell":
            index, count, first = v.cells().long(), [n - 1 for n in v.shape], 0
        else:  # every cell at a vertex of positive density, and half a cell around the lattice
            index, count, first = v.vertices[v.density.detach()[:, 0] > 0].long(), [n + 1 for n in v.shape], 1
        group = -(-max(count) // SUPPORT_CELLS)
        grid = torch.zeros([-(-n // group) for n in count], dtype=torch.uint8, device=v.origin.device)
        for c in range(8 if first else 1):
            i = torch.div(index + index.new_tensor([c >> 2 & 1, c >> 1 & 1, c & 1]), group, rounding_mode="floor")
            grid[i[:, 0], i[:, 1], i[:, 2]] = 1
        return Occupancy(v.origin - first * max(cell), group * max(cell), grid)

    def encode(self, x: Tensor) -> Tensor:
        return x

    def density(self, latent: Tensor) -> Tensor:
        if self.options.density_activation == "exp":
            raw = self.voxels.raw_density(latent, fill=-math.inf)
            if self.options.density_clip is None:
                sigma = trunc_exp(raw)
            else:
                sigma = torch.where(raw > -math.inf, clipped_exp(raw, *self.options.density_clip), 0.0)
        else:
            sigma = live_relu(self.voxels.raw_density(latent))
        if self.clip is not None:
            low, high = latent.new_tensor(self.clip.min), latent.new_tensor(self.clip.max)
            sigma = torch.where(((latent >= low) & (latent <= high)).all(-1), sigma, 0.0)
        if self.mask is not None:
            sigma = torch.where(self.mask.inside(latent), sigma, 0.0)
        return sigma * self.options.density_scale if self.options.density_scale != 1.0 else sigma

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        raw = self.voxels.raw_color(latent, sh_basis(d, self.options.bands))
        return torch.sigmoid(raw) if self.options.color_activation == "sigmoid" else (raw + 0.5).clamp_min(0.0)


def grown(box: Box, shape: Shape) -> Box:
    """``box`` between the outer vertices with half a cell around it: svox2's own box."""
    half = [0.5 * s / (n - 1) for s, n in zip(box.size, shape)]
    x, y, z = ((a - h, b + h) for a, b, h in zip(box.min, box.max, half))
    return Box((x[0], y[0], z[0]), (x[1], y[1], z[1]))


def _within(a: Box, b: Box) -> Box:
    """What two boxes share; ``a`` where that is nothing."""
    low = [max(p, q) for p, q in zip(a.min, b.min)]
    high = [min(p, q) for p, q in zip(a.max, b.max)]
    if not all(p < q for p, q in zip(low, high)):
        return a
    return Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))
