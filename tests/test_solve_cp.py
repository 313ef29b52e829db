"""Masked alternating least squares of the CP decomposition: known volumes, monotone, one-sided, repeatable."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pvdconvert.kernels.lines import AXES
from pvdconvert.solve import cp
from pvdconvert.solve.cp import cp_als


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def volume(lines: Sequence[Tensor]) -> Tensor:
    """[nx, ny, nz] float64: the sum of all products at every vertex."""
    c, b, a = (line.double() for line in lines)  # along z, y, x
    return torch.einsum("ir,jr,kr->ijk", a, b, c)


def low_rank(n: Sequence[int], rank: int) -> Tensor:
    g = seeded(1)
    return volume([torch.randn(n[axis], rank, generator=g) for axis in AXES])


def test_sparse_samples_of_a_low_rank_volume_give_all_of_it() -> None:
    n = (14, 15, 16)
    truth = low_rank(n, 3)
    known = torch.rand(n, generator=seeded(2)) < 0.5
    fit = cp_als(known.nonzero(), truth[known], n, 6, sweeps=150, ridge=1e-7, generator=seeded())
    assert fit.error < 1e-2 * float(truth.std())
    # The vertices that were not given follow too.
    error = (volume(fit.lines) - truth)[~known].square().mean().sqrt()
    assert float(error) < 0.03 * float(truth.std())


@pytest.mark.parametrize("points", [7, 1 << 14])
def test_the_objective_falls_with_every_sweep_and_is_what_it_says(monkeypatch: pytest.MonkeyPatch, points: int) -> None:
    monkeypatch.setattr(cp, "POINTS", points)
    n = (9, 10, 11)
    values = torch.randn(n, generator=seeded(3))
    known = torch.rand(n, generator=seeded(4)) < 0.5
    weights = torch.rand(int(known.sum()), generator=seeded(5)) + 0.1
    limit = torch.randint(-1, 2, (int(known.sum()),), generator=seeded(6))
    fit = cp_als(known.nonzero(), values[known], n, 5, sweeps=8, weights=weights, limit=limit, generator=seeded())
    assert all(b < a for a, b in zip(fit.objective, fit.objective[1:]))
    error = values[known].double() - volume(fit.lines)[known]
    error[error * limit < 0] = 0
    expected = (weights / weights.mean() * error.square()).mean()
    assert fit.error == pytest.approx(float(expected.sqrt()), rel=1e-3)
    penalty = sum(float(line.double().square().sum()) for line in fit.lines)
    assert fit.objective[-1] == pytest.approx(float(expected) + 1e-2 * penalty / int(known.sum()), rel=1e-3)


def test_one_sided_targets_are_met_from_their_side() -> None:
    """A field of rank 1 that was cut off at a ceiling: equalities cannot be met at rank 1, inequalities can."""
    n = (12, 12, 12)
    axes = [torch.linspace(0.5, 2, v) for v in n]
    truth = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    index = torch.ones(n).nonzero()
    cut, limit = truth.clamp(max=2.0).reshape(-1), (truth.reshape(-1) >= 2.0).to(torch.int8)
    hard = cp_als(index, cut, n, 1, sweeps=80, ridge=1e-6, generator=seeded())
    soft = cp_als(index, cut, n, 1, sweeps=80, ridge=1e-6, limit=limit, generator=seeded())
    assert soft.error < 0.2 * hard.error
    assert float(volume(soft.lines)[truth >= 2.0].min()) > 1.9


def test_repeats_bit_for_bit_whatever_the_global_generator_says() -> None:
    n = (8, 9, 10)
    known = torch.rand(n, generator=seeded(4)) < 0.5
    values = torch.randn(int(known.sum()), generator=seeded(3))
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(cp_als(known.nonzero(), values, n, 4, sweeps=3, generator=seeded(7)))
    assert all(torch.equal(a, b) for a, b in zip(runs[0].lines, runs[1].lines))


def test_slices_without_vertices_keep_finite_lines() -> None:
    index = torch.tensor([[0, 0, 0], [3, 4, 5]])
    fit = cp_als(index, torch.tensor([1.0, -1.0]), (4, 5, 6), 2, sweeps=20, ridge=1e-6, generator=seeded())
    assert fit.error < 1e-2
    assert all(bool(torch.isfinite(line).all()) for line in fit.lines)
    nothing = cp_als(torch.empty(0, 3, dtype=torch.long), torch.empty(0), (4, 5, 6), 2, generator=seeded())
    assert [tuple(line.shape) for line in nothing.lines] == [(6, 2), (5, 2), (4, 2)]
