"""The field of ``hybrid``: encodings of the position, joined, and a decoder."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvdconvert.field import RadianceField
from pvdconvert.nn.mlp import MLP
from pvdconvert.nn.planes import truncated_exp
from pvdconvert.nn.sh import sh_basis
from pvdconvert.nn.voxels import live_relu
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.hybrid_encoders import Voxels, combine, make
from pvdconvert_plugins.hybrid_spec import HybridOptions, decoder_widths, joined_width


class HybridField(RadianceField):
    """Its latent is [joined encoding (E), decoded (1 + D), inside (1)]; decoded[:, 0] is the density before activation.

    D = geo_features, or 3 * sh_bands^2 coefficients, colour-major, of the sh decoder. Rows outside are 0.
    """

    low: Tensor
    size: Tensor

    def __init__(self, options: HybridOptions, scene: Scene, seed: int = 0) -> None:
        super().__init__()
        self.options = options
        self.box = scene.box if options.box is None else Box.from_json(options.box)
        self.register_buffer("low", torch.tensor(self.box.min), persistent=False)
        self.register_buffer("size", torch.tensor(self.box.size), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        self.encoders = make(options, self.box, seed, generator)
        bias = options.mlp_bias or options.decoder == "sh"
        self.networks = nn.ModuleDict(
            {name: MLP(widths, bias=bias, generator=generator) for name, widths in decoder_widths(options).items()}
        )
        first = next(iter(decoder_widths(options).values()))
        self.feature_width = joined_width(options)
        self.flops_per_point = 2.0 * sum(a * b for a, b in itertools.pairwise(first)) + 40.0 * self.feature_width

    @property
    def voxels(self) -> Voxels | None:
        """The sparse encoder, if the composition has it."""
        return next((e for e in self.encoders.values() if isinstance(e, Voxels)), None)

    def restrict(self, occupancy: Occupancy) -> None:
        """Keep the cells as a mask; voxels are allocated only there, which makes a new parameter."""
        super().restrict(occupancy)
        if self.voxels is not None:
            self.voxels.restrict(occupancy)

    def inside(self, x: Tensor, x01: Tensor) -> Tensor:
        """[N] bool: in the box, the mask, and where voxels are stored."""
        inside = ((x01 >= 0) & (x01 <= 1)).all(-1)
        if self.mask is not None:
            inside = inside & self.mask.inside(x)
        return inside if self.voxels is None else inside & self.voxels.inside(x01)

    def joined(self, x01: Tensor) -> Tensor:
        """[N, E] at ``x01`` [N, 3] in the unit cube; without encoders the position in [-1, 1]."""
        if not len(self.encoders):
            return 2 * x01 - 1
        return combine([encoder(x01) for encoder in self.encoders.values()], self.options.join)

    def encode(self, x: Tensor) -> Tensor:
        x01 = (x - self.low) / self.size
        where = self.inside(x, x01).nonzero().squeeze(1)
        joined = self.joined(x01 if len(where) == len(x) else x01[where])
        decode = self.networks["sh_net" if self.options.decoder == "sh" else "sigma_net"]
        rows = torch.cat([joined, decode(joined), torch.ones_like(joined[:, :1])], dim=1)
        return rows if len(where) == len(x) else rows.new_zeros(len(x), rows.shape[1]).index_put((where,), rows)

    def density(self, latent: Tensor) -> Tensor:
        o, raw = self.options, latent[:, self.feature_width] + self.options.density_shift
        if o.density_activation == "exp":
            sigma = truncated_exp(raw)
        else:
            sigma = F.softplus(raw) if o.density_activation == "softplus" else live_relu(raw)
        return torch.where(latent[:, -1] > 0, o.density_scale * sigma, 0.0)

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        n, k, _ = d.shape
        o, seen = self.options, latent[:, joined_width(self.options) + 1 : -1]
        if o.decoder == "sh":
            coefficients = seen.reshape(n, 3, o.sh_bands**2).transpose(1, 2)
            return (sh_basis(d, o.sh_bands) @ coefficients).sigmoid()
        parts = [sh_basis(d, o.view_bands), seen[:, None, :].expand(n, k, -1)]
        raw: Tensor = self.networks["color_net"](torch.cat(parts, dim=-1))
        return raw.sigmoid()

    def features(self, latent: Tensor) -> Tensor:
        """[N, E]: the joined encoding."""
        return latent[:, : self.feature_width]
