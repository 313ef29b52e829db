"""The perceptron of `nerf`: layers as on disk, evaluated in the cheapest order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from pvdconvert.kernels.linear import linear
from pvdconvert.nn.frequency import frequency_encode
from pvdconvert.nn.sh import sh_basis
from pvdconvert_plugins.nerf_spec import NerfOptions


class Layer(nn.Module):
    """Weight [out, in] and bias [out] of a linear layer, made empty: values come from ``Nerf.build`` or from a file."""

    def __init__(self, wide: int, units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(units, wide))
        self.bias = nn.Parameter(torch.empty(units))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Network(nn.Module):
    """One perceptron: trunk, density, optional bottleneck, direction layers, rgb; named as the tensors on disk."""

    def __init__(self, options: NerfOptions, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()

        def layer(name: str) -> Layer:
            units, wide = shapes[f"{name}.weight"]
            return Layer(wide, units)

        self.options = options
        self.trunk = nn.ModuleList(layer(f"trunk.{i}") for i in range(options.depth))
        self.density = layer("density")
        if options.bottleneck_width is not None:
            self.bottleneck = layer("bottleneck")
        self.direction = nn.ModuleList(layer(f"direction.{j}") for j in range(len(options.direction_layers)))
        self.rgb = layer("rgb")

    def hidden(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The trunk: ``x`` [N, 3] in the network's input space -> [N, width], into ``out`` if given (no gradient)."""
        o = self.options
        encoded = self._waves(x, o.position_frequencies, o.position_step)
        h = encoded
        for i, layer in enumerate(self.trunk):
            if i - 1 in o.skips:
                h = torch.cat([encoded, h], dim=1)
            h = layer(h)
            last = out if i == o.depth - 1 else None
            if i > 0 or o.first_activation:
                h = h.relu_() if last is None else torch.clamp_min(h, 0.0, out=last)
            elif last is not None:
                h = last.copy_(h)
        return h

    def encode_direction(self, d: Tensor) -> Tensor:
        """[M, 3] unit -> [M, direction_width]."""
        o = self.options
        if o.direction_length != 1.0:
            d = d * o.direction_length
        if o.direction_encoding == "sh":
            return sh_basis(d, o.direction_bands)
        return self._waves(d, o.direction_frequencies, o.direction_step)

    def _waves(self, x: Tensor, count: int, step: float) -> Tensor:
        o = self.options
        return frequency_encode(
            x, count, include_input=o.include_input, order=o.encoding_order, scale=o.frequency_scale, step=step
        )

    def color(self, h: Tensor, d: Tensor) -> Tensor:
        """``h`` [N, width], ``d`` [N, K, 3] -> [N, K, 3].

        The first layer that sees the direction is linear in [bottleneck, encoded direction]: its first part is computed
        once a point, and a linear bottleneck is multiplied into it.
        """
        n, k, _ = d.shape
        o = self.options
        first, *rest = cast("list[Layer]", [*self.direction, self.rgb])
        wide = first.weight.shape[1] - o.direction_width
        weight: Tensor = first.weight[:, :wide]
        bias: Tensor = first.bias
        if o.bottleneck_width is not None:
            if o.bottleneck_activation == "relu":
                h = self.bottleneck(h).relu_()
            else:
                bias = bias + weight @ self.bottleneck.bias
                weight = weight @ self.bottleneck.weight
        y = linear(h, weight, bias)[:, None]  # [N, 1, U]
        if o.direction_width:
            encoded = self.encode_direction(d.reshape(n * k, 3))
            y = linear(encoded, first.weight[:, wide:]).view(n, k, y.shape[-1]).add_(y)
        y = y.flatten(0, 1)
        for layer in rest:
            y = layer(y.relu_())
        return y.sigmoid().view(n, k if o.direction_width else 1, 3).expand(n, k, 3)
