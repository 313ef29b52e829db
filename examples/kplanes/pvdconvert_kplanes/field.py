"""The field of K-Planes: positions are projected on three planes, what is read there is multiplied (paper, eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvdconvert.field import RadianceField
from pvdconvert.kernels.linear import linear
from pvdconvert.kernels.planes import PAIRS, vm_features
from pvdconvert.nn.mlp import MLP
from pvdconvert.nn.planes import truncated_exp
from pvdconvert.nn.sh import sh_basis
from pvdconvert.scene import Box, Scene
from pvdconvert_kplanes import KPlanesOptions, network_widths

ROWS = 1 << 13
"""Points a chunk of colour when no gradient is recorded: what is in flight then stays in the cache."""
BANDS = 4
"""Bands of spherical harmonics of the direction: 16 numbers."""


class KPlanesField(RadianceField):
    """``latent`` [N, C] is the decoder's features, the density before its activation, and 1 inside or 0 outside."""

    low: Tensor
    size: Tensor

    def __init__(self, options: KPlanesOptions, scene: Scene, generator: torch.Generator | None = None) -> None:
        super().__init__()
        assert options.box is not None
        assert options.resolutions is not None
        self.options, self.clip, box = options, scene.box, Box.from_json(options.box)
        # Buffers follow the field to another device; they are no weights, so they are not saved.
        self.register_buffer("low", torch.tensor(box.min), persistent=False)
        self.register_buffer("size", torch.tensor(box.size), persistent=False)
        self.planes = nn.ParameterList()
        for n in options.resolutions:
            for a, b in PAIRS:  # channel-last: [height, width, channels], width along the first axis of the pair
                values = torch.rand(n[b], n[a], options.channels, generator=generator)
                self.planes.append(nn.Parameter(0.1 + 0.4 * values))
        self.networks = nn.ModuleDict(
            {name: MLP(widths, bias=True, generator=generator) for name, widths in network_widths(options).items()}
        )
        self.feature_width = (options.width if options.decoder == "linear" else options.geo_features) + 1
        self.flops_per_point = 40.0 * options.width + 2.0 * options.width * options.hidden

    def layers(self, name: str) -> list[nn.Linear]:
        """The layers of one network."""
        mlp = self.networks[name]
        assert isinstance(mlp, MLP)
        return [layer for layer in mlp.layers if isinstance(layer, nn.Linear)]

    def plane_features(self, x: Tensor) -> Tensor:
        """[N, width] at ``x`` [N, 3]: per scale the product over the three planes. Beyond the box the border counts."""
        o, n = self.options, len(x)
        x01 = (x - self.low) / self.size
        # The core's kernel multiplies each plane by a line; with lines of ones it just reads the planes.
        ones = [torch.ones(1, o.channels, device=x.device)] * 3
        scales = []
        for s in range(0, len(self.planes), 3):
            xy, xz, yz = vm_features(x01, list(self.planes)[s : s + 3], ones).view(n, 3, o.channels).unbind(1)
            scales.append(xy * xz * yz)
        return torch.cat(scales, dim=1) if o.concat else torch.stack(scales).sum(0)

    def inside(self, x: Tensor) -> Tensor:
        """[N] bool: in the scene's box and the mask."""
        low, high = x.new_tensor(self.clip.min), x.new_tensor(self.clip.max)
        inside = ((x >= low) & (x <= high)).all(-1)
        return inside if self.mask is None else inside & self.mask.inside(x)

    def encode(self, x: Tensor) -> Tensor:  # [N, 3] -> [N, C], once a point
        where = self.inside(x).nonzero().squeeze(1)
        features = self.plane_features(x if len(where) == len(x) else x[where])
        raw = run(self.layers("sigma_net"), features)
        rows = torch.cat([features, raw] if self.options.decoder == "linear" else [raw], dim=1)
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        return rows if len(where) == len(x) else rows.new_zeros(len(x), rows.shape[1]).index_put((where,), rows)

    def density(self, latent: Tensor) -> Tensor:  # [N, C] -> [N], per world unit, >= 0
        o, raw = self.options, latent[:, -2] + self.options.density_shift
        sigma = truncated_exp(raw) if o.density_activation == "exp" else F.relu(raw)
        return torch.where(latent[:, -1] > 0, sigma, 0.0)

    def color(self, latent: Tensor, d: Tensor) -> Tensor:  # [N, C], [N, K, 3] unit -> [N, K, 3]
        shade = self._basis if self.options.decoder == "linear" else self._shade
        if torch.is_grad_enabled() or len(latent) <= ROWS:
            return shade(latent, d)
        return torch.cat([shade(a, b) for a, b in zip(torch.split(latent, ROWS), torch.split(d, ROWS), strict=True)])

    def _shade(self, latent: Tensor, d: Tensor) -> Tensor:
        """The colour network sees harmonics and features; what the features give is paid once for all directions."""
        (n, k, _), (first, *others) = d.shape, self.layers("color_net")
        towards, at = torch.split(first.weight, [BANDS**2, self.options.geo_features], dim=1)
        view = linear(sh_basis(d, BANDS).reshape(n * k, BANDS**2), towards)
        once = linear(latent[:, : self.options.geo_features], at, first.bias)
        hidden = F.relu((view.view(n, k, first.out_features) + once[:, None]).view(n * k, first.out_features))
        return run(others, hidden).view(n, k, 3).sigmoid()

    def _basis(self, latent: Tensor, d: Tensor) -> Tensor:
        """Colours are products of the features with a basis that a network makes of the direction (paper, eq. 5)."""
        n, k, _ = d.shape
        basis = run(self.layers("color_basis"), d.reshape(n * k, 3)).view(n, k, 3, self.options.width)
        return (basis * latent[:, None, None, : self.options.width]).sum(-1).sigmoid()

    def features(self, latent: Tensor) -> Tensor:  # [N, C] -> [N, feature_width]
        return latent[:, :-1]


def run(layers: list[nn.Linear], x: Tensor) -> Tensor:
    """Layers with ReLU between them."""
    for k, layer in enumerate(layers):
        x = linear(F.relu(x) if k else x, layer.weight, layer.bias)
    return x
