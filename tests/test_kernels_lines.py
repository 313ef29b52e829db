"""Lines: both twins against torch's grid_sample in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pvdconvert.kernels import lines as kernel
from pvdconvert.kernels.backend import has_numba, set_backend
from pvdconvert.kernels.lines import AXES
from tests.twins import TWINS, choose

CASES = [((7, 5, 9), 17), ((2, 6, 3), 1), ((33, 20, 16), 16)]


@pytest.fixture(params=TWINS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    choose(name, monkeypatch, kernel, "cp_sum", "cp_features")
    return name


def factors(n: Sequence[int], rank: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n[c], rank, generator=g, requires_grad=True) for c in AXES]


def points(n: Sequence[int], count: int = 60) -> Tensor:
    """Random positions, every corner, and exact vertices."""
    g = torch.Generator().manual_seed(5)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    sides = torch.tensor(n) - 1
    vertices = torch.stack([torch.randint(v, (40,), generator=g) for v in n], 1) / sides
    return torch.cat([torch.rand(count, 3, generator=g), corners, vertices])


def reference(x01: Tensor, lines: Sequence[Tensor]) -> Tensor:
    """Layouts 3.3, by grid_sample: [N, rank]."""
    u = x01.double() * 2 - 1
    out = torch.ones(len(x01), lines[0].shape[1], dtype=torch.float64)
    for c, line in zip(AXES, lines):
        at = torch.stack([torch.zeros_like(u[:, c]), u[:, c]], -1)[None, :, None]
        out = out * F.grid_sample(line.t()[None, :, :, None], at, align_corners=True)[0, :, :, 0].t()
    return out


@pytest.mark.parametrize(("n", "rank"), CASES)
@pytest.mark.parametrize("summed", [True, False])
def test_values_and_gradients_meet_grid_sample(backend: str, n: tuple[int, ...], rank: int, summed: bool) -> None:
    lines, x = factors(n, rank), points(n)
    out = (kernel.cp_sum if summed else kernel.cp_features)(x, lines)
    precise = [p.detach().double().requires_grad_() for p in lines]
    truth = reference(x, precise)
    truth = truth.sum(1) if summed else truth
    torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=2e-4)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(out, lines, weights)
    wanted = torch.autograd.grad(truth, precise, weights.double())
    for mine, theirs in zip(grads, wanted):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-3)


def test_outside_is_clamped_and_nan_is_harmless(backend: str) -> None:
    lines = factors((5, 6, 7), 3)
    x = torch.tensor([[-0.5, 0.3, 2.0], [1.0 + 1e-6, -1e9, 0.2], [float("nan"), 0.5, 0.5]])
    inside = torch.tensor([[0.0, 0.3, 1.0], [1.0, 0.0, 0.2], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(kernel.cp_features(x, lines), kernel.cp_features(inside, lines))


def test_one_vertex_on_an_axis_is_constant_along_it(backend: str) -> None:
    lines = factors((1, 4, 1), 2)
    x = torch.rand(50, 3)
    moved = x.clone()
    moved[:, [0, 2]] = torch.rand(50, 2)
    first = kernel.cp_sum(x, lines)
    torch.testing.assert_close(first, kernel.cp_sum(moved, lines))
    assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(first.sum(), lines))


def test_empty_and_non_contiguous_inputs(backend: str) -> None:
    lines = factors((5, 6, 7), 4)
    for op in (kernel.cp_sum, kernel.cp_features):
        none = op(torch.empty(0, 3), lines)
        assert none.shape[0] == 0
        assert all(float(g.abs().sum()) == 0 for g in torch.autograd.grad(none.sum(), lines))
        wide = torch.rand(3, 80).t()
        strided = [p.detach().t().contiguous().t().requires_grad_() for p in lines]
        out = op(wide, strided)
        torch.testing.assert_close(out, op(wide.contiguous(), lines))
        weights = torch.rand(out.shape)
        mine = torch.autograd.grad(out, strided, weights)
        theirs = torch.autograd.grad(op(wide.contiguous(), lines), lines, weights)
        for a, b in zip(mine, theirs):
            torch.testing.assert_close(a, b)


@pytest.mark.skipif(not has_numba(), reason="numba is not installed")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_twin_repeats_bit_for_bit(threads: int) -> None:
    set_backend("numba")
    torch.set_num_threads(threads)
    lines, x = factors((9, 8, 7), 16), torch.rand(1003, 3)
    runs = []
    for _ in range(2):
        out = kernel.cp_features(x, lines)
        runs.append([out, *torch.autograd.grad(out.square().sum(), lines)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    set_backend("torch")
    out = kernel.cp_features(x, lines)
    for a, b in zip(runs[0], [out, *torch.autograd.grad(out.square().sum(), lines)]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
