"""``ngp``: a hash grid, a density MLP and a view-dependent colour MLP (layouts sections 1.4 and 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pvdconvert.errors import InputError
from pvdconvert.field import RadianceField
from pvdconvert.kernels.hashgrid_spec import HashGridSpec
from pvdconvert.nn.clipped import clipped_exp
from pvdconvert.nn.hashgrid import HashGrid
from pvdconvert.nn.mask import Mask
from pvdconvert.nn.mlp import MLP
from pvdconvert.nn.sh import sh_basis
from pvdconvert.plugin import ArchitectureBase, Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.ngp_plan import grid_spec, plan
from pvdconvert_plugins.ngp_spec import MAX_LOG_DENSITY, NgpOptions, parse


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
        color_in += len(options.color_constants or ())
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
        if self.options.color_constants:
            parts.append(sh.new_tensor(self.options.color_constants).expand(n, k, -1))
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


class Ngp(ArchitectureBase):
    """The plugin."""

    def plan(self, facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
        return plan(facts, budget, limits, overrides)

    def build(self, config: Config, scene: Scene, seed: int) -> NgpField:
        options = parse({**config, "mask": None})
        spec = grid_spec(options)
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
        dtype = torch.float16 if field.options.dtype == "float16" else torch.float32
        tensors = {key: parameter.detach().to(dtype, copy=True) for key, parameter in _weights(field).items()}
        if field.mask is not None:
            config["mask"] = field.mask.to_config()
            tensors["mask.bits"] = field.mask.bits
        return config, tensors

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        assert isinstance(field, NgpField)
        # eps: most rows see tiny gradients; Adam must still move them (Mueller et al. 2022, section 4). The networks
        # bound a short run: on lego, four times their usual rate is worth 1 dB at equal steps, turned axes 1 dB more.
        adam = {"betas": (0.9, 0.99), "eps": 1e-15}
        nets = [*field.sigma_net.parameters(), *field.color_net.parameters()]
        return [
            {"params": [field.encoder.embeddings], "lr": 1e-2, "name": "table", **adam},
            {"params": nets, "lr": 2e-2, "name": "nets", "rotated": True, "betas": (0.9, 0.95)},
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
