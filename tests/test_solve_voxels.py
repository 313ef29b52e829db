"""Least squares on sparse voxels: known answers, the dense solution, monotone and repeatable."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pvdconvert.kernels import backend
from pvdconvert.kernels.voxels import BrickMap, voxel_interp, voxel_sh_color
from pvdconvert.nn.sh import sh_basis
from pvdconvert.solve.voxels import affordable, fit_color, fit_scalar, least_squares, order, prolong, pyramid

SHAPE = (7, 6, 9)


@pytest.fixture(params=["torch", "numba"], autouse=True)
def twin(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "numba" and not backend.has_numba():
        pytest.skip("numba is not installed")
    before = backend.get_backend()
    backend.set_backend(request.param)
    yield request.param
    backend.set_backend(before)


def full(shape: tuple[int, int, int] = SHAPE) -> tuple[Tensor, BrickMap]:
    vertices = torch.cartesian_prod(*(torch.arange(n) for n in shape)).int()
    return vertices, BrickMap.from_vertices(vertices, shape)


def samples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Positions [count, 3] in the lattice and unit directions [count, 3]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, generator=g) * (torch.tensor(SHAPE) - 1)
    return x, torch.nn.functional.normalize(torch.randn(count, 3, generator=g), dim=-1)


def test_a_field_in_the_span_is_recovered() -> None:
    vertices, grid = full()
    g = torch.Generator().manual_seed(1)
    known = torch.randn(len(vertices), 12, generator=g)
    x, d = samples(12_000)
    basis = sh_basis(d, 2)[:, None]
    target = voxel_sh_color(x, basis, grid, known)[:, 0]
    weight = torch.rand(target.shape, generator=g) + 0.5
    got = least_squares(
        grid, x, target, weight, torch.zeros_like(known), ridge=torch.tensor(1e-5), iterations=60, basis=basis
    )
    torch.testing.assert_close(got, known, atol=5e-3, rtol=0)


def test_equals_the_dense_solution() -> None:
    """The ridge pulls to ``start``, each channel has its own weights; float64 normal equations agree."""
    vertices, grid = full()
    g = torch.Generator().manual_seed(2)
    x, _ = samples(200)
    target, weight = torch.randn(200, 2, generator=g), torch.rand(200, 2, generator=g)
    start = torch.randn(len(vertices), 2, generator=g)
    ridge = torch.tensor([[0.05, 0.2]])
    got = least_squares(grid, x, target, weight, start, ridge=ridge, iterations=100)
    a = voxel_interp(x, grid, torch.eye(len(vertices))).double()
    for c in range(2):
        w = weight[:, c].double()
        lam = float(ridge[0, c])
        lhs = a.T @ (w[:, None] * a) + lam * torch.eye(len(vertices), dtype=torch.float64)
        rhs = a.T @ (w * target[:, c].double()) + lam * start[:, c].double()
        torch.testing.assert_close(got[:, c].double(), torch.linalg.solve(lhs, rhs), atol=1e-3, rtol=0)


def test_the_objective_never_rises() -> None:
    vertices, grid = full()
    x, d = samples(500)
    basis = sh_basis(d, 2)[:, None]
    g = torch.Generator().manual_seed(3)
    target, weight = torch.randn(500, 3, generator=g), torch.rand(500, 3, generator=g)
    start = torch.randn(len(vertices), 12, generator=g)
    ridge = torch.full((1, 12), 0.01)
    objective = []
    for iterations in (0, 1, 2, 3, 5, 8, 13, 30):
        v = least_squares(grid, x, target, weight, start, ridge=ridge, iterations=iterations, basis=basis)
        miss = voxel_sh_color(x, basis, grid, v)[:, 0] - target
        objective.append(float((weight * miss**2).sum() + (ridge * (v - start) ** 2).sum()))
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(objective))
    assert objective[-1] < 0.5 * objective[0]


def test_bit_equal_when_repeated() -> None:
    vertices, grid = full()
    levels = pyramid(vertices, grid, 2)
    x, d = samples(2000)
    basis = sh_basis(d, 3)[:, None]
    rgb, weight = (x / 10).frac(), d[:, 0].abs()
    one, two = (
        fit_color(levels, x, basis, rgb, weight, activation="sigmoid", iterations=6, rounds=1) for _ in range(2)
    )
    assert torch.equal(one, two)


def test_pyramid_covers_and_prolongs_linear_functions() -> None:
    generator = torch.Generator().manual_seed(4)
    everything, _ = full((18, 11, 21))
    vertices = everything[torch.rand(len(everything), generator=generator) < 0.1]
    levels = pyramid(vertices, BrickMap.from_vertices(vertices, (18, 11, 21)), 3)
    assert [level.factor for level in levels] == [1, 2, 4]
    assert len(levels[2].vertices) < len(levels[1].vertices)
    slope = torch.tensor([[1.0], [-2.0], [0.5]])
    for coarse, fine in zip(levels[1:], levels):
        values = (coarse.vertices * coarse.factor).float() @ slope + 3
        expected = (fine.vertices * fine.factor).float() @ slope + 3
        torch.testing.assert_close(prolong(coarse, values, fine), expected, atol=1e-4, rtol=1e-5)


def test_empty_regions_follow_their_surroundings() -> None:
    """Samples fill one half; a linear function is continued where there are none, and met where there are."""
    vertices, grid = full()
    x, _ = samples(4000)
    x = x[x[:, 2] < 4]
    target = 2.0 + 0.3 * x[:, 0]
    values = fit_scalar(pyramid(vertices, grid, 3), x, target, torch.ones(len(x)), 0.0, iterations=40, share=1e-3)
    seen = vertices[:, 2] <= 4
    truth = 2.0 + 0.3 * vertices[:, 0].float()
    torch.testing.assert_close(values[seen, 0], truth[seen], atol=0.03, rtol=0)
    rim = vertices[:, 2] == 5
    assert float((values[rim, 0] - truth[rim]).abs().mean()) < 1.0
    again = fit_scalar(pyramid(vertices, grid, 3), x, target, torch.ones(len(x)), values, iterations=40)
    torch.testing.assert_close(again[seen], values[seen], atol=0.03, rtol=0)


@pytest.mark.parametrize("activation", ["sigmoid", "shift"])
def test_colors_in_the_span_are_met(activation: str) -> None:
    vertices, grid = full()
    g = torch.Generator().manual_seed(5)
    known = torch.randn(len(vertices), 27, generator=g) * 0.3
    x, d = samples(10_000)
    basis = sh_basis(d, 3)[:, None]
    raw = voxel_sh_color(x, basis, grid, known)[:, 0]
    rgb = torch.sigmoid(raw) if activation == "sigmoid" else raw + 0.5
    got = fit_color(
        pyramid(vertices, grid, 2), x, basis, rgb, torch.ones(len(x)), activation=activation, iterations=25,
        share=(1e-4, 1e-4),
    )  # fmt: skip
    out = voxel_sh_color(x, basis, grid, got)[:, 0]
    out = torch.sigmoid(out) if activation == "sigmoid" else out + 0.5
    assert float((out - rgb).square().mean().sqrt()) < 0.01


def test_gauss_newton_beats_the_fit_of_logits() -> None:
    """Colours that no logit fits (noise with pure black and white): the error of the colour itself goes down."""
    vertices, grid = full()
    x, d = samples(3000)
    basis = sh_basis(d, 1)[:, None]
    rgb = (torch.rand(3000, 3, generator=torch.Generator().manual_seed(6)) * 1.6 - 0.3).clamp(0, 1)
    error = []
    for rounds in (0, 3):
        v = fit_color(
            pyramid(vertices, grid, 1), x, basis, rgb, torch.ones(3000), activation="sigmoid", iterations=30,
            rounds=rounds,
        )  # fmt: skip
        error.append(float((torch.sigmoid(voxel_sh_color(x, basis, grid, v)[:, 0]) - rgb).square().mean()))
    assert error[1] < error[0]


def test_order_follows_the_cells() -> None:
    _, grid = full()
    x, _ = samples(300)
    i = torch.floor(x[order(x, grid)]).long()
    key = (i[:, 0] * SHAPE[1] + i[:, 1]) * SHAPE[2] + i[:, 2]
    assert bool((key[1:] >= key[:-1]).all())


def test_what_is_affordable() -> None:
    """More time buys finer levels, iterations, and rounds; there is always something to run."""
    shape = (40, 40, 40)
    v = torch.stack(torch.meshgrid(*[torch.arange(40)] * 3, indexing="ij"), -1).reshape(-1, 3)
    levels = pyramid(v, BrickMap.from_vertices(v, shape), 3)
    plans = [affordable(10_000, levels, 27, seconds, rounds=2) for seconds in (0.0, 0.02, 0.1, 0.2, 1.0, 100.0)]
    assert [p[0] for p in plans] == sorted((p[0] for p in plans), reverse=True)
    assert plans[0] == (2, 1, 0)
    assert plans[-1] == (0, 12, 2)
    assert {p[0] for p in plans} == {0, 1, 2}
    assert all(2 <= p[1] <= 12 for p in plans[2:])
    assert affordable(10_000, levels, 27, 0.2, rounds=2) == plans[3]


def test_a_level_that_is_not_solved_is_interpolated() -> None:
    """With the finest level left out the values on it are those of the next one between its vertices: still a fit."""
    shape = (17, 17, 17)
    v = torch.stack(torch.meshgrid(*[torch.arange(17)] * 3, indexing="ij"), -1).reshape(-1, 3)
    levels = pyramid(v, BrickMap.from_vertices(v, shape), 3)
    x = torch.rand(20_000, 3) * 16
    target = torch.sin(x[:, 0] / 5) + x[:, 1] / 8
    ones = torch.ones(len(x))
    h = fit_scalar(levels, x, target, ones, 0.0, iterations=12, finest=1)
    on_coarse = levels[0].vertices[(levels[0].vertices % 2 == 0).all(1)]
    between = levels[0].grid.rows(on_coarse)
    again = prolong(levels[1], h[between], levels[0])
    torch.testing.assert_close(again, h, atol=1e-5, rtol=0)
    error = voxel_interp(x, levels[0].grid, h)[:, 0] - target
    assert float(error.abs().max()) < 0.15
