"""Closed forms of a small network: inputs that are handed on, and a last layer by ridge regression."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pvdconvert.nn.head import carry, solve_last
from pvdconvert.nn.mlp import MLP


def hidden_of(net: MLP, x: torch.Tensor) -> torch.Tensor:
    for layer in list(net.layers)[:-1]:
        x = F.relu(layer(x))
    return x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(9, 16, 3), (9, 16, 24, 3)])
@torch.no_grad()
def test_carried_inputs_come_out_again(widths: tuple[int, ...], bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    net = MLP(widths, bias=bias, generator=g)
    x = 3 * torch.randn(4000, 9, generator=g)
    carry(net)
    hidden = hidden_of(net, x)
    assert torch.allclose(hidden[:, :3] - hidden[:, 3:6], x[:, :3], atol=1e-5)
    last = net.layers[-1]
    assert isinstance(last, torch.nn.Linear)
    solve_last(last, hidden, x[:, :3], torch.ones(len(x)))
    assert float((net(x) - x[:, :3]).square().mean().sqrt()) < 0.02


@torch.no_grad()
def test_the_last_layer_is_the_weighted_least_squares_solution() -> None:
    g = torch.Generator().manual_seed(1)
    hidden, wanted = torch.randn(500, 4, generator=g), torch.randn(500, 2, generator=g)
    weight = torch.rand(500, generator=g)
    last = torch.nn.Linear(4, 2)
    solve_last(last, hidden, wanted, weight)
    a = torch.cat([hidden, torch.ones(500, 1)], 1).double() * weight.double().sqrt()[:, None]
    truth = torch.linalg.lstsq(a, wanted.double() * weight.double().sqrt()[:, None]).solution
    assert torch.allclose(last.weight.double(), truth[:4].t(), atol=3e-3)
    assert torch.allclose(last.bias.double(), truth[4], atol=3e-3)


@torch.no_grad()
def test_too_narrow_a_network_is_left_alone() -> None:
    net = MLP((5, 8, 3), bias=True, generator=torch.Generator().manual_seed(2))
    before = [p.clone() for p in net.parameters()]
    carry(net)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
