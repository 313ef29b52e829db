"""The encoders of ``hybrid``: modules from ``x01`` [N, 3] in the unit cube of the box to [N, width]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pvdconvert.kernels.planes import PAIRS, vm_features
from pvdconvert.kernels.voxels import BrickMap, voxel_inside, voxel_interp
from pvdconvert.nn.frequency import frequency_encode
from pvdconvert.nn.hashgrid import HashGrid
from pvdconvert.nn.lines import CpLines
from pvdconvert.nn.planes import VectorMatrix
from pvdconvert.nn.voxels import Shape, SparseVoxels, cover, lattice_shape, lexicographic
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box
from pvdconvert_plugins.hybrid_spec import HybridOptions, grid_spec, sides

DENSE_START = 1 << 18
"""A fresh lattice of at most so many vertices starts full; a larger one starts empty, and ``restrict`` allocates it."""


def combine(parts: Sequence[Tensor], join: str) -> Tensor:
    """``parts`` [N, W_i] joined by concat (in their order), sum or product (of one width)."""
    if join == "concat":
        return torch.cat(list(parts), dim=1)
    out = parts[0]
    for part in parts[1:]:
        out = out + part if join == "sum" else out * part
    return out


class Vm(VectorMatrix):
    """TensoRF's products of planes and lines, component by component (arXiv 2203.09517, eq. 4)."""

    def forward(self, x01: Tensor) -> Tensor:
        return self.features(x01)


class Cp(CpLines):
    """TensoRF's products of three lines, component by component (arXiv 2203.09517, eq. 3)."""

    def forward(self, x01: Tensor) -> Tensor:
        return self.features(x01)


class Planes(nn.Module):
    """Three planes [n[b], n[a], C], channel-last, over the pairs of axes; what is read there is joined.

    product: K-Planes (arXiv 2301.10241, eq. 1); sum: tri-planes (arXiv 2112.07945, section 3).
    """

    def __init__(self, resolution: Sequence[int], channels: int, join: str, generator: torch.Generator) -> None:
        super().__init__()
        self.join, self.channels = join, channels
        self.planes = nn.ParameterList()
        for a, b in PAIRS:
            size = (resolution[b], resolution[a], channels)
            if join == "product":  # away from 0, where a product has no gradient (K-Planes' own range)
                plane = 0.1 + 0.4 * torch.rand(size, generator=generator)
            else:
                plane = 0.1 * torch.randn(size, generator=generator)
            self.planes.append(nn.Parameter(plane))

    def forward(self, x01: Tensor) -> Tensor:
        planes = list(self.planes)
        # The kernel multiplies each plane by a line; with lines of ones it just reads the planes.
        read = vm_features(x01, planes, [torch.ones_like(planes[0][:1, 0])] * 3)
        return combine(torch.split(read, self.channels, dim=1), self.join)


class Voxels(nn.Module):
    """Features on the existing vertices of a lattice, interpolated trilinearly; 0 in cells that are not complete.

    ``vertices`` int32 [V, 3], sorted x-major; ``features`` Parameter [V, C].
    """

    vertices: Tensor
    top: Tensor
    bricks: Tensor

    def __init__(self, box: Box, shape: Shape, channels: int, seed: int) -> None:
        super().__init__()
        self.box, self.shape, self.channels, self.seed = box, shape, channels, seed
        for name in ("vertices", "top", "bricks"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        if math.prod(shape) <= DENSE_START:
            zero = torch.zeros(1, 3, dtype=torch.long)
            self.allocate(cover(zero, torch.tensor([shape]) - 1, shape))
        else:
            self.allocate(torch.empty(0, 3, dtype=torch.int32))

    def assign(self, vertices: Tensor, features: Tensor) -> None:
        """Take these sorted vertices [V, 3] with their features [V, C]: a new parameter.

        Raises ValueError: unsorted, out of range, or listed twice.
        """
        key = lexicographic(vertices, self.shape)
        if bool((key[1:] <= key[:-1]).any()):
            raise ValueError("the vertices are not sorted x-major, or one is listed twice")
        grid = BrickMap.from_vertices(vertices, self.shape)
        self.vertices, self.top, self.bricks = vertices.int(), grid.top, grid.bricks
        self.features = nn.Parameter(features.float().contiguous())

    def allocate(self, vertices: Tensor) -> None:
        """Start afresh on these vertices, deterministic in the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        features = 0.01 * torch.randn(len(vertices), self.channels, generator=generator)
        self.assign(vertices, features.to(vertices.device))

    def restrict(self, occupancy: Occupancy) -> None:
        """Allocate the vertices of every cell that shares volume with an occupied one."""
        device = self.features.device
        low = occupancy.origin.to(device) + occupancy.grid.nonzero().to(device) * occupancy.cell
        lattice = SparseVoxels(self.box, self.shape, 1)
        self.allocate(lattice.touching(low, low + occupancy.cell))

    @property
    def grid(self) -> BrickMap:
        return BrickMap(self.shape, self.top, self.bricks)

    def coordinates(self, x01: Tensor) -> Tensor:
        """[N, 3] vertex units."""
        return x01 * (torch.tensor(self.shape, dtype=x01.dtype, device=x01.device) - 1)

    def inside(self, x01: Tensor) -> Tensor:
        """[N] bool: whether ``x01`` lies in a complete cell."""
        return voxel_inside(self.coordinates(x01), self.grid)

    def forward(self, x01: Tensor) -> Tensor:
        return voxel_interp(self.coordinates(x01), self.grid, self.features)


class Frequency(nn.Module):
    """Sines and cosines of the octaves of the position in [-1, 1] (Mildenhall et al. 2020, eq. 4); no parameters."""

    def __init__(self, frequencies: int, include_input: bool) -> None:
        super().__init__()
        self.frequencies, self.include_input = frequencies, include_input

    def forward(self, x01: Tensor) -> Tensor:
        return frequency_encode(2 * x01 - 1, self.frequencies, include_input=self.include_input)


def make(o: HybridOptions, box: Box, seed: int, generator: torch.Generator) -> nn.ModuleDict:
    """The encoders of the composition by name, in its order."""
    made: dict[str, nn.Module] = {}
    for name in o.names:
        if name == "hash":
            made[name] = HashGrid(grid_spec(o), generator=generator)
        elif name == "vm":
            made[name] = Vm(sides(box, o.vm_resolution), [o.vm_rank] * 3, generator=generator)
        elif name == "cp":
            made[name] = Cp(sides(box, o.cp_resolution), o.cp_rank, generator=generator)
        elif name == "planes":
            made[name] = Planes(sides(box, o.planes_resolution), o.planes_channels, o.planes_join, generator)
        elif name == "voxels":
            made[name] = Voxels(box, lattice_shape(box, o.voxels_resolution), o.voxels_channels, seed)
        else:
            made[name] = Frequency(o.frequencies, o.frequency_input)
    return nn.ModuleDict(made)
