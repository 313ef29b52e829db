"""TensoRF's vector-matrix field (arXiv 2203.09517; layouts 3.2, 3.3), as teacher and as student."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import RadianceField
from pvdconvert.nn.frequency import frequency_encode
from pvdconvert.nn.mask import Mask
from pvdconvert.nn.mlp import MLP
from pvdconvert.nn.planes import VectorMatrix, truncated_exp
from pvdconvert.nn.sh import sh_basis
from pvdconvert.plugin import ArchitectureBase, Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.tensorf_spec import TensorfOptions, megabytes, parse

ROWS = 1 << 14
"""Rows a chunk of colour when no gradient is recorded: what is in flight then stays in the cache."""


LONGEST = {"fast": 144, "balanced": 288, "best": 400}
"""Vertices along the longest axis of the occupied box, by preset."""
SMALLEST = 16
EMPTY = 0.01
"""Optical thickness of one voxel where the components are 0: as good as empty, yet with a gradient that can fill it."""
STUDENT: Config = {
    "density_ranks": [16, 16, 16],
    "color_ranks": [48, 48, 48],
    "color_features": 27,
    "shading": "mlp",
    "fea_pe": 0,
    "view_encoding": "sh",
    "view_bands": 4,
    "mlp_width": 64,
    "mlp_layers": 3,
    "density_activation": "exp",
    "density_scale": 1.0,
}


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

    def color_features(self, x01: Tensor) -> Tensor:
        """[N, color_features] at ``x01`` [N, 3]."""
        out: Tensor = self.basis(self.color_grid.features(x01))
        return out

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
            view, plain = _waves(d.reshape(-1, 3), o.view_pe).view(n, k, -1), 3
        sizes = [o.color_features, plain, 2 * o.fea_pe * o.color_features, view.shape[-1] - plain]
        fea, direct, fea_waves, view_waves = torch.split(first.weight, sizes, dim=1)
        hidden = F.linear(_waves(features, o.fea_pe), torch.cat([fea, fea_waves], dim=1), first.bias)
        hidden = hidden[:, None, :] + F.linear(view, torch.cat([direct, view_waves], dim=1))
        for layer in list(head.layers)[1:]:
            hidden = layer(F.relu_(hidden))
        return hidden.sigmoid()

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


class Tensorf(ArchitectureBase):
    """The architecture ``tensorf``."""

    def plan(self, facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
        for key in set(overrides) & set(limits.fixed):
            if overrides[key] != limits.fixed[key]:
                raise RequestError(
                    f"tensorf: {key}={overrides[key]} was asked, but the output layout needs {limits.fixed[key]}",
                    hint=f"drop --set {key} or choose another layout",
                )
        given = {**overrides, **limits.fixed}
        longest = given.get("resolution")
        side = longest if isinstance(longest, int | float) else LONGEST.get(budget.preset, LONGEST["balanced"])
        box = self._box(facts, given)
        config: Config = {**STUDENT, **{k: v for k, v in given.items() if v is not None}, "box": box.to_json()}
        if not isinstance(longest, list | tuple):
            config["resolution"] = _cubic(box, int(side))
        if config["shading"] == "sh" and "color_features" not in given:
            config["color_features"] = 27
        try:
            options = parse(config)
        except InputError as error:
            raise RequestError(str(error)) from error
        if budget.max_mb is not None and megabytes(options) > budget.max_mb:
            options = self._shrink(options, box, budget.max_mb, fixed="resolution" in given)
        if "density_shift" not in given and options.density_activation == "exp":
            shift = math.log(EMPTY * (max(options.resolution) - 1) / box.longest)
            options = dataclasses.replace(options, density_shift=round(shift, 4))
        return _plain(options)

    @staticmethod
    def _box(facts: TeacherFacts, given: Mapping[str, Any]) -> Box:
        """The occupied box and a margin of a cell, within the scene's."""
        if given.get("box") is not None:
            return Box.from_json(given["box"])
        low = [max(s, o - facts.cell) for s, o in zip(facts.scene.box.min, facts.occupied_box.min)]
        high = [min(s, o + facts.cell) for s, o in zip(facts.scene.box.max, facts.occupied_box.max)]
        return Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))

    @staticmethod
    def _shrink(options: TensorfOptions, box: Box, limit: float, *, fixed: bool) -> TensorfOptions:
        hint = "raise --max-mb, or lower resolution or ranks with --set"
        if not fixed:
            for side in range(max(options.resolution) - 1, SMALLEST - 1, -1):
                n = _cubic(box, side)
                smaller = dataclasses.replace(options, resolution=(n[0], n[1], n[2]))
                if megabytes(smaller) <= limit:
                    return smaller
        raise RequestError(f"tensorf: {megabytes(options):.1f} MB do not fit into --max-mb {limit:g}", hint=hint)

    def build(self, config: Config, scene: Scene, seed: int) -> TensorfField:
        generator = torch.Generator().manual_seed(seed)
        return TensorfField(parse({**config, "mask": None}), scene, generator)

    def load(self, config: Config, tensors: Mapping[str, Tensor], scene: Scene) -> TensorfField:
        field = self.build(config, scene, 0)
        wanted = {name: tuple(t.shape) for name, t in _tensors(field).items()}
        if config.get("mask") is not None:
            wanted["mask.bits"] = tuple(tensors["mask.bits"].shape) if "mask.bits" in tensors else ()
        for name in sorted(wanted.keys() ^ tensors.keys()):
            raise InputError(
                f"tensorf: tensor {name!r} is {'missing' if name in wanted else 'not part of this configuration'}"
            )
        for name, shape in wanted.items():
            if tuple(tensors[name].shape) != shape:
                raise InputError(f"tensorf: {name!r} has shape {list(tensors[name].shape)}, {list(shape)} was expected")
        for name, grid in (("density", field.density_grid), ("app", field.color_grid)):
            planes = [tensors[f"{name}_plane.{i}"][0].permute(1, 2, 0) for i in range(3)]
            grid.assign(planes, [tensors[f"{name}_line.{i}"][0, :, :, 0].t() for i in range(3)])
        with torch.no_grad():
            for name, parameter in _linear(field).items():
                parameter.copy_(tensors[name])
        if config.get("mask") is not None:
            field.mask = Mask.from_parts(config["mask"], tensors["mask.bits"])
        return field

    def save(self, field: RadianceField) -> tuple[Config, dict[str, Tensor]]:
        assert isinstance(field, TensorfField)
        config, tensors = _plain(field.options), _tensors(field)
        if field.mask is not None:
            config["mask"] = field.mask.to_config()
            tensors["mask.bits"] = field.mask.bits
        return config, tensors

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        assert isinstance(field, TensorfField)
        heads = [*field.basis.parameters(), *([] if field.head is None else field.head.parameters())]
        return [
            {"params": list(field.density_grid.parameters()), "lr": 2e-2, "name": "density planes"},
            {"params": list(field.color_grid.parameters()), "lr": 2e-2, "name": "colour planes"},
            {"params": heads, "lr": 2e-3, "name": "colour network"},
        ]


def _linear(field: TensorfField) -> dict[str, Tensor]:
    """Parameters of the linear layers under TensoRF's names."""
    out: dict[str, Tensor] = {"basis_mat.weight": field.basis.layers[0].get_parameter("weight")}
    for j, layer in enumerate([] if field.head is None else field.head.layers):
        out[f"renderModule.mlp.{2 * j}.weight"] = layer.get_parameter("weight")
        out[f"renderModule.mlp.{2 * j}.bias"] = layer.get_parameter("bias")
    return out


def _tensors(field: TensorfField) -> dict[str, Tensor]:
    linear = {name: p.detach().clone() for name, p in _linear(field).items()}
    return {**field.density_grid.export("density"), **field.color_grid.export("app"), **linear}


def _plain(options: TensorfOptions) -> Config:
    config = dataclasses.asdict(options)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}


def _cubic(box: Box, side: int) -> list[int]:
    """Vertices along each axis at one spacing, ``side`` along the longest."""
    return [max(2, round(s / box.longest * (side - 1)) + 1) for s in box.size]
