"""A small network's closed forms: units that hand inputs on, and its last layer by ridge regression."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pvdconvert.nn.mlp import MLP

RIDGE = 1e-3


@torch.no_grad()
def carry(head: MLP, count: int = 3) -> None:
    """2 ``count`` units of each hidden layer hand the first ``count`` inputs on, their positive and negative parts
    apart, so that the last layer can have them back. Nothing where a layer is too narrow for that."""
    if min(head.widths[1:-1], default=0) < 4 * count:
        return
    eye = torch.eye(count)
    for k, layer in enumerate(list(head.layers)[:-1]):
        assert isinstance(layer, nn.Linear)
        carried = torch.cat([eye, -eye]) if k == 0 else torch.eye(2 * count)
        layer.weight[: 2 * count] = 0.0
        layer.weight[: 2 * count, : carried.shape[1]] = carried.to(layer.weight)
        if layer.bias is not None:
            layer.bias[: 2 * count] = 0.0


@torch.no_grad()
def solve_last(last: nn.Linear, hidden: Tensor, wanted: Tensor, weight: Tensor) -> None:
    """``last`` [K, H] so that it makes ``wanted`` [N, K] of ``hidden`` [N, H]; errors count by ``weight`` [N]."""
    bias = last.bias is not None
    a = (torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1) if bias else hidden).double()
    w = weight.double()[:, None]
    normal = a.t() @ (w * a)
    normal += torch.eye(len(normal), device=a.device) * (RIDGE * normal.diagonal().mean() + 1e-12)
    solution = torch.linalg.solve(normal, a.t() @ (w * wanted)).to(last.weight.dtype)
    last.weight.copy_(solution[: hidden.shape[1]].t())
    if bias:
        last.bias.copy_(solution[-1])
