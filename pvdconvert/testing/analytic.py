"""A small scene in closed form: textured, shining blobs. A teacher that costs nothing and hides nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pvdconvert.field import RadianceField
from pvdconvert.plugin import TeacherFacts
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, Scene

BLOBS = (
    # centre, radius, density at the centre, base colour
    ((-0.25, -0.15, -0.20), 0.55, 40.0, (0.85, 0.35, 0.20)),
    ((0.40, 0.30, 0.10), 0.40, 60.0, (0.20, 0.55, 0.80)),
    ((0.05, -0.05, 0.50), 0.25, 80.0, (0.45, 0.75, 0.25)),
)


class AnalyticScene(RadianceField):
    """Three blobs in the cube [-1, 1]^3: density a (1 - r^2/R^2)^2, striped, with a highlight seen from +z."""

    flops_per_point = 200.0

    centers: Tensor
    radii: Tensor
    peaks: Tensor
    tints: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, column in (("centers", 0), ("radii", 1), ("peaks", 2), ("tints", 3)):
            self.register_buffer(name, torch.tensor([blob[column] for blob in BLOBS]), persistent=False)

    @property
    def scene(self) -> Scene:
        """A black backdrop and a box with room around the blobs."""
        return Scene(Box.cube(1.0), background=(0.0, 0.0, 0.0))

    def _blobs(self, x: Tensor) -> Tensor:
        """Density of each blob: [N, 3] -> [N, B]."""
        square = (x[:, None, :] - self.centers).square().sum(-1) / self.radii.square()
        return self.peaks * (1.0 - square).clamp_min(0.0).square()

    def encode(self, x: Tensor) -> Tensor:
        return x

    def density(self, latent: Tensor) -> Tensor:
        inside = (latent.abs() <= 1.0).all(-1)
        return torch.where(inside, self._blobs(latent).sum(-1), 0.0)

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        share = self._blobs(latent)
        share = (share + 1e-6) / (share + 1e-6).sum(-1, keepdim=True)
        stripes = 0.5 + 0.5 * torch.sin(12.0 * latent.sum(-1, keepdim=True))
        base = (share @ self.tints) * (0.6 + 0.4 * stripes)  # [N, 3]
        shine = (-d[..., 2]).clamp_min(0.0).square()  # [N, K]: rays that go down see light
        return base[:, None, :] * 0.75 + 0.25 * shine[..., None]

    def occupancy(self, cells: int = 24) -> Occupancy:
        """``cells``^3 cells over the box, those within half a cell's diagonal of a blob set."""
        side = 2.0 / cells
        axis = torch.arange(cells) * side - 1.0 + side / 2
        middle = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
        reach = self.radii + side * math.sqrt(3.0) / 2
        near = ((middle[..., None, :] - self.centers).norm(dim=-1) <= reach).any(-1)
        return Occupancy(torch.tensor([-1.0, -1.0, -1.0]), side, near.to(torch.uint8))

    def facts(self, occupancy: Occupancy | None = None) -> TeacherFacts:
        """What a planner is told about this scene."""
        occupancy = self.occupancy() if occupancy is None else occupancy
        surface = max(1, occupancy.count // 2)
        return TeacherFacts(self.scene, occupancy.box, occupancy.count, surface, occupancy.cell, occupancy=occupancy)
