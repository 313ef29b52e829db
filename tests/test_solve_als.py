"""Masked alternating least squares: known low-rank volumes, monotone, one-sided, repeatable, both twins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from pvdconvert.kernels.backend import has_numba, set_backend
from pvdconvert.kernels.planes import AXES, PAIRS
from pvdconvert.solve.als import corners, scatter, vm_als


@pytest.fixture(params=["torch", "numba"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "numba" and not has_numba():
        pytest.skip("numba is not installed")
    set_backend(request.param)
    yield request.param
    set_backend("auto")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def volume(planes: Sequence[Tensor], lines: Sequence[Tensor]) -> Tensor:
    """[nx, ny, nz] float64: the sum of all products at every vertex."""
    total: Tensor | float = 0.0
    for (a, b), c, plane, line in zip(PAIRS, AXES, planes, lines):
        product = torch.einsum("bar,cr->bac", plane.double(), line.double())
        total = total + product.permute(*[(b, a, c).index(k) for k in range(3)])
    assert isinstance(total, Tensor)
    return total


def low_rank(n: Sequence[int], ranks: Sequence[int]) -> Tensor:
    g = seeded(1)
    planes = [torch.randn(n[b], n[a], r, generator=g) for (a, b), r in zip(PAIRS, ranks)]
    return volume(planes, [torch.randn(n[c], r, generator=g) for c, r in zip(AXES, ranks)])


def test_sparse_samples_of_a_low_rank_volume_give_all_of_it() -> None:
    n, ranks = (14, 15, 16), (2, 1, 2)
    truth = low_rank(n, ranks)
    known = torch.rand(n, generator=seeded(2)) < 0.6
    fit = vm_als(known.nonzero(), truth[known], n, ranks, sweeps=60, ridge=1e-7, generator=seeded())
    assert fit.error < 1e-3
    # The vertices that were not given follow too.
    error = (volume(fit.planes, fit.lines) - truth)[~known].square().mean().sqrt()
    assert float(error) < 0.01 * float(truth.std())


def test_the_objective_falls_with_every_sweep_and_is_what_it_says() -> None:
    n = (9, 10, 11)
    values = torch.randn(n, generator=seeded(3))
    known = torch.rand(n, generator=seeded(4)) < 0.5
    weights = torch.rand(int(known.sum()), generator=seeded(5)) + 0.1
    limit = torch.randint(-1, 2, (int(known.sum()),), generator=seeded(6))
    fit = vm_als(
        known.nonzero(), values[known], n, (2, 3, 1), sweeps=8, weights=weights, limit=limit, generator=seeded()
    )
    assert all(b < a for a, b in zip(fit.objective, fit.objective[1:]))
    error = values[known].double() - volume(fit.planes, fit.lines)[known]
    error[error * limit < 0] = 0
    expected = (weights / weights.mean() * error.square()).mean().sqrt()
    assert fit.error == pytest.approx(float(expected), rel=1e-3)


def test_one_sided_targets_are_met_from_their_side() -> None:
    """A field of rank 1 that was cut off at a ceiling: equalities cannot be met at rank 1, inequalities can."""
    n = (12, 12, 12)
    axes = [torch.linspace(0.5, 2, v) for v in n]
    truth = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    cut = truth.clamp(max=2.0)
    index = torch.ones(n).nonzero()
    limit = (truth.reshape(-1) >= 2.0).to(torch.int8)
    hard = vm_als(index, cut.reshape(-1), n, (1, 1, 1), sweeps=80, ridge=1e-6, generator=seeded())
    soft = vm_als(index, cut.reshape(-1), n, (1, 1, 1), sweeps=80, ridge=1e-6, limit=limit, generator=seeded())
    assert soft.error < 0.2 * hard.error
    assert float(volume(soft.planes, soft.lines)[truth >= 2.0].min()) > 1.9


def test_repeats_bit_for_bit_and_twins_agree(backend: str) -> None:
    n = (8, 9, 10)
    known = torch.rand(n, generator=seeded(4)) < 0.5
    values = torch.randn(int(known.sum()), generator=seeded(3))
    one, two = (vm_als(known.nonzero(), values, n, (2, 2, 2), sweeps=3, generator=seeded(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.planes + one.lines, two.planes + two.lines))
    set_backend("torch")
    truth = vm_als(known.nonzero(), values, n, (2, 2, 2), sweeps=3, generator=seeded(7))
    torch.testing.assert_close(volume(one.planes, one.lines), volume(truth.planes, truth.lines), rtol=0, atol=1e-4)


def test_no_vertices_give_an_empty_volume() -> None:
    fit = vm_als(torch.empty(0, 3, dtype=torch.long), torch.empty(0), (4, 5, 6), (2, 2, 2), generator=seeded())
    assert float(volume(fit.planes, fit.lines).abs().max()) == 0.0


def test_corners_are_those_of_the_touched_cells() -> None:
    x = torch.tensor([[0.1, 0.1, 0.1], [1.0, 1.0, 1.0]])
    got = {tuple(v) for v in corners(x, (4, 5, 6)).tolist()}
    first = {(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)}
    last = {(i, j, k) for i in (2, 3) for j in (3, 4) for k in (4, 5)}
    assert got == first | last


def test_scatter_of_a_linear_function_is_close_to_it_and_exact_at_vertices() -> None:
    n = (5, 5, 5)
    vertices = torch.cartesian_prod(*[torch.arange(5)] * 3)
    exact = vertices.float() @ torch.tensor([1.0, -2.0, 0.5])
    index, mean, weight = scatter(vertices / 4, torch.stack([exact, -exact], 1), n)
    assert torch.equal(index, vertices)
    torch.testing.assert_close(mean, torch.stack([exact, -exact], 1))
    torch.testing.assert_close(weight, torch.ones(125))
    x = torch.rand(20000, 3, generator=seeded())
    index, mean, _ = scatter(x, (x @ torch.tensor([4.0, -8.0, 2.0]))[:, None], n)
    inner = ((index > 0) & (index < 4)).all(1)
    assert float((mean[:, 0] - index.float() @ torch.tensor([1.0, -2.0, 0.5]))[inner].abs().max()) < 0.15
