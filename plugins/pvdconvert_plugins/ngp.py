"""``ngp``: a hash grid, a density MLP and a view-dependent colour MLP (layouts sections 1.4 and 2.1)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pvdconvert.errors import InputError, RequestError, UsageError
from pvdconvert.field import RadianceField
from pvdconvert.kernels.hashgrid_spec import HashGridSpec, growth
from pvdconvert.nn.clipped import clipped_exp
from pvdconvert.nn.hashgrid import HashGrid
from pvdconvert.nn.mask import Mask
from pvdconvert.nn.mlp import MLP
from pvdconvert.nn.sh import sh_basis
from pvdconvert.plugin import ArchitectureBase, Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.ngp_spec import MAX_LOG_DENSITY, NgpOptions, parse

# preset -> log2_table, finest cells per occupancy cell
_PRESETS = {"fast": (16, 4.0), "balanced": (18, 8.0), "best": (19, 16.0)}
_SMALLEST_TABLE = 8


class _TruncatedExp(torch.autograd.Function):
    """exp with a gradient that never dies or explodes: ``exp(clamp(x, -15, 15))`` (pvd.md 1.3; torch-ngp's trunc_exp).

    A density that ran off to either side keeps a gradient of the right sign, so that it can come back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.exp(x.clamp(max=MAX_LOG_DENSITY))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * torch.exp(x.clamp(-15.0, 15.0))


class NgpField(RadianceField):
    """The field. Its latent is [h (1 + geo_features), inside (1)]; h[:, 0] is the log-density before density_scale."""

    box_min: Tensor
    box_size: Tensor

    def __init__(self, options: NgpOptions, spec: HashGridSpec, box: Box, generator: torch.Generator) -> None:
        super().__init__()
        self.options = options
        width = 1 + options.geo_features
        color_hidden = options.color_hidden or options.hidden
        color_in = options.sh_bands**2 + (width if options.color_input == "h+sh" else options.geo_features)
        self.encoder = HashGrid(spec, generator=generator)
        self.sigma_net = MLP(
            [spec.width, *[options.hidden] * options.density_layers, width], bias=options.bias, generator=generator
        )
        self.color_net = MLP(
            [color_in, *[color_hidden] * options.color_layers, 3], bias=options.bias, generator=generator
        )
        self.register_buffer("box_min", torch.tensor(box.min), persistent=False)
        self.register_buffer("box_size", torch.tensor(box.size), persistent=False)
        self.feature_width = width
        mlp = sum(a * b for a, b in zip(self.sigma_net.widths[:-1], self.sigma_net.widths[1:]))
        self.flops_per_point = float(2 * mlp + 40 * spec.width)

    def encode(self, x: Tensor) -> Tensor:
        x01 = (x - self.box_min) / self.box_size
        inside = ((x01 >= 0) & (x01 <= 1)).all(-1)
        if self.mask is not None:
            inside = inside & self.mask.inside(x)
        h = self.sigma_net(self.encoder(x01))
        return torch.cat([h, inside[:, None].to(h.dtype)], dim=-1)

    def density(self, latent: Tensor) -> Tensor:
        sigma: Tensor
        if self.options.density_clip is not None:
            sigma = clipped_exp(latent[:, 0], *self.options.density_clip)
        else:
            sigma = _TruncatedExp.apply(latent[:, 0])  # type: ignore[no-untyped-call]
        # where, not a product: outside must be 0 even if h is not finite there.
        return torch.where(latent[:, -1] > 0, sigma * self.options.density_scale, 0.0)

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        n, k, _ = d.shape
        sh = sh_basis(d, self.options.sh_bands) if self.options.view_input == "unit" else self._half_harmonics(d)
        if self.options.color_input == "h+sh":
            parts = [latent[:, None, :-1].expand(n, k, -1), sh]
        else:
            parts = [sh, latent[:, None, 1:-1].expand(n, k, -1)]
        raw: Tensor = self.color_net(torch.cat(parts, dim=-1))
        if self.options.color_activation == "exp":
            return torch.exp(raw.clamp(-10.0, 10.0))
        return torch.sigmoid(raw)

    def _half_harmonics(self, d: Tensor) -> Tensor:
        """nerfstudio's torch implementation (layouts sections 0.3 and 7.1): plus signs, (d + 1) / 2 taken as it is."""
        out = sh_basis((d + 1) / 2, self.options.sh_bands)
        out[..., 1::2] *= -1
        return out

    def features(self, latent: Tensor) -> Tensor:
        """PVD's tap: [log-density, geo features] (pvd.md 1.1)."""
        return latent[:, :-1]


def _spec(options: NgpOptions) -> HashGridSpec:
    o = options
    try:
        return HashGridSpec.make(
            o.levels,
            o.features,
            o.log2_table,
            o.base_resolution,
            o.per_level_scale,
            o.index_rule,
            o.offsets,
            o.interpolation,
        )
    except ValueError as error:
        raise InputError(f"ngp: {error}") from error


class Ngp(ArchitectureBase):
    """The plugin."""

    def plan(self, facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
        """Table and finest resolution by preset; the pseudo-key ``finest_resolution`` sets per_level_scale."""
        fixed = dict(limits.fixed)
        for key in fixed.keys() & overrides.keys():
            if fixed[key] != overrides[key]:
                raise RequestError(
                    f"ngp: {key}={overrides[key]} was asked, but the target layout only holds {fixed[key]}",
                    hint=f"leave out --set {key}, or write the native format",
                )
        wanted = {**limits.defaults, **fixed, **overrides}
        preset = budget.preset if budget.preset in _PRESETS else "balanced"
        if budget.seconds is not None and budget.seconds < 100:
            preset = "fast"
        log2_table, per_cell = _PRESETS[preset]
        box = facts.occupied_box
        finest, per_unit = wanted.pop("finest_resolution", None), wanted.pop("finest_per_unit", None)
        if finest is None and per_unit is not None and "per_level_scale" not in wanted:
            finest = float(per_unit) * facts.scene.box.longest
        if finest is not None and "per_level_scale" in wanted:
            raise RequestError("ngp: finest_resolution and per_level_scale exclude each other", hint="set one of them")
        config: Config = {**dataclasses.asdict(NgpOptions()), "box": [list(box.min), list(box.max)]}
        config["log2_table"] = log2_table
        config.update(wanted)
        if "per_level_scale" not in wanted:
            cells = box.longest / facts.cell
            finest = float(finest) if finest is not None else min(max(cells * per_cell, 128.0), 4096.0)
            config["per_level_scale"] = growth(
                int(config["levels"]), int(config["base_resolution"]), finest, str(config["index_rule"])
            )
        try:
            _spec(parse(config))
        except InputError as error:
            raise UsageError(str(error), hint="check --set") from error
        _fit(config, budget, facts, fixed_table="log2_table" in wanted)
        return config

    def build(self, config: Config, scene: Scene, seed: int) -> NgpField:
        options = parse({**config, "mask": None})
        if scene.contraction != "none":
            raise InputError(f"ngp: a scene with contraction {scene.contraction!r} does not fit this architecture")
        spec = _spec(options)
        if options.index_rule == "torch-ngp":
            # Said explicitly: they come from a float64 power that another machine may round differently.
            options = dataclasses.replace(options, offsets=list(spec.offsets))
        return NgpField(options, spec, _box(options, scene), torch.Generator().manual_seed(seed))

    def load(self, config: Config, tensors: Mapping[str, Tensor], scene: Scene) -> NgpField:
        field = self.build(config, scene, 0)
        given = dict(tensors)
        mask = config.get("mask")
        if mask is not None:
            if "mask.bits" not in given:
                raise InputError("ngp: tensor 'mask.bits' is missing")
            field.mask = Mask.from_parts(mask, given.pop("mask.bits"))
        wanted = _weights(field)
        for key, parameter in wanted.items():
            if key not in given:
                raise InputError(f"ngp: tensor {key!r} is missing")
            value = given.pop(key)
            if value.shape != parameter.shape or not value.is_floating_point():
                raise InputError(
                    f"ngp: tensor {key!r} is {value.dtype} {list(value.shape)}, expected float {list(parameter.shape)}"
                )
            with torch.no_grad():
                parameter.copy_(value)
        if given:
            raise InputError(f"ngp: surplus tensors {', '.join(sorted(given))}")
        return field

    def save(self, field: RadianceField) -> tuple[Config, dict[str, Tensor]]:
        assert isinstance(field, NgpField)
        config: Config = dataclasses.asdict(field.options)
        tensors = {key: parameter.detach().clone() for key, parameter in _weights(field).items()}
        if field.mask is not None:
            config["mask"] = field.mask.to_config()
            tensors["mask.bits"] = field.mask.bits
        return config, tensors

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        assert isinstance(field, NgpField)
        # eps: most rows see tiny gradients; Adam must still move them (Mueller et al. 2022, section 4).
        adam = {"betas": (0.9, 0.99), "eps": 1e-15}
        nets = [*field.sigma_net.parameters(), *field.color_net.parameters()]
        return [
            {"params": [field.encoder.embeddings], "lr": 1e-2, "name": "table", **adam},
            {"params": nets, "lr": 5e-3, "name": "nets", **adam},
        ]


def _weights(field: NgpField) -> dict[str, Tensor]:
    """Parameters under torch-ngp's names, in its order."""
    named: dict[str, Tensor] = {"encoder.embeddings": field.encoder.embeddings}
    for net in ("sigma_net", "color_net"):
        for k, layer in enumerate(getattr(field, net).layers):
            named[f"{net}.{k}.weight"] = layer.weight
            if layer.bias is not None:
                named[f"{net}.{k}.bias"] = layer.bias
    return named


def _box(options: NgpOptions, scene: Scene) -> Box:
    if options.box is None:
        return scene.box
    try:
        (a, b, c), (d, e, f) = options.box
        return Box((a, b, c), (d, e, f))
    except (TypeError, ValueError) as error:
        raise InputError(f"ngp: 'box' is {options.box!r}, expected [[x, y, z], [x, y, z]]") from error


def _megabytes(config: Config, facts: TeacherFacts) -> float:
    """Size of the weights and the mask on disk, 10^6 bytes."""
    options = parse({**config, "mask": None})
    spec = _spec(options)
    field_nets = (
        spec.width * options.hidden
        + options.hidden**2 * max(0, options.density_layers - 1)
        + options.hidden * (1 + options.geo_features)
        + (options.color_hidden or options.hidden) * (options.sh_bands**2 + 1 + options.geo_features + 3)
        + (options.color_hidden or options.hidden) ** 2 * max(0, options.color_layers - 1)
    )
    cells = math.prod(side / facts.cell + 1 for side in facts.scene.box.size)
    return (4.0 * (spec.entries * spec.features + field_nets) + cells / 8) / 1e6


def _fit(config: Config, budget: Budget, facts: TeacherFacts, *, fixed_table: bool) -> None:
    """Shrink the table, in place, until the file stays below ``budget.max_mb``."""
    while budget.max_mb is not None and (size := _megabytes(config, facts)) > budget.max_mb:
        if fixed_table or config["log2_table"] <= _SMALLEST_TABLE:
            raise RequestError(
                f"ngp: {size:.2f} MB is the smallest that these settings allow, --max-mb {budget.max_mb:g} was asked",
                hint="raise --max-mb, or lower --set levels, hidden or log2_table",
            )
        config["log2_table"] -= 1
