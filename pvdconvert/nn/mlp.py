"""Small multilayer perceptrons: the heads of grid architectures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INFERENCE_ROWS = 8192
"""Rows a chunk when no gradient is recorded: activations of a 64-wide net then stay in a core's cache."""


class MLP(nn.Module):
    """Linear layers with ReLU between them and nothing after the last.

    widths      input, hidden..., output: at least two numbers >= 1; ``len(widths) - 1`` layers
    bias        whether the layers have biases (they start at 0)
    generator   where initial weights are drawn from (the global one if None): He-uniform, ``+-sqrt(6 / fan_in)`` before
                a ReLU and ``+-sqrt(3 / fan_in)`` in the last layer
    """

    def __init__(self, widths: Sequence[int], *, bias: bool, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"an MLP needs at least two widths >= 1, got {list(widths)}")
        self.widths = tuple(int(w) for w in widths)
        layers: list[nn.Module] = []
        for k, (fan_in, fan_out) in enumerate(zip(self.widths[:-1], self.widths[1:])):
            # Made empty: the constructor's own draw would move the global random state.
            layer = nn.Linear(fan_in, fan_out, bias=bias, device="meta").to_empty(device="cpu")
            bound = ((3.0 if k == len(self.widths) - 2 else 6.0) / fan_in) ** 0.5
            with torch.no_grad():
                layer.weight.uniform_(-bound, bound, generator=generator)
                if bias:
                    layer.bias.zero_()
            layers.append(layer)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., widths[0]] -> [..., widths[-1]]."""
        if torch.is_grad_enabled() or x.numel() <= INFERENCE_ROWS * self.widths[0]:
            return self._rows(x)
        rows = x.reshape(-1, self.widths[0])
        out = rows.new_empty(rows.shape[0], self.widths[-1])
        for k in range(0, rows.shape[0], INFERENCE_ROWS):
            out[k : k + INFERENCE_ROWS] = self._rows(rows[k : k + INFERENCE_ROWS])
        return out.reshape(*x.shape[:-1], self.widths[-1])

    def _rows(self, x: Tensor) -> Tensor:
        last = len(self.layers) - 1
        for k, layer in enumerate(self.layers):
            x = layer(x)
            if k < last:
                # In place: ReLU's backward needs its output only.
                x = F.relu_(x)
        return x
