"""A coarse field of voxels that finds out where the scene is, before an architecture is planned and built on it.

A dense lattice learns its geometry from pictures faster than anything else (Sun et al. 2022, section 4: "coarse
geometry searching"); its densities are exponentials and its colours do not depend on the view.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pvdconvert.field import RadianceField
from pvdconvert.nn.voxels import SparseVoxels, lattice_shape, trunc_exp, unravel
from pvdconvert.plugin import ArchitectureBase, Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Scene

RESOLUTION = 72
"""Vertices along the longest side of the box."""
START_THICKNESS = 0.01
SPARSE = 1e-3
"""Weight of the mean opacity of a cell, over all: what no picture asks for fades."""
VERTICES = 1 << 13
"""Vertices that the regulariser looks at in a step."""


class ScoutField(RadianceField):
    """Density and colour on the vertices of a dense lattice."""

    flops_per_point = 100.0

    def __init__(self, scene: Scene, resolution: int = RESOLUTION) -> None:
        super().__init__()
        shape = lattice_shape(scene.box, resolution)
        self.voxels = SparseVoxels(scene.box, shape, 1)
        vertices = unravel(torch.arange(math.prod(shape)), shape)
        thin = math.log(START_THICKNESS / max(self.voxels.cell))
        self.voxels.assign(vertices, torch.full((len(vertices), 1), thin), torch.zeros(len(vertices), 3))

    def encode(self, x: Tensor) -> Tensor:
        return x

    def density(self, latent: Tensor) -> Tensor:
        return trunc_exp(self.voxels.raw_density(latent, fill=-math.inf))

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        return torch.sigmoid(self.voxels.raw_color(latent, torch.ones_like(d[..., :1])))


class Scout(ArchitectureBase):
    """What a trainer needs to know of :class:`ScoutField`; no plugin: it is never written."""

    def plan(self, facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
        raise NotImplementedError

    def build(self, config: Config, scene: Scene, seed: int) -> RadianceField:
        return ScoutField(scene)

    def load(self, config: Config, tensors: Mapping[str, Tensor], scene: Scene) -> RadianceField:
        raise NotImplementedError

    def save(self, field: RadianceField) -> tuple[Config, dict[str, Tensor]]:
        raise NotImplementedError

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        assert isinstance(field, ScoutField)
        return [
            {"params": [field.voxels.density], "lr": 0.15, "name": "density", "sparse_rows": True},
            {"params": [field.voxels.sh], "lr": 0.1, "name": "colour", "sparse_rows": True},
        ]

    def regularizer(self, field: RadianceField, generator: torch.Generator) -> Tensor | None:
        assert isinstance(field, ScoutField)
        v = field.voxels
        pick = torch.randint(len(v.vertices), (VERTICES,), generator=generator).to(v.vertices.device)
        thick = trunc_exp(v.raw_density(v.positions(v.vertices[pick]), fill=-math.inf)) * max(v.cell)
        return SPARSE * (1.0 - torch.exp(-thick)).mean()
