"""Occupancy: built coarse to fine from any field, mended by rays, hiding nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pvdconvert.cameras import sphere_cameras
from pvdconvert.errors import RequestError
from pvdconvert.field import FunctionField
from pvdconvert.prepare import prepare
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.render.occupy import build_occupancy, check_occupancy, dilate, grid_over, resample, split, tight
from pvdconvert.scene import Box, Scene
from pvdconvert.testing.analytic import AnalyticScene


def test_dilate_grows_by_one_cell_in_all_26_directions() -> None:
    grid = torch.zeros(5, 5, 5, dtype=torch.uint8)
    grid[2, 2, 2] = 1
    grown = dilate(grid)
    assert int(grown.sum()) == 27
    assert int(grown[1:4, 1:4, 1:4].sum()) == 27
    assert int(dilate(grid, 2).sum()) == 125


def test_split_and_resample_are_inverse_on_nested_grids() -> None:
    generator = torch.Generator().manual_seed(1)
    coarse = grid_over(Box.cube(1.0), 6, torch.device("cpu"))
    coarse.grid = (torch.rand(coarse.grid.shape, generator=generator) < 0.3).to(torch.uint8)
    fine = split(coarse, 2)
    assert fine.count == 8 * coarse.count
    assert torch.equal(resample(fine, coarse).grid, coarse.grid)


def test_resample_covers_cells_of_another_lattice() -> None:
    generator = torch.Generator().manual_seed(2)
    a = grid_over(Box((-1.0, -0.9, -1.1), (1.0, 0.8, 1.0)), 9, torch.device("cpu"))
    a.grid = (torch.rand(a.grid.shape, generator=generator) < 0.2).to(torch.uint8)
    b = resample(a, grid_over(Box.cube(1.3), 23, torch.device("cpu")))
    points = torch.rand(20_000, 3, generator=generator) * 2 - 1
    inside = a.contains(points)
    assert bool(inside.any())
    assert bool(b.contains(points[inside]).all())


def test_tight_crops_without_moving_cells() -> None:
    a = grid_over(Box.cube(1.0), 10, torch.device("cpu"))
    a.grid[4, 5, 6] = 1
    b = tight(a, margin=0)
    assert b.shape == (1, 1, 1)
    assert torch.allclose(a.centers(), b.centers())
    assert b.box.min == pytest.approx((-0.2, 0.0, 0.2), abs=1e-6)


def test_everything_dense_lies_in_an_occupied_cell() -> None:
    field = AnalyticScene()
    occupancy = build_occupancy(field, field.scene.box, resolution=64)
    points = torch.rand(100_000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    dense = field.density(points) > 2.0
    assert bool(occupancy.contains(points[dense]).all())
    assert occupancy.count < 0.5 * 64**3


def test_an_empty_scene_is_refused_in_one_line() -> None:
    def nothing(x: Tensor) -> Tensor:
        return torch.zeros(len(x))

    field = FunctionField(nothing, lambda x, d: x)
    with pytest.raises(RequestError, match="no density") as caught:
        build_occupancy(field, Box.cube(1.0))
    assert caught.value.exit_code == 10
    assert "\n" not in str(caught.value)


def test_density_that_is_not_a_number_is_refused() -> None:
    field = FunctionField(lambda x: torch.full((len(x),), float("nan")), lambda x, d: x)
    with pytest.raises(RequestError, match="not a number"):
        build_occupancy(field, Box.cube(1.0))


def needle(x: Tensor) -> Tensor:
    """A ball and a wire far thinner than a coarse cell."""
    ball = (x.norm(dim=1) < 0.3).float() * 50
    wire = ((x[:, 0] - 0.613).hypot(x[:, 1] - 0.207) < 0.012).float() * 400
    total: Tensor = ball + wire * (x[:, 2].abs() < 0.6)
    return total


def test_rays_find_and_mend_what_the_points_missed() -> None:
    field = FunctionField(needle, lambda x, d: torch.zeros_like(x))
    blind = grid_over(Box.cube(1.0), 32, torch.device("cpu"))
    blind.grid[10:22, 10:22, 10:22] = 1  # the ball alone
    camera = sphere_cameras(Box.cube(0.8), 1, 48, 0)[0]
    o, d = (torch.from_numpy(v) for v in camera.rays())
    mended, found = check_occupancy(field, blind, Box.cube(1.0), o, d, (1.0, 1.0, 1.0))
    assert found.added > 0
    assert found.psnr < 30
    _, again = check_occupancy(field, mended, Box.cube(1.0), o, d, (1.0, 1.0, 1.0))
    assert again.psnr > found.psnr + 15


def test_fog_of_the_backdrops_own_colour_is_not_chased() -> None:
    def density(x: Tensor) -> Tensor:
        return torch.where(x.norm(dim=1) < 0.3, 50.0, 0.05)

    def color(x: Tensor, d: Tensor) -> Tensor:
        return torch.where(x.norm(dim=1, keepdim=True) < 0.3, torch.tensor([0.0, 0.2, 0.4]), torch.ones(3))

    prepared = prepare(FunctionField(density, color), Scene(Box.cube(1.0)), seconds=2.0)
    assert max(prepared.box.size) < 0.8


def test_a_fields_own_support_bounds_the_search() -> None:
    field = AnalyticScene()
    half = grid_over(field.scene.box, 32, torch.device("cpu"))
    half.grid[:16] = 1
    field.restrict(half)
    occupancy = build_occupancy(field, field.scene.box, resolution=64)
    assert occupancy.box.max[0] <= 1e-6


def test_occupancy_is_deterministic() -> None:
    field = AnalyticScene()
    a, b = (build_occupancy(field, field.scene.box, resolution=64, seed=3) for _ in range(2))
    assert torch.equal(a.grid, b.grid)
    assert isinstance(a, Occupancy)
