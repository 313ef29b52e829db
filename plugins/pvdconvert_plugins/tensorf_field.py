"""The field of ``tensorf``: TensoRF's vector-matrix decomposition (arXiv 2203.09517; layouts 3.2, 3.3)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvdconvert.field import RadianceField
from pvdconvert.kernels.linear import linear
from pvdconvert.nn.frequency import frequency_encode
from pvdconvert.nn.mlp import MLP
from pvdconvert.nn.planes import VectorMatrix, truncated_exp
from pvdconvert.nn.sh import sh_basis
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.tensorf_spec import TensorfOptions

ROWS = 1 << 14
"""Rows a chunk of colour when no gradient is recorded: what is in flight then stays in the cache."""

THIN, THICK = 1e-3, 10.0
"""Optical thickness of a voxel below which it is empty and above which it is opaque; projections go no further."""


class TensorfField(RadianceField):
    """Density and colour features are sums and lists of plane x line products; ``latent`` is the position itself."""

    low: Tensor
    size: Tensor

    def __init__(self, options: TensorfOptions, scene: Scene, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.options = options
        self.box = scene.box if options.box is None else Box.from_json(options.box)
        self.register_buffer("low", torch.tensor(self.box.min), persistent=False)
        self.register_buffer("size", torch.tensor(self.box.size), persistent=False)
        n, features = options.resolution, options.color_features
        self.density_grid = VectorMatrix(n, options.density_ranks, generator=generator)
        self.color_grid = VectorMatrix(n, options.color_ranks, generator=generator)
        # He-uniform like the heads that follow; the products it mixes are small.
        self.basis = MLP((sum(options.color_ranks), features), bias=False, generator=generator)
        self.head: MLP | None = None
        if options.shading == "mlp":
            widths = [self._fea_width() + self._view_width(), *[options.mlp_width] * (options.mlp_layers - 1), 3]
            self.head = MLP(widths, bias=True, generator=generator)
        self.feature_width = 1 + features
        self.flops_per_point = 12.0 * sum(options.density_ranks) + 50.0

    def _fea_width(self) -> int:
        return self.options.color_features * (1 + 2 * self.options.fea_pe)

    def _view_width(self) -> int:
        o = self.options
        return o.view_bands**2 if o.view_encoding == "sh" else 3 + 6 * o.view_pe

    def encode(self, x: Tensor) -> Tensor:
        return x

    def unit(self, x: Tensor) -> Tensor:
        """``x`` [N, 3] in the unit cube of the box; outside of it beyond [0, 1]."""
        return (x - self.low) / self.size

    def inside(self, x: Tensor, x01: Tensor) -> Tensor:
        """[N] bool: in the box and the mask."""
        inside = ((x01 >= 0) & (x01 <= 1)).all(-1)
        return inside if self.mask is None else inside & self.mask.inside(x)

    def density(self, latent: Tensor) -> Tensor:
        x01 = self.unit(latent)
        where = self.inside(latent, x01).nonzero().squeeze(1)
        if len(where) == len(latent):
            return self.activate(self.density_grid.sum(x01))
        return latent.new_zeros(len(latent)).index_put((where,), self.activate(self.density_grid.sum(x01[where])))

    def activate(self, raw: Tensor) -> Tensor:
        """Density per world unit from sums of components."""
        o = self.options
        if o.density_activation == "exp":
            return o.density_scale * truncated_exp(raw + o.density_shift)
        if o.density_activation == "relu":
            return o.density_scale * F.relu(raw)
        return o.density_scale * F.softplus(raw + o.density_shift)

    def inverse(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Sums that give ``sigma`` [N], cut to what matters in a voxel, and int8 [N]: -1 where cut below, +1 above."""
        o = self.options
        low, high = self._cuts()
        s = (sigma / o.density_scale).clamp(low, high)
        if o.density_activation == "exp":
            raw = s.log() - o.density_shift
        elif o.density_activation == "softplus":
            raw = s + torch.log(-torch.expm1(-s)) - o.density_shift
        else:
            raw = s
        side = (sigma >= high * o.density_scale).to(torch.int8) - (sigma <= low * o.density_scale).to(torch.int8)
        return raw, side

    def _cuts(self) -> tuple[float, float]:
        """Activated values that are as good as empty and as good as opaque over a voxel."""
        voxel = self.box.longest / (max(self.options.resolution) - 1) * self.options.density_scale
        return THIN / voxel, THICK / voxel

    def color_features(self, x01: Tensor) -> Tensor:
        """[N, color_features] at ``x01`` [N, 3]."""
        return linear(self.color_grid.features(x01), self.basis.layers[0].get_parameter("weight"))

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        if torch.is_grad_enabled() or len(latent) <= ROWS:
            return self._color(latent, d)
        return torch.cat([self._color(x, v) for x, v in zip(torch.split(latent, ROWS), torch.split(d, ROWS))])

    def _color(self, x: Tensor, d: Tensor) -> Tensor:
        o = self.options
        features = self.color_features(self.unit(x))
        if self.head is not None:
            return self._shade(self.head, features, d)
        raw = sh_basis(d, o.bands) @ features.view(-1, 3, o.bands**2).transpose(1, 2)
        return raw.sigmoid() if o.color_activation == "sigmoid" else F.relu(raw + 0.5)

    def _shade(self, head: MLP, features: Tensor, d: Tensor) -> Tensor:
        """The first layer is split: its position part is paid once, whatever the number of directions."""
        o, first = self.options, head.layers[0]
        assert isinstance(first, nn.Linear)
        n, k, _ = d.shape
        if o.view_encoding == "sh":
            view, plain = sh_basis(d, o.view_bands), o.view_bands**2
        else:
            waves = _waves(d.reshape(n * k, 3), o.view_pe)
            view, plain = waves.view(n, k, waves.shape[-1]), 3
        sizes = [o.color_features, plain, 2 * o.fea_pe * o.color_features, view.shape[-1] - plain]
        fea, direct, fea_waves, view_waves = torch.split(first.weight, sizes, dim=1)
        hidden = linear(_waves(features, o.fea_pe), torch.cat([fea, fea_waves], dim=1), first.bias)
        directions = linear(view.view(n * k, view.shape[-1]), torch.cat([direct, view_waves], dim=1))
        hidden = (hidden[:, None, :] + directions.view(n, k, hidden.shape[-1])).view(n * k, hidden.shape[-1])
        for layer in list(head.layers)[1:]:
            assert isinstance(layer, nn.Linear)
            hidden = linear(F.relu_(hidden), layer.weight, layer.bias)
        return hidden.view(n, k, 3).sigmoid()

    def features(self, latent: Tensor) -> Tensor:
        """[N, 1 + color_features]: the sum before the density activation, then the colour features."""
        x01 = self.unit(latent)
        return torch.cat([self.density_grid.sum(x01)[:, None], self.color_features(x01)], dim=1)

    def upsample(self, resolution: tuple[int, int, int]) -> None:
        """Interpolate planes and lines to another ``resolution``: new parameters, so optimisers must be made anew."""
        self.density_grid.resample(resolution)
        self.color_grid.resample(resolution)
        self.options = dataclasses.replace(self.options, resolution=resolution)


def _waves(x: Tensor, octaves: int) -> Tensor:
    return frequency_encode(x, octaves, order="channel-major") if octaves else x
