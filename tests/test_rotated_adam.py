"""SOAP: Adam where there is nothing to turn, better than Adam where there is, and saved with its bases."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import backward

from pvdconvert.solve import rotated_adam
from pvdconvert.solve.lazy_adam import LazyAdam


def optimiser(*params: Tensor, rotated: bool = True, lr: float = 0.02) -> LazyAdam:
    return LazyAdam([{"params": list(params), "lr": lr, "rotated": rotated}], betas=(0.9, 0.99), eps=1e-15)


def matrix(rows: int, columns: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def orthogonal(n: int, seed: int) -> Tensor:
    basis: Tensor = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)))[0]
    return basis


def quadratic(w: Tensor) -> Tensor:
    """A bowl with curvatures 1 .. 1e-4 along axes that are turned on both sides: its least value is 0, at ``goal``."""
    left, right = orthogonal(12, 1), orthogonal(8, 2)
    scale = torch.logspace(0, -2, 12)[:, None] * torch.logspace(0, -2, 8)[None, :]
    goal = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
    return ((left.T @ (w - goal) @ right) * scale).square().sum()


def fall(rotated: bool, steps: int = 400) -> float:
    w = matrix(12, 8)
    run = optimiser(w, rotated=rotated)
    for k in range(steps):
        run.param_groups[0]["lr"] = 0.05 * (1 - k / steps)
        run.zero_grad()
        backward(quadratic(w))
        run.step()
    return float(quadratic(w.detach()))


def test_falls_far_below_adam_where_the_axes_are_turned() -> None:
    adam, soap = fall(rotated=False), fall(rotated=True)
    assert soap < 0.1 * adam, (soap, adam)


def test_a_vector_gets_adam_exactly() -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    a = optimiser(ours)
    b = torch.optim.Adam([theirs], lr=0.02, betas=(0.9, 0.99), eps=1e-15)
    for seed in range(20):
        g = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        for p, run in ((ours, a), (theirs, b)):
            run.zero_grad()
            backward((p * g).sum())
            run.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_the_first_step_of_a_matrix_only_looks_and_the_second_moves_by_the_rate() -> None:
    """With one and the same gradient g = u s v', Adam in its basis steps by lr along u v', the single axis it has."""
    u, v = torch.tensor([0.6, 0.8, 0.0]), torch.tensor([0.0, 1.0])
    w = nn.Parameter(torch.zeros(3, 2))
    run = optimiser(w, lr=0.1)
    for expected in (torch.zeros(3, 2), -0.1 * torch.outer(u, v)):
        run.zero_grad()
        backward((w * (7.0 * torch.outer(u, v))).sum())
        run.step()
        torch.testing.assert_close(w.detach(), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (1, 5), (600, 3)])
def test_bases_stay_orthonormal_and_long_sides_keep_their_own(shape: tuple[int, int]) -> None:
    w = matrix(*shape)
    run = optimiser(w)
    for seed in range(35):
        run.zero_grad()
        backward((w * matrix(*shape, seed=seed).detach()).sum())
        run.step()
    state = run.state[w]
    assert torch.isfinite(w).all()
    for side, n in zip(("rows", "columns"), shape, strict=True):
        assert (f"basis_{side}" in state) == (n <= rotated_adam.LARGEST)
        if f"basis_{side}" in state:
            basis = state[f"basis_{side}"]
            torch.testing.assert_close(basis.T @ basis, torch.eye(n), atol=1e-5, rtol=0)


def test_a_state_that_was_saved_goes_on_bit_for_bit() -> None:
    def go(w: nn.Parameter, run: LazyAdam, steps: range) -> None:
        for seed in steps:
            run.zero_grad()
            backward((w * matrix(6, 4, seed=seed).detach()).square().sum())
            run.step()

    whole = matrix(6, 4)
    run = optimiser(whole)
    go(whole, run, range(13))
    half = nn.Parameter(whole.detach().clone())
    second = optimiser(half)
    second.load_state_dict(copy.deepcopy(run.state_dict()))
    go(whole, run, range(13, 30))
    go(half, second, range(13, 30))
    assert torch.equal(whole, half)


def test_a_gradient_of_zero_harms_nothing() -> None:
    w = matrix(4, 4)
    before = w.detach().clone()
    run = optimiser(w)
    for _ in range(25):
        run.zero_grad()
        backward((w * 0.0).sum())
        run.step()
    torch.testing.assert_close(w.detach(), before)
