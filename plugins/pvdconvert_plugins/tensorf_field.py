"""The field of ``tensorf``: TensoRF's vector-matrix decomposition (arXiv 2203.09517; layouts 3.2, 3.3).

:class:`TensorialField` is what it shares with other decompositions: everything but how components are stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvdconvert.errors import InputError
from pvdconvert.field import RadianceField
from pvdconvert.kernels.linear import linear
from pvdconvert.nn.clipped import clipped_exp
from pvdconvert.nn.frequency import frequency_encode
from pvdconvert.nn.mlp import MLP
from pvdconvert.nn.planes import VectorMatrix, truncated_exp
from pvdconvert.nn.sh import sh_basis
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.tensorf_mask import AlphaMask
from pvdconvert_plugins.tensorf_spec import TensorfOptions, TensorialOptions

ROWS = 1 << 14
"""Rows a chunk of colour when no gradient is recorded: what is in flight then stays in the cache."""

THIN, THICK = 1e-3, 10.0
"""Optical thickness of a voxel below which it is empty and above which it is opaque; projections go no further."""


class Components(Protocol):
    """A tensor decomposition of several functions on the unit cube."""

    def sum(self, x01: Tensor) -> Tensor:
        """[N] at ``x01`` [N, 3]."""
        ...

    def features(self, x01: Tensor) -> Tensor:
        """[N, components] at ``x01`` [N, 3]."""
        ...

    def export(self, name: str) -> dict[str, Tensor]:
        """Its tensors in TensoRF's names and shapes."""
        ...

    def resample(self, resolution: Sequence[int]) -> None:
        """Interpolate to another ``resolution``."""
        ...


class TensorialField(RadianceField):
    """Density and colour features are sums and lists of products of factors; ``latent`` is the position itself."""

    low: Tensor
    size: Tensor
    density_grid: Components
    color_grid: Components
    alpha_mask: AlphaMask | None

    def __init__(
        self,
        options: TensorialOptions,
        scene: Scene,
        density_grid: Components,
        color_grid: Components,
        components: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """``components``: how many products of ``color_grid`` basis_mat mixes."""
        super().__init__()
        self.options, self.density_grid, self.color_grid = options, density_grid, color_grid
        self.box = scene.box if options.box is None else Box.from_json(options.box)
        self.register_buffer("low", torch.tensor(self.box.min), persistent=False)
        self.register_buffer("size", torch.tensor(self.box.size), persistent=False)
        self.outer = scene.box if options.padding == "zero" else None
        self.alpha_mask = None
        self.warp = _warp(scene) if options.view_space == "ndc" else None
        features = options.color_features
        # He-uniform like the heads that follow; the products it mixes are small.
        self.basis = MLP((components, features), bias=False, generator=generator)
        self.head: MLP | None = None
        if options.shading == "mlp":
            widths = [options.head_input, *[options.mlp_width] * (options.mlp_layers - 1), 3]
            self.head = MLP(widths, bias=options.mlp_bias, generator=generator)
        self.feature_width = 1 + features

    def encode(self, x: Tensor) -> Tensor:
        return x

    def unit(self, x: Tensor) -> Tensor:
        """``x`` [N, 3] in the unit cube of the box; outside of it beyond [0, 1]."""
        return (x - self.low) / self.size

    def inside(self, x: Tensor, x01: Tensor) -> Tensor:
        """[N] bool: where there may be density."""
        if self.outer is None:
            inside = ((x01 >= 0) & (x01 <= 1)).all(-1)
        else:
            low, high = x.new_tensor(self.outer.min), x.new_tensor(self.outer.max)
            inside = ((x >= low) & (x <= high)).all(-1)
        for mask in (self.mask, self.alpha_mask):
            inside = inside if mask is None else inside & mask.inside(x)
        return inside

    def support(self) -> Occupancy | None:
        return super().support() if self.alpha_mask is None else self.alpha_mask.support()

    def fade(self, x01: Tensor) -> Tensor | None:
        """[N, 1]: what zero padding leaves of every product at ``x01`` [N, 3]; None = all of it."""
        if self.outer is None:
            return None
        last = x01.new_tensor(self.options.resolution) - 1
        beyond = (x01 - x01.clamp(0, 1)).abs() * last
        return (1 - beyond).clamp(min=0).prod(-1, keepdim=True)

    def density(self, latent: Tensor) -> Tensor:
        x01 = self.unit(latent)
        where = self.inside(latent, x01).nonzero().squeeze(1)
        if len(where) == len(latent):
            return self.activate(self.raw_density(x01))
        return latent.new_zeros(len(latent)).index_put((where,), self.activate(self.raw_density(x01[where])))

    def raw_density(self, x01: Tensor) -> Tensor:
        """Sum of the density's components [N] at ``x01`` [N, 3]."""
        raw, fade = self.density_grid.sum(x01), self.fade(x01)
        return raw if fade is None else raw * fade[:, 0]

    def activate(self, raw: Tensor) -> Tensor:
        """Density per world unit from sums of components."""
        o = self.options
        if o.density_clip is not None:
            low, high = o.density_clip
            if o.density_activation == "exp":
                return o.density_scale * clipped_exp(
                    raw + o.density_shift, low + o.density_shift, high + o.density_shift
                )
            raw = raw.clamp(low, high)
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
        products, fade = self.color_grid.features(x01), self.fade(x01)
        out = linear(products if fade is None else products * fade, self.basis.layers[0].get_parameter("weight"))
        return out if self.options.feature_clip is None else out.clamp(*self.options.feature_clip)

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        if torch.is_grad_enabled() or len(latent) <= ROWS:
            return self._color(latent, d)
        return torch.cat([self._color(x, v) for x, v in zip(torch.split(latent, ROWS), torch.split(d, ROWS))])

    def _color(self, x: Tensor, d: Tensor) -> Tensor:
        o = self.options
        x01 = self.unit(x)
        features = self.color_features(x01)
        if self.warp is not None:
            d = warped_directions(x, d, *self.warp)
        if self.head is not None:
            return self._shade(self.head, features, x01, d)
        if o.shading == "rgb":
            raw = features[:, None, :].expand(d.shape)
            return _activated(raw, o.color_activation)
        raw = sh_basis(d, o.bands) @ features.view(-1, 3, o.bands**2).transpose(1, 2)
        return _activated(raw + 0.5 if o.color_activation == "relu" else raw, o.color_activation)

    def hidden(self, x: Tensor, d: Tensor) -> Tensor:
        """[N * K, width]: what the head's last layer is given at ``x`` [N, 3] for directions ``d`` [N, K, 3]."""
        assert self.head is not None
        x01 = self.unit(x)
        if self.warp is not None:
            d = warped_directions(x, d, *self.warp)
        return F.relu_(self._before_last(self.head, self.color_features(x01), x01, d))

    def _shade(self, head: MLP, features: Tensor, x01: Tensor, d: Tensor) -> Tensor:
        last = list(head.layers)[-1]
        assert isinstance(last, nn.Linear)
        raw = self._before_last(head, features, x01, d)
        if len(head.layers) > 1:
            raw = linear(F.relu_(raw), last.weight, last.bias)
        return raw.view(*d.shape[:2], 3).sigmoid()

    def _before_last(self, head: MLP, features: Tensor, x01: Tensor, d: Tensor) -> Tensor:
        """[N * K, width] before the last ReLU. The first layer is split: its position part is paid once, whatever the
        number of directions."""
        o, first = self.options, head.layers[0]
        assert isinstance(first, nn.Linear)
        n, k, _ = d.shape
        if o.view_encoding == "sh":
            view, plain = sh_basis(d, o.view_bands), o.view_bands**2
        else:
            waves = self._waves(d.reshape(n * k, 3), o.view_pe)
            view, plain = waves.view(n, k, waves.shape[-1]), 3
        sizes = [o.color_features, plain, 2 * o.fea_pe * o.color_features, 6 * o.pos_pe, view.shape[-1] - plain]
        fea, direct, fea_waves, pos_waves, view_waves = torch.split(first.weight, sizes, dim=1)
        known = self._waves(features, o.fea_pe)
        if o.pos_pe:
            known = torch.cat([known, self._waves(x01 * 2 - 1, o.pos_pe)[:, 3:]], dim=1)
        hidden = linear(known, torch.cat([fea, fea_waves, pos_waves], dim=1), first.bias)
        directions = linear(view.view(n * k, view.shape[-1]), torch.cat([direct, view_waves], dim=1))
        hidden = (hidden[:, None, :] + directions.view(n, k, hidden.shape[-1])).view(n * k, hidden.shape[-1])
        for layer in list(head.layers)[1:-1]:
            assert isinstance(layer, nn.Linear)
            hidden = linear(F.relu_(hidden), layer.weight, layer.bias)
        return hidden

    def _waves(self, x: Tensor, count: int) -> Tensor:
        """[x, all sines, all cosines] of ``x`` [N, D], channel-major."""
        o = self.options
        if not count:
            return x
        if o.wave_scale == 1.0 and o.wave_step == 1.0:
            return frequency_encode(x, count, order="channel-major")
        frequencies = o.wave_scale * torch.exp2(o.wave_step * torch.arange(count, dtype=x.dtype, device=x.device))
        phase = (x[:, :, None] * frequencies).flatten(1)
        return torch.cat([x, phase.sin(), phase.cos()], dim=1)

    def features(self, latent: Tensor) -> Tensor:
        """[N, 1 + color_features]: the sum before the density activation, then the colour features."""
        x01 = self.unit(latent)
        return torch.cat([self.raw_density(x01)[:, None], self.color_features(x01)], dim=1)

    def upsample(self, resolution: tuple[int, int, int]) -> None:
        """Interpolate to another ``resolution``: new parameters, so optimisers must be made anew."""
        self.density_grid.resample(resolution)
        self.color_grid.resample(resolution)
        self.options = dataclasses.replace(self.options, resolution=resolution)


class TensorfField(TensorialField):
    """Products of three planes and three lines."""

    options: TensorfOptions
    density_grid: VectorMatrix
    color_grid: VectorMatrix

    def __init__(self, options: TensorfOptions, scene: Scene, generator: torch.Generator | None = None) -> None:
        density = VectorMatrix(options.resolution, options.density_ranks, generator=generator)
        color = VectorMatrix(options.resolution, options.color_ranks, generator=generator)
        super().__init__(options, scene, density, color, sum(options.color_ranks), generator)
        self.flops_per_point = 12.0 * sum(options.density_ranks) + 50.0


def _activated(raw: Tensor, activation: str) -> Tensor:
    if activation == "sigmoid":
        return raw.sigmoid()
    return F.relu(raw) if activation == "relu" else raw


def _warp(scene: Scene) -> tuple[float, float]:
    """Where the NDC warp of the scene's camera puts slopes x/z and y/z: factors of both."""
    space = scene.ray_space
    if space.kind != "ndc" or not space.width or not space.height or not space.focal:
        raise InputError(
            "view_space=ndc: the scene has no NDC warp with width, height and focal",
            hint="add --extra width=1008 --extra height=756 --extra focal=815 or whatever the pictures have",
        )
    return -2.0 * space.focal / space.width, -2.0 * space.focal / space.height


def warped_directions(x: Tensor, d: Tensor, ax: float, ay: float) -> Tensor:
    """Unit directions [N, K, 3] of the warped rays through NDC positions ``x`` [N, 3] whose world rays go along ``d``.

    Every world ray of one direction ends in one point of NDC, (ax dx / dz, ay dy / dz, 1): from there backwards.
    """
    dz = d[..., 2].clamp(max=-1e-6)
    end = torch.stack([ax * d[..., 0] / dz, ay * d[..., 1] / dz, torch.ones_like(dz)], dim=-1)
    return F.normalize(end - x[:, None, :], dim=-1)
