"""The field of ``dvgo``: DirectVoxGO (arXiv 2111.11215, eq. 4 to 8; layouts 6.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvdconvert.errors import InputError
from pvdconvert.field import RadianceField
from pvdconvert.kernels.linear import linear
from pvdconvert.kernels.voxels import voxel_interp
from pvdconvert.nn.frequency import frequency_encode
from pvdconvert.nn.mlp import MLP
from pvdconvert.nn.voxels import SparseVoxels, cover, lattice_shape
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.dvgo_spec import DvgoOptions, mlp_widths

if TYPE_CHECKING:
    from pvdconvert.render.occupancy import Occupancy

DENSE_START = 1 << 18
"""A fresh lattice of at most so many vertices starts full; a larger one starts empty, and ``restrict`` allocates it."""
EMPTY = -100.0
"""What files hold where no cell may have density (the program's own value for such vertices)."""
ROWS = 1 << 14
SUPPORT = 128


class VertexMask(nn.Module):
    """The program's mask_cache: ``x`` belongs to vertex round(scale * x + shift), halves away from zero (layouts 10.4).

    ``grid`` uint8 [X, Y, Z]; beyond it nothing is rendered.
    """

    grid: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, grid: Tensor, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        for name, value in (("grid", grid.to(torch.uint8).contiguous()), ("scale", scale), ("shift", shift)):
            self.register_buffer(name, value, persistent=False)

    @classmethod
    def from_parts(cls, config: Mapping[str, Any], bits: Tensor) -> VertexMask:
        """The inverse of :meth:`to_config` and :attr:`bits`. Raises InputError where they do not fit each other."""
        try:
            shape = [int(v) for v in config["shape"]]
            scale, shift = (torch.tensor([float(v) for v in config[k]]) for k in ("scale", "shift"))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"dvgo: config 'mask_cache' is malformed: {error}") from error
        if len(shape) != 3 or not all(1 <= v <= 4096 for v in shape) or scale.shape != (3,) or shift.shape != (3,):
            raise InputError(f"dvgo: config 'mask_cache' is impossible: shape {shape}")
        if bits.numel() != (math.prod(shape) + 7) // 8:
            raise InputError(f"dvgo: 'mask_cache.bits' holds {bits.numel()} bytes, which is not the size of {shape}")
        raw = bits.detach().cpu().to(torch.uint8).numpy().reshape(-1)
        grid = np.unpackbits(raw, count=math.prod(shape), bitorder="little").reshape(shape)
        return cls(torch.from_numpy(grid), scale, shift)

    @property
    def bits(self) -> Tensor:
        """[ceil(cells / 8)] uint8."""
        return torch.from_numpy(np.packbits(self.grid.cpu().numpy().reshape(-1), bitorder="little"))

    def to_config(self) -> dict[str, Any]:
        return {"shape": list(self.grid.shape), "scale": self.scale.tolist(), "shift": self.shift.tolist()}

    def inside(self, x: Tensor) -> Tensor:
        """[N] bool at ``x`` [N, 3], world."""
        v = x * self.scale + self.shift
        i = torch.trunc(v + torch.copysign(torch.full_like(v, 0.5), v)).long()
        shape = torch.tensor(self.grid.shape, device=x.device)
        within = ((i >= 0) & (i < shape)).all(-1)
        i = torch.where(within[:, None], i, 0)
        return within & (self.grid[i[:, 0], i[:, 1], i[:, 2]] > 0)

    def cover(self, box: Box) -> Occupancy:
        """Cubic cells over ``box`` that hold every set cell of the mask."""
        from pvdconvert.render.occupancy import Occupancy

        cell = box.longest / min(SUPPORT, max(self.grid.shape))
        out = self.grid.float()
        for axis in range(3):
            scale, shift = float(self.scale[axis]), float(self.shift[axis])
            edges = box.min[axis] + cell * torch.arange(math.ceil(box.size[axis] / cell - 1e-6) + 1).double()
            at = edges * scale + shift
            low = torch.floor(at[:-1] + 0.5 - 1e-3)[:, None]
            high = torch.floor(at[1:] + 0.5 + 1e-3)[:, None]
            node = torch.arange(self.grid.shape[axis])[None]
            touches = ((node >= low) & (node <= high)).float().to(out.device)
            out = torch.tensordot(touches, out, dims=([1], [axis])).movedim(0, axis).clamp(max=1)
        origin = torch.tensor(box.min, dtype=torch.float32, device=out.device)
        return Occupancy(origin, cell, (out > 0).to(torch.uint8))


class DvgoField(RadianceField):
    """Raw density and features by trilinear interpolation, activated afterwards; the latent is the position itself.

    Students keep in memory only the vertices of occupied cells; files hold the dense lattice.
    """

    low: Tensor
    high: Tensor
    flops_per_point = 150.0

    def __init__(self, options: DvgoOptions, scene: Scene, seed: int = 0) -> None:
        super().__init__()
        self.options, self.seed = options, seed
        self.box = scene.box if options.box is None else Box.from_json(options.box)
        self.register_buffer("low", torch.tensor(self.box.min, dtype=torch.float32), persistent=False)
        self.register_buffer("high", torch.tensor(self.box.max, dtype=torch.float32), persistent=False)
        shape = options.shape or lattice_shape(self.box, options.resolution)
        self.voxels = SparseVoxels(self.box, shape, 1)  # its second table holds our features
        self.cache: VertexMask | None = None
        self.head: MLP | None = None
        widths = mlp_widths(options)
        if widths:
            self.head = MLP(widths, bias=True, generator=torch.Generator().manual_seed(seed + 1))
        self.feature_width = 1 + options.channels
        if math.prod(shape) <= DENSE_START:
            self.allocate(all_vertices(shape))
        else:
            self.allocate(torch.empty(0, 3, dtype=torch.int32))

    def allocate(self, vertices: Tensor) -> None:
        """Start afresh on these vertices: as thin as ``act_shift`` says and grey, deterministic in the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        features = 0.01 * torch.randn(len(vertices), self.options.channels, generator=generator)
        density = torch.zeros(len(vertices), 1, device=vertices.device)
        self.voxels.assign(vertices, density, features.to(vertices.device))

    def restrict(self, occupancy: Occupancy) -> None:
        """Keep the cells as a mask, and the vertices that cells in it are made of. Makes new parameters."""
        super().restrict(occupancy)
        v = self.voxels
        origin, per_unit = v.origin.double(), v.per_unit.double()
        low = occupancy.origin.to(origin) + occupancy.grid.nonzero().to(origin) * occupancy.cell
        slack = 1e-3  # of a voxel: positions are rounded
        a = torch.floor((low - origin) * per_unit - slack).long()
        b = torch.ceil((low + occupancy.cell - origin) * per_unit + slack).long()
        last = torch.tensor(v.shape, device=origin.device) - 1
        keep = ((b > 0) & (a < last)).all(-1)
        self.allocate(cover(a[keep].clamp_min(0), torch.minimum(b[keep], last), v.shape))

    def support(self) -> Occupancy | None:
        if self.mask is not None or self.cache is None:
            return super().support()
        return self.cache.cover(self.box)

    def encode(self, x: Tensor) -> Tensor:
        return x

    def inside(self, x: Tensor) -> Tensor:
        """[N] bool: in the box and the masks."""
        inside = ((x >= self.low) & (x <= self.high)).all(-1)
        for mask in (self.mask, self.cache):
            if mask is not None:
                inside = inside & mask.inside(x)
        return inside

    def coordinates(self, x: Tensor) -> Tensor:
        """[N, 3] vertex units, clamped to the lattice: rounding must not push a face of the box out of it."""
        last = torch.tensor(self.voxels.shape, dtype=x.dtype, device=x.device) - 1
        return torch.minimum(self.voxels.coordinates(x).nan_to_num(0.0).clamp_min(0), last)

    def raw_density(self, x: Tensor) -> Tensor:
        """[N] before activation; -inf in cells that are not allocated."""
        v = self.voxels
        return voxel_interp(self.coordinates(x), v.grid, v.density, "cell", -math.inf).squeeze(1)

    def activate(self, raw: Tensor) -> Tensor:
        """Density per world unit. DirectVoxGO's alpha of a step of length s is 1 - (1 + exp(raw + shift))^(-s / base
        voxel) = 1 - exp(-softplus(raw + shift) * s / base voxel): no approximation is made."""
        return self.options.density_scale * F.softplus(raw + self.options.act_shift)

    def inverse(self, sigma: Tensor) -> Tensor:
        """Raw values that give ``sigma`` > 0."""
        s = sigma / self.options.density_scale
        return s + torch.log(-torch.expm1(-s)) - self.options.act_shift

    def density(self, latent: Tensor) -> Tensor:
        where = self.inside(latent).nonzero().squeeze(1)
        if len(where) == len(latent):
            return self.activate(self.raw_density(latent))
        return latent.new_zeros(len(latent)).index_put((where,), self.activate(self.raw_density(latent[where])))

    def k0(self, x: Tensor) -> Tensor:
        """[N, channels]; 0 in cells that are not allocated."""
        return voxel_interp(self.coordinates(x), self.voxels.grid, self.voxels.sh)

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        if torch.is_grad_enabled() or len(latent) <= ROWS:
            return self.logits(latent, d).sigmoid()
        return torch.cat([self.logits(x, v).sigmoid() for x, v in zip(torch.split(latent, ROWS), torch.split(d, ROWS))])

    def logits(self, x: Tensor, d: Tensor) -> Tensor:
        """Colours before the sigmoid: [N, K, 3] at ``x`` [N, 3] for ``d`` [N, K, 3]."""
        n, k, _ = d.shape
        features = self.k0(x)
        if self.head is None:
            return features[:, None, :].expand(n, k, 3)
        hidden, last = self.hidden(x, features, d), self.head.layers[-1]
        assert isinstance(last, nn.Linear)
        out = F.linear(hidden, last.weight, last.bias).view(n, k, 3)
        return out if self.options.direct else out + features[:, None, :3]

    def hidden(self, x: Tensor, features: Tensor, d: Tensor) -> Tensor:
        """[N * K, width]: what the network's last layer sees. The position's share is paid once for all directions."""
        o, head = self.options, self.head
        assert head is not None
        n, k, _ = d.shape
        seen = features if o.direct else features[:, 3:]
        if o.position_frequencies is not None:
            unit = (x - self.low) / (self.high - self.low)
            waves = frequency_encode(unit, o.position_frequencies, order="channel-major")
            seen = torch.cat([seen, waves], dim=1)
        first = head.layers[0]
        assert isinstance(first, nn.Linear)
        at, towards = torch.split(first.weight, [seen.shape[1], 3 + 6 * o.view_frequencies], dim=1)
        view = frequency_encode(d.reshape(n * k, 3), o.view_frequencies, order="channel-major")
        once = linear(seen, at, first.bias) if seen.shape[1] else first.bias.expand(n, -1)
        hidden = once[:, None, :] + linear(view, towards).view(n, k, first.out_features)
        hidden = F.relu_(hidden.view(n * k, first.out_features))
        for layer in list(head.layers)[1:-1]:
            assert isinstance(layer, nn.Linear)
            hidden = F.relu_(linear(hidden, layer.weight, layer.bias))
        return hidden

    def features(self, latent: Tensor) -> Tensor:
        """[N, 1 + channels]: the value before the density activation, then the features."""
        raw = torch.nan_to_num(self.raw_density(latent), neginf=EMPTY)
        return torch.cat([raw[:, None], self.k0(latent)], dim=1)


def all_vertices(shape: tuple[int, int, int]) -> Tensor:
    """Every vertex of the lattice, x-major: int32 [V, 3]."""
    return torch.cartesian_prod(*(torch.arange(n, dtype=torch.int32) for n in shape))
