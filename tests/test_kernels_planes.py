"""Planes and lines: both twins against torch's grid_sample in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pvdconvert.kernels import planes as kernel
from pvdconvert.kernels.backend import has_numba, set_backend
from pvdconvert.kernels.planes import AXES, PAIRS
from tests.twins import TWINS, choose

CASES = [((7, 5, 9), (3, 4, 17)), ((2, 6, 3), (2, 1, 3)), ((33, 20, 16), (16, 16, 16))]


@pytest.fixture(params=TWINS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    choose(name, monkeypatch, kernel, "vm_sum", "vm_features")
    return name


def factors(n: Sequence[int], ranks: Sequence[int], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    planes = [torch.randn(n[b], n[a], r, generator=g, requires_grad=True) for (a, b), r in zip(PAIRS, ranks)]
    lines = [torch.randn(n[c], r, generator=g, requires_grad=True) for c, r in zip(AXES, ranks)]
    return planes, lines


def points(n: Sequence[int], count: int = 60) -> Tensor:
    """Random positions, every kind of edge, and exact vertices."""
    g = torch.Generator().manual_seed(5)
    x = torch.rand(count, 3, generator=g)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    sides = torch.tensor(n) - 1
    vertices = torch.stack([torch.randint(v, (40,), generator=g) for v in n], 1) / sides
    return torch.cat([x, corners, vertices])


def reference(x01: Tensor, planes: Sequence[Tensor], lines: Sequence[Tensor]) -> Tensor:
    """Layouts 3.3, by grid_sample: [N, sum of ranks]."""
    u = x01.double() * 2 - 1
    out = []
    for (a, b), c, plane, line in zip(PAIRS, AXES, planes, lines):
        p = F.grid_sample(plane.permute(2, 0, 1)[None], u[None, :, None][..., [a, b]], align_corners=True)
        at = torch.stack([torch.zeros_like(u[:, c]), u[:, c]], -1)[None, :, None]
        q = F.grid_sample(line.t()[None, :, :, None], at, align_corners=True)
        out.append((p * q)[0, :, :, 0].t())
    return torch.cat(out, 1)


@pytest.mark.parametrize(("n", "ranks"), CASES)
@pytest.mark.parametrize("summed", [True, False])
def test_values_and_gradients_meet_grid_sample(
    backend: str, n: tuple[int, ...], ranks: tuple[int, ...], summed: bool
) -> None:
    planes, lines = factors(n, ranks)
    x = points(n)
    out = (kernel.vm_sum if summed else kernel.vm_features)(x, planes, lines)
    precise = [p.detach().double().requires_grad_() for p in planes]
    precise_lines = [p.detach().double().requires_grad_() for p in lines]
    truth = reference(x, precise, precise_lines)
    truth = truth.sum(1) if summed else truth
    torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=2e-4)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(out, planes + lines, weights)
    wanted = torch.autograd.grad(truth, precise + precise_lines, weights.double())
    for mine, theirs in zip(grads, wanted):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-3)


def test_outside_is_clamped_and_nan_is_harmless(backend: str) -> None:
    planes, lines = factors((5, 6, 7), (2, 3, 4))
    x = torch.tensor([[-0.5, 0.3, 2.0], [1.0 + 1e-6, -1e9, 0.2], [float("nan"), 0.5, 0.5]])
    inside = torch.tensor([[0.0, 0.3, 1.0], [1.0, 0.0, 0.2], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(kernel.vm_features(x, planes, lines), kernel.vm_features(inside, planes, lines))


def test_one_vertex_on_an_axis_is_constant_along_it(backend: str) -> None:
    planes, lines = factors((1, 4, 1), (2, 2, 2))
    x = torch.rand(50, 3)
    moved = x.clone()
    moved[:, [0, 2]] = torch.rand(50, 2)
    first, second = kernel.vm_sum(x, planes, lines), kernel.vm_sum(moved, planes, lines)
    torch.testing.assert_close(first, second)
    assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(first.sum(), planes + lines))


@pytest.mark.parametrize("name", ["vm_sum", "vm_features"])
def test_empty_and_non_contiguous_inputs(backend: str, name: str) -> None:
    op = getattr(kernel, name)
    planes, lines = factors((5, 6, 7), (2, 3, 4))
    none = op(torch.empty(0, 3), planes, lines)
    assert none.shape[0] == 0
    assert all(float(g.abs().sum()) == 0 for g in torch.autograd.grad(none.sum(), planes + lines))
    wide = torch.rand(3, 80).t()
    strided = [p.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_() for p in planes]
    out = op(wide, strided, lines)
    torch.testing.assert_close(out, op(wide.contiguous(), planes, lines))
    weights = torch.rand(out.shape)
    mine = torch.autograd.grad(out, strided, weights)
    theirs = torch.autograd.grad(op(wide.contiguous(), planes, lines), planes, weights)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not has_numba(), reason="numba is not installed")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_twin_repeats_bit_for_bit_whatever_the_slabs(threads: int) -> None:
    set_backend("numba")
    torch.set_num_threads(threads)
    planes, lines = factors((9, 8, 7), (16, 4, 5))
    # All in a few rows, so that slabs meet in the middle of the crowd and some are empty.
    x = torch.rand(1000, 3) * torch.tensor([1.0, 0.2, 0.3]) + torch.tensor([0.0, 0.4, 0.0])
    runs = []
    for _ in range(2):
        out = kernel.vm_features(x, planes, lines)
        runs.append([out, *torch.autograd.grad(out.square().sum(), planes + lines)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    set_backend("torch")
    out = kernel.vm_features(x, planes, lines)
    for a, b in zip(runs[0], [out, *torch.autograd.grad(out.square().sum(), planes + lines)]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
