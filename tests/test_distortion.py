"""The distortion loss against its definition, a double sum over each ray's samples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pvdconvert import registry
from pvdconvert.distill.distortion import distortion
from pvdconvert.distill.sampling import in_cells, segments
from pvdconvert.kernels.composite import render_weights
from pvdconvert.plugin import ArchitectureBase
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, RaySpace, Scene


def rays(counts: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    n = sum(counts)
    middle = torch.cat([torch.rand(k, generator=g).sort().values for k in counts]) if n else torch.empty(0)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return torch.rand(n, generator=g) / 8, middle, torch.rand(n, generator=g) / 16, offsets


def by_definition(w: Tensor, s: Tensor, length: Tensor, offsets: Tensor) -> float:
    total = 0.0
    for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
        v, m = w[a:b].double(), s[a:b].double()
        total += float((v[:, None] * v * (m[:, None] - m).abs()).sum() + (v**2 * length[a:b]).sum() / 3)
    return total / (len(offsets) - 1)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(0, 99))
def test_it_is_the_double_sum(counts: list[int], seed: int) -> None:
    w, s, length, offsets = rays(counts, seed)
    assert float(distortion(w, s, length, offsets)) == pytest.approx(by_definition(w, s, length, offsets), abs=1e-6)


def test_its_gradient() -> None:
    w, s, length, offsets = (v.double() if v.is_floating_point() else v for v in rays([5, 0, 7, 1]))
    assert torch.autograd.gradcheck(lambda v: distortion(v, s, length, offsets), w.requires_grad_())


def test_one_place_is_better_than_two_and_many_rays_lose_nothing() -> None:
    s = torch.tensor([0.2, 0.21, 0.8])
    length, offsets = torch.full((3,), 0.01), torch.tensor([0, 3])
    one, two = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.5, 0.0, 0.5])
    assert distortion(one, s, length, offsets) < 0.1 * distortion(two, s, length, offsets)
    many = 100_000
    alone = float(distortion(two, s, length, offsets))
    all_of_them = distortion(two.repeat(many), s.repeat(many), length.repeat(many), torch.arange(many + 1) * 3)
    assert math.isclose(float(all_of_them), alone, rel_tol=1e-5)


def test_shares_run_from_the_beginning_of_a_ray_to_its_end() -> None:
    """A uniform thin fog on one ray of unit chord: 1/3 of its squared opacity, whatever the units of the world."""
    for scale in (1.0, 7.0):
        box = Box((0, 0, 0), (scale, scale, scale))
        o, d = torch.tensor([[-scale, 0.5 * scale, 0.5 * scale]]), torch.tensor([[1.0, 0.0, 0.0]])
        way = segments(o, d, Scene(box=box), box)
        full = Occupancy(torch.zeros(3), scale / 4, torch.ones(4, 4, 4, dtype=torch.uint8))
        samples = in_cells(way, full, scale / 256, torch.full((1,), 0.5))
        middle, length, offsets = way.shares(samples)
        assert middle[0] == pytest.approx(0.5 / 256, abs=1e-5)
        assert middle[-1] == pytest.approx(1 - 0.5 / 256, abs=1e-5)
        weight, through = render_weights(torch.full((len(samples),), 1e-4), offsets)
        found = float(distortion(weight, middle, length, offsets))
        assert found == pytest.approx(float(1 - through) ** 2 / 3, rel=0.01)


def test_who_asks_for_it() -> None:
    """DVGO where rays have far to go; nobody else among the built-ins."""
    world, ndc = Scene(box=Box.cube(1)), Scene(box=Box.cube(1), ray_space=RaySpace("ndc", 40, 30, 30.0, 1.0))
    for name in ("dvgo", "ngp", "nerf", "plenoxels"):
        code = registry.default().architecture(name)
        assert isinstance(code, ArchitectureBase)
        assert code.distortion(world) == 0.0
        assert code.distortion(ndc) == (0.01 if name == "dvgo" else 0.0)
