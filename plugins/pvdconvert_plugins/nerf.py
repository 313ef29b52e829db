"""The `nerf` architecture: a perceptron over frequency encodings (Mildenhall et al. 2020, section 5.1 and figure 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import RadianceField
from pvdconvert.kernels.linear import linear, row_chunks
from pvdconvert.nn.frequency import frequency_encode
from pvdconvert.nn.mask import Mask
from pvdconvert.nn.sh import sh_basis
from pvdconvert.plugin import ArchitectureBase, Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.nerf_spec import NerfOptions

INFERENCE_ROWS = 4096
"""Rows a chunk when no gradient is recorded: the activations of a 256-wide trunk then stay in a CPU's cache."""


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
        encoded = frequency_encode(x, o.position_frequencies, include_input=o.include_input, order=o.encoding_order)
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
        return frequency_encode(d, o.direction_frequencies, include_input=o.include_input, order=o.encoding_order)

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


class NerfField(RadianceField):
    """The latent is [hidden (width), inside (1 or 0)]; the features are the hidden units of the trunk's last layer."""

    low: Tensor
    high: Tensor
    center: Tensor

    def __init__(self, options: NerfOptions, scene: Scene) -> None:
        super().__init__()
        self.options = options
        self.fine = self._network("fine")
        # Kept for the file's sake: no answer comes from it, so nothing could train it.
        self.coarse = self._network("coarse").requires_grad_(False) if options.has_coarse else None
        box = scene.box if options.box is None else Box.from_json(options.box)
        self.register_buffer("low", torch.tensor(box.min), persistent=False)
        self.register_buffer("high", torch.tensor(box.max), persistent=False)
        self.register_buffer("center", torch.tensor(box.center), persistent=False)
        self.reach = box.longest / 2
        self.feature_width = options.width
        # On a CPU many small steps beat few large ones: 1.3 dB from 4096 to 1024 points in equal time.
        self.batch_points = 1024
        asked = [*self.fine.trunk.parameters(), *self.fine.density.parameters()]
        self.flops_per_point = 2.0 * sum(p.numel() for p in asked)

    def _network(self, name: str) -> Network:
        prefix = f"{name}."
        shapes = {k.removeprefix(prefix): v for k, v in self.options.shapes().items() if k.startswith(prefix)}
        return Network(self.options.network(name), shapes)

    def _recording(self, x: Tensor) -> bool:
        """Whether autograd needs whole activations, so that rows may not be taken in chunks."""
        return torch.is_grad_enabled() and (x.requires_grad or self.fine.rgb.weight.requires_grad)

    def _encode(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        inside = ((x >= self.low) & (x <= self.high)).all(-1)
        if self.mask is not None:
            inside &= self.mask.inside(x)
        if self.options.input == "box":
            x = (x - self.center) / self.reach
        if out is None:
            return torch.cat([self.fine.hidden(x), inside[:, None].to(x.dtype)], dim=1)
        self.fine.hidden(x, out[:, :-1])
        out[:, -1] = inside
        return out

    def encode(self, x: Tensor) -> Tensor:
        if self._recording(x) or x.shape[0] == 0:
            return self._encode(x)
        out = x.new_empty(x.shape[0], self.options.width + 1)
        for part in row_chunks(x.shape[0], INFERENCE_ROWS):
            self._encode(x[part], out[part])
        return out

    def density(self, latent: Tensor) -> Tensor:
        o, head = self.options, self.fine.density
        raw = F.linear(latent[:, :-1], head.weight, head.bias)[:, 0] + o.density_bias
        if o.density_activation == "relu":
            value = raw.relu()
        else:
            value = F.softplus(raw) if o.density_activation == "softplus" else raw.exp()
        return torch.where(latent[:, -1] > 0, value * o.density_scale, 0.0)

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        n, k, _ = d.shape
        if self._recording(latent) or n == 0:
            return self.fine.color(latent[:, :-1], d)
        rows = max(16, INFERENCE_ROWS // max(k, 1) // 16 * 16)
        out = latent.new_empty(n, k, 3)
        for part in row_chunks(n, rows):
            out[part] = self.fine.color(latent[part, :-1], d[part])
        return out

    def features(self, latent: Tensor) -> Tensor:
        return latent[:, :-1]


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"depth": 4, "width": 128, "skips": [], "direction_layers": [64]},
    "balanced": {"depth": 6, "width": 192, "skips": [2], "direction_layers": [96]},
    "best": {"depth": 8, "width": 256, "skips": [4], "direction_layers": [128]},
}
"""Students: sizes by preset; a bottleneck without activation adds nothing to what such a network can be."""


class Nerf(ArchitectureBase):
    """See :class:`pvdconvert.plugin.Architecture`."""

    def plan(self, facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
        for key, value in overrides.items():
            if key in limits.fixed and limits.fixed[key] != value:
                raise RequestError(
                    f"nerf: {key}={value!r} was asked, but the output layout holds only {limits.fixed[key]!r}",
                    hint="leave out --set, or write the native layout",
                )
        names = (
            list(PRESETS)[list(PRESETS).index(budget.preset) :: -1]
            if budget.preset in PRESETS
            else ["balanced", "fast"]
        )
        narrow = [{**PRESETS["fast"], "width": w, "direction_layers": [w // 2]} for w in (96, 64, 48, 32, 24, 16)]
        for preset in [*(PRESETS[name] for name in names), *narrow]:
            config = self._student(facts, preset, {**limits.fixed, **overrides})
            if budget.max_mb is None or _megabytes(config, facts) <= budget.max_mb:
                return config
        raise RequestError(
            f"nerf: no network fits --max-mb {budget.max_mb}: the smallest takes {_megabytes(config, facts):.3f} MB",
            hint="raise --max-mb",
        )

    def _student(self, facts: TeacherFacts, preset: Mapping[str, Any], given: Mapping[str, Any]) -> Config:
        box = facts.occupied_box
        config: Config = {
            "direction_encoding": "sh",
            "bottleneck_width": None,
            # Grows no faster than the weights, unlike exp; unit output is a mean free path of a fortieth of the box.
            "density_activation": "softplus",
            "density_scale": 40.0 / box.longest,
            "input": "box",
            "box": box.to_json(),
            **preset,
            **given,
        }
        if "skips" not in given and isinstance(config["depth"], int):
            config["skips"] = [layer for layer in config["skips"] if layer < config["depth"] - 1]
        try:
            return NerfOptions.from_config(config).to_config()
        except InputError as error:
            raise RequestError(str(error)) from error

    def build(self, config: Config, scene: Scene, seed: int) -> NerfField:
        field = NerfField(NerfOptions.from_config({**config, "mask": None}), scene)
        generator = torch.Generator().manual_seed(seed)
        for name, p in field.named_parameters():
            with torch.no_grad():
                if name.endswith(".bias"):
                    p.zero_()
                else:
                    # He et al. 2015 before ReLU; the outputs start with unit gain.
                    bound = ((3.0 if ".density." in name or ".rgb." in name else 6.0) / p.shape[1]) ** 0.5
                    p.uniform_(-bound, bound, generator=generator)
        return field

    def load(self, config: Config, tensors: Mapping[str, Tensor], scene: Scene) -> NerfField:
        options = NerfOptions.from_config(config)
        expected = options.shapes()
        masked = {"mask.bits"} if options.mask is not None else set()
        for key in sorted(expected.keys() | masked):
            if key not in tensors:
                raise InputError(f"nerf: tensor {key!r} is missing")
        for key in sorted(tensors):
            if key not in expected and key not in masked:
                raise InputError(f"nerf: tensor {key!r} is not part of this configuration")
            if key in expected and tuple(tensors[key].shape) != expected[key]:
                raise InputError(f"nerf: tensor {key!r} is {list(tensors[key].shape)}, not {list(expected[key])}")
        field = NerfField(options, scene)
        with torch.no_grad():
            for name, p in field.named_parameters():
                p.copy_(tensors[name])
        if options.mask is not None:
            field.mask = Mask.from_parts(options.mask, tensors["mask.bits"])
        return field

    def save(self, field: RadianceField) -> tuple[Config, dict[str, Tensor]]:
        assert isinstance(field, NerfField)
        config = field.options.to_config()
        tensors = {name: p.detach() for name, p in field.named_parameters()}
        if field.mask is not None:
            config["mask"] = field.mask.to_config()
            tensors["mask.bits"] = field.mask.bits
        return config, tensors

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        assert isinstance(field, NerfField)
        # Peak rate of Adam for batches of 1024 to 2048 points: 6e-3 at 4 x 128; wider and deeper needs less.
        rate = 6e-3 * (128 / field.options.width) * (4 / field.options.depth) ** 0.5
        return [{"params": [p for p in field.parameters() if p.requires_grad], "lr": rate, "name": "network"}]


def _megabytes(config: Config, facts: TeacherFacts) -> float:
    """Size on disk: float32 weights and a bit for each cell of the mask."""
    weights = sum(math.prod(shape) for shape in NerfOptions.from_config(config).shapes().values())
    cells = math.prod(math.ceil(side / facts.cell) for side in facts.scene.box.size)
    return (4 * weights + cells / 8 + 4096) / 1e6
