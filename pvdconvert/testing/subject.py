"""A small student of any architecture, and the questions that checks put to it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pvdconvert import registry as registries
from pvdconvert.errors import RequestError
from pvdconvert.field import RadianceField
from pvdconvert.plugin import Architecture, Budget, Config, Limits
from pvdconvert.testing.analytic import AnalyticScene
from pvdconvert.testing.checks import Failed, expect

SMALL_MB = (0.5, 2.0, 8.0, 32.0)
"""Sizes that a small student is asked for, in turn, until the plugin agrees."""


class Subject:
    """An architecture, a small teacher, and a small student of it."""

    def __init__(self, name: str, registry: registries.Registry | None = None) -> None:
        registry = registry or registries.default()
        self.name = name
        self.code: Architecture = registry.architecture(name)
        self.entry = registry.architectures()[name]
        self.options = registry.options(name)
        self.teacher = AnalyticScene()
        self.occupancy = self.teacher.occupancy()
        self.facts = self.teacher.facts(self.occupancy)
        self.scene = self.teacher.scene

    @functools.cached_property
    def budget(self) -> Budget:
        """The smallest of a few sizes that the plugin can plan for."""
        for size in SMALL_MB:
            budget = Budget("fast", max_mb=size)
            try:
                self.code.plan(self.facts, budget, Limits(), {})
            except RequestError:
                continue
            return budget
        raise Failed(f"plans no student for this scene within {SMALL_MB[-1]} MB")

    @functools.cached_property
    def config(self) -> Config:
        return self.code.plan(self.facts, self.budget, Limits(), {})

    def fresh(self, seed: int = 0) -> RadianceField:
        """A student as the core makes it: built, then restricted to the occupied cells."""
        field = self.code.build(self.config, self.scene, seed)
        field.restrict(self.occupancy)
        return field

    @functools.cached_property
    def field(self) -> RadianceField:
        """A student with every parameter stirred, so that no answer is trivial. Not to be changed."""
        field = self.fresh()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in field.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * (0.1 * float(p.abs().mean()) + 0.03))
        return field

    def points(self, n: int, *, seed: int = 1, box: float = 1.0) -> Tensor:
        """[n, 3] in the cube of half side ``box``."""
        return (torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * box

    def occupied(self, n: int, seed: int = 2) -> Tensor:
        """[n, 3] in occupied cells, away from their faces."""
        generator = torch.Generator().manual_seed(seed)
        centers = self.occupancy.centers()
        pick = torch.randint(len(centers), (n,), generator=generator)
        return centers[pick] + (torch.rand(n, 3, generator=generator) - 0.5) * (0.98 * self.occupancy.cell)

    def directions(self, n: int, k: int, seed: int = 3) -> Tensor:
        """[n, k, 3], unit."""
        d = torch.randn(n, k, 3, generator=torch.Generator().manual_seed(seed))
        return torch.nn.functional.normalize(d, dim=-1)


def close(a: Tensor, b: Tensor, what: str) -> None:
    expect(a.shape == b.shape, f"{what}: shapes {list(a.shape)} and {list(b.shape)}")
    scale = 1e-5 + float(b.abs().max()) * 1e-5 if b.numel() else 0.0
    worst = float((a - b).abs().max()) if b.numel() else 0.0
    expect(torch.allclose(a, b, rtol=2e-4, atol=scale), f"{what} differ by {worst:.3g}")


@torch.no_grad()
def answers_of(field: RadianceField, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    latent = field.encode(x)
    return field.density(latent), field.color(latent, d)
