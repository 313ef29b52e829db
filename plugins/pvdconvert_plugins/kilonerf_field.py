"""The field of `kilonerf`: points are sorted by network, and each network answers for its own in one product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvdconvert.errors import InputError
from pvdconvert.field import RadianceField
from pvdconvert.nn.frequency import frequency_encode
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.kilonerf_spec import KilonerfOptions

MOST_POINTS = 1024
"""Points that a network answers for at once."""
MOST_ROWS = 1 << 15
"""Padded rows of a batched product."""


def batches(net: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(networks [G], points [G, M], which of them are real [G, M]) until every point of ``net`` [P] int64 had its turn.

    Networks with about as many points (within a factor of two) share a batch, so that little is padded.
    """
    if not len(net):
        return
    order = torch.argsort(net, stable=True)
    ids, counts = torch.unique_consecutive(net[order], return_counts=True)
    start = torch.cumsum(counts, 0) - counts
    pieces = torch.div(counts + MOST_POINTS - 1, MOST_POINTS, rounding_mode="floor")
    piece = torch.repeat_interleave(torch.arange(len(ids), device=net.device), pieces)
    number = torch.arange(len(piece), device=net.device) - (torch.cumsum(pieces, 0) - pieces)[piece]
    start, count = start[piece] + number * MOST_POINTS, (counts[piece] - number * MOST_POINTS).clamp_max(MOST_POINTS)
    size = torch.ceil(torch.log2(count.double())).long()
    for level in torch.unique(size).tolist():
        mine = (size == level).nonzero().squeeze(1)
        most = int(count[mine].max())
        step = torch.arange(most, device=net.device)
        for part in torch.split(mine, max(1, MOST_ROWS // most)):
            real = step < count[part, None]
            at = (start[part, None] + step).clamp_max(len(net) - 1)
            yield ids[piece[part]], order[at], real


class Layers(nn.Module):
    """Weight [N, in, out] and bias [N, out] of a layer of N networks; [in, out] and [out] of one that all share."""

    def __init__(self, weight: tuple[int, ...], bias: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(weight))
        self.bias = nn.Parameter(torch.empty(bias))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """``x`` [G, M, in] of networks ``ids`` [G] -> [G, M, out]."""
        if self.weight.dim() == 2:
            return x @ self.weight + self.bias
        return torch.baddbmm(self.bias[ids, None], x, self.weight[ids])


class KilonerfField(RadianceField):
    """The latent is [hidden (width), number of the network, inside (1 or 0)]. Networks share no features: no tap."""

    low: Tensor
    high: Tensor
    occupied: Tensor | None

    def __init__(self, options: KilonerfOptions, scene: Scene) -> None:
        super().__init__()
        self.options = options
        shapes = options.shapes()

        def layers(name: str) -> Layers:
            return Layers(shapes[f"{name}.weight"], shapes[f"{name}.bias"])

        self.trunk = nn.ModuleList(layers(f"trunk.{i}") for i in range(options.depth))
        self.density_layer, self.feature = layers("density"), layers("feature")
        self.diffuse = layers("diffuse") if options.view_independent else None
        self.direction, self.rgb = layers("direction"), layers("rgb")
        box = scene.box if options.box is None else Box.from_json(options.box)
        self.register_buffer("low", torch.tensor(box.min), persistent=False)
        self.register_buffer("high", torch.tensor(box.max), persistent=False)
        self.register_buffer("occupied", None, persistent=False)
        self.flops_per_point = 4.0 * sum(p.numel() for p in self.trunk.parameters()) / options.networks
        self.batch_points = 1 << 13

    def _cell(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """[P] int64: the C-order number of the cell of ``shape`` in which ``x`` [P, 3] lies; outside: the nearest."""
        size = torch.tensor(shape, device=x.device)
        i = ((x - self.low) / ((self.high - self.low) / size)).long().clamp_min(0).minimum(size - 1)
        return (i[:, 0] * shape[1] + i[:, 1]) * shape[2] + i[:, 2]

    def _local(self, x: Tensor, net: Tensor) -> Tensor:
        """``x`` [P, 3] in the coordinates of its network's cell, -1 to 1."""
        _, ny, nz = self.options.resolution
        size = torch.tensor(self.options.resolution, device=x.device)
        i = torch.stack([net // (ny * nz), net // nz % ny, net % nz], 1)
        side = (self.high - self.low) / size
        return 2 * (x - (self.low + side * i)) / side - 1

    def encode(self, x: Tensor) -> Tensor:
        o = self.options
        inside = ((x >= self.low + o.margin) & (x <= self.high - o.margin)).all(-1)
        if self.mask is not None:
            inside = inside & self.mask.inside(x)
        if self.occupied is not None:
            assert o.occupancy is not None
            inside = inside & self.occupied[self._cell(x, tuple(o.occupancy))]
        net = self._cell(x, o.resolution)
        live = inside.nonzero().squeeze(1)
        e = frequency_encode(self._local(x[live], net[live]), o.position_frequencies)

        def run(ids: Tensor, rows: Tensor) -> Tensor:
            encoded = h = e[rows]
            for i, layer in enumerate(self.trunk):
                if i > 0 and i - 1 == o.refeed:
                    h = torch.cat([encoded, h], -1)
                h = layer(h, ids).relu()
            return h

        hidden = x.new_zeros(x.shape[0], o.width).index_copy(0, live, self._each(net[live], run, o.width, x))
        return torch.cat([hidden, net[:, None].to(x.dtype), inside[:, None].to(x.dtype)], 1)

    def _each(self, net: Tensor, run: Any, width: int, like: Tensor) -> Tensor:
        """``run(networks [G], points [G, M]) -> [G, M, width]`` for all points of ``net`` [P]: [P, width]."""
        values, places = [like.new_zeros(0, width)], [net[:0]]
        for ids, rows, real in batches(net):
            values.append(run(ids, rows)[real])
            places.append(rows[real])
        place = torch.cat(places)
        return torch.cat(values)[torch.argsort(place)]

    def density(self, latent: Tensor) -> Tensor:
        o = self.options
        net = latent[:, o.width].detach().long()
        head = self.density_layer
        raw = (latent[:, : o.width] * head.weight[net, :, 0]).sum(1) + head.bias[net, 0]
        value = raw.relu() if o.density_activation == "relu" else F.softplus(raw)
        return torch.where(latent[:, -1] > 0, value * o.density_scale, 0.0)

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        o = self.options
        n, k, _ = d.shape
        net = latent[:, o.width].detach().long()
        hidden = latent[:, : o.width]
        view = frequency_encode(d.reshape(n * k, 3), o.direction_frequencies).view(n, k, o.direction_columns)

        def run(ids: Tensor, rows: Tensor) -> Tensor:
            g, m = rows.shape
            h = hidden[rows]
            feature = self.feature(h, ids)[:, :, None].expand(g, m, k, o.feature_width)
            y = torch.cat([feature, view[rows]], -1).flatten(1, 2)
            rgb = self.rgb(self.direction(y, ids).relu(), ids).view(g, m, k, 3)
            if self.diffuse is not None:
                rgb = rgb + self.diffuse(h, ids)[:, :, None]
            return torch.sigmoid(rgb).reshape(g, m, 3 * k)

        return self._each(net, run, 3 * k, latent).view(n, k, 3)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters by their names on disk."""
        return {name.replace("density_layer", "density"): p for name, p in self.named_parameters()}

    def set_occupancy(self, bits: Tensor) -> None:
        """Cells of the program's own grid, C order, eight a byte, least significant bit first."""
        shape = self.options.occupancy
        assert shape is not None
        count = shape[0] * shape[1] * shape[2]
        if bits.dtype != torch.uint8 or bits.numel() != (count + 7) // 8:
            raise InputError(f"kilonerf: tensor 'occupancy.bits' must be {(count + 7) // 8} bytes")
        shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
        self.occupied = (bits.reshape(-1, 1) >> shifts & 1).reshape(-1)[:count].bool()

    def occupancy_bits(self) -> Tensor:
        """The inverse of :meth:`set_occupancy`."""
        assert self.occupied is not None
        flat = F.pad(self.occupied.cpu().to(torch.uint8), (0, -len(self.occupied) % 8)).view(-1, 8)
        return (flat << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def check_tensors(expected: Mapping[str, tuple[int, ...]], masks: set[str], tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError naming a missing, surplus or misshapen tensor."""
    for key in sorted(expected.keys() | masks):
        if key not in tensors:
            raise InputError(f"kilonerf: tensor {key!r} is missing")
    for key in sorted(tensors):
        if key not in expected and key not in masks:
            raise InputError(f"kilonerf: tensor {key!r} is not part of this configuration")
        if key in expected and tuple(tensors[key].shape) != expected[key]:
            raise InputError(f"kilonerf: tensor {key!r} is {list(tensors[key].shape)}, not {list(expected[key])}")
