"""The `nerf` architecture: a perceptron over frequency encodings (Mildenhall et al. 2020, section 5.1 and figure 7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pvdconvert.errors import InputError
from pvdconvert.field import RadianceField
from pvdconvert.kernels.linear import row_chunks
from pvdconvert.nn.clipped import clipped_exp
from pvdconvert.nn.mask import Mask
from pvdconvert.plugin import ArchitectureBase, Budget, Config, Limits, TeacherFacts
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.nerf_network import Network
from pvdconvert_plugins.nerf_plan import THICK, plan
from pvdconvert_plugins.nerf_spec import NerfOptions

INFERENCE_ROWS = 4096
"""Rows a chunk when no gradient is recorded: the activations of a 256-wide trunk then stay in a CPU's cache."""


STEEPEST = 8.0
"""Longest component of a warped direction: rays through a picture and its neighbours stay below 3."""


class NerfField(RadianceField):
    """The latent is [hidden (width), inside (1 or 0)]; the features are the hidden units of the trunk's last layer.

    With direction_space=ndc the position [3] stands behind them: there the network's direction depends on it.
    """

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
        # Unit output of the density layer of a student whose layout knows no density_scale.
        self.unit = (
            THICK / box.longest if options.density_activation == "relu" and options.density_scale == 1.0 else 1.0
        )
        self.slopes = _slopes(scene) if options.direction_space == "ndc" else None
        self.feature_width = options.width
        self.learning = False
        # On a CPU many small steps beat few large ones: 1.3 dB from 4096 to 1024 points in equal time.
        self.batch_points = 1024
        asked = [*self.fine.trunk.parameters(), *self.fine.density.parameters()]
        self.flops_per_point = 2.0 * sum(p.numel() for p in asked)

    def train(self, mode: bool = True) -> NerfField:
        """Torch's own; a field that nobody put to school answers exactly."""
        self.learning = mode
        super().train(mode)
        return self

    def _network(self, name: str) -> Network:
        prefix = f"{name}."
        shapes = {k.removeprefix(prefix): v for k, v in self.options.shapes().items() if k.startswith(prefix)}
        return Network(self.options.network(name), shapes)

    def _recording(self, x: Tensor) -> bool:
        """Whether autograd needs whole activations, so that rows may not be taken in chunks."""
        return torch.is_grad_enabled() and (x.requires_grad or self.fine.rgb.weight.requires_grad)

    def _encode(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        inside = ((x >= self.low) & (x <= self.high)).all(-1)
        if self.learning and not self.options.masked:
            inside = torch.ones_like(inside)  # emptiness around the box is learned as well: its program asks there
        if self.mask is not None:
            inside &= self.mask.inside(x)
        where = [] if self.slopes is None else [x]
        if self.options.input == "box":
            x = (x - self.center) / self.reach
        if out is None:
            return torch.cat([self.fine.hidden(x), inside[:, None].to(x.dtype), *where], dim=1)
        width = self.options.width
        self.fine.hidden(x, out[:, :width])
        out[:, width] = inside
        if where:
            out[:, width + 1 :] = where[0]
        return out

    def encode(self, x: Tensor) -> Tensor:
        if self._recording(x) or x.shape[0] == 0:
            return self._encode(x)
        out = x.new_empty(x.shape[0], self.options.width + (1 if self.slopes is None else 4))
        for part in row_chunks(x.shape[0], INFERENCE_ROWS):
            self._encode(x[part], out[part])
        return out

    def density(self, latent: Tensor) -> Tensor:
        o, head = self.options, self.fine.density
        raw = F.linear(latent[:, : o.width], head.weight, head.bias)[:, 0] + o.density_bias
        if o.density_activation == "relu":
            # While learning, below zero must differ from dead: a relu that gives 0 never comes back.
            value = F.softplus(raw, beta=SOFT / self.unit) if self.learning else raw.relu()
        elif o.density_clip is not None:
            value = clipped_exp(raw, *o.density_clip)
        else:
            value = F.softplus(raw) if o.density_activation == "softplus" else raw.exp()
        return torch.where(latent[:, o.width] > 0, value * o.density_scale, 0.0)

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        n, k, _ = d.shape
        width = self.options.width
        if self.slopes is not None:
            d = ndc_directions(latent[:, None, width + 1 :], d, self.slopes)
        if self._recording(latent) or n == 0:
            return self.fine.color(latent[:, :width], d)
        rows = max(16, INFERENCE_ROWS // max(k, 1) // 16 * 16)
        out = latent.new_empty(n, k, 3)
        for part in row_chunks(n, rows):
            out[part] = self.fine.color(latent[part, :width], d[part])
        return out

    def features(self, latent: Tensor) -> Tensor:
        return latent[:, : self.options.width]

    def restrict(self, occupancy: Occupancy) -> None:
        """A layout without masks (``masked`` false) must be empty by its weights: nothing is cut off."""
        if self.options.masked:
            super().restrict(occupancy)


def _slopes(scene: Scene) -> tuple[float, float]:
    """2 focal / width and 2 focal / height of the NDC warp. Raises InputError where the scene lacks one of them."""
    space = scene.ray_space
    if space.kind != "ndc" or not (space.width and space.height and space.focal):
        raise InputError(
            "nerf: directions of the warped ray need the warp's width, height and focal length",
            hint="--extra width=504 --extra height=378 --extra focal=407.5, all in pixels",
        )
    return 2 * space.focal / space.width, 2 * space.focal / space.height


def ndc_directions(x: Tensor, d: Tensor, slopes: tuple[float, float]) -> Tensor:
    """Directions of the warped ray at NDC positions ``x`` for un-warped ``d`` (both [..., 3]); not of length 1.

    The ray runs from z = -1 (the near plane) to its vanishing point e = (-sx dx/dz, -sy dy/dz, 1): with t = (z + 1) / 2
    its origin is o = (x - t e) / (1 - t), its direction e - o = (e - x) / (1 - t) (layouts section 9.2).
    """
    forward = d[..., 2:].clamp_max(-1e-3)
    end = -d[..., :2] / forward * d.new_tensor(slopes)
    left = (1 - (x[..., 2:] + 1) / 2).clamp_min(1e-3)
    flat = ((end - x[..., :2]) / left).clamp(-STEEPEST, STEEPEST)
    return torch.cat([flat, torch.full_like(flat[..., :1], 2.0)], -1)


SOFT = 10.0
"""A relu student is trained by softplus(b raw) / b with b this over its unit output: off by log(2) / b at most."""


class Nerf(ArchitectureBase):
    """See :class:`pvdconvert.plugin.Architecture`."""

    def plan(self, facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
        return plan(facts, budget, limits, overrides)

    def build(self, config: Config, scene: Scene, seed: int) -> NerfField:
        field = NerfField(NerfOptions.from_config({**config, "mask": None}), scene)
        generator = torch.Generator().manual_seed(seed)
        for name, p in field.named_parameters():
            with torch.no_grad():
                if name.endswith(".bias"):
                    p.zero_()
                elif field.unit != 1.0 and ".density." in name:
                    bound = field.unit * (3.0 / p.shape[1]) ** 0.5
                    p.uniform_(-bound, bound, generator=generator)
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
        rest = [p for name, p in field.named_parameters() if p.requires_grad and ".density." not in name]
        # Arithmetic bounds a perceptron: turned axes are worth 1.2 dB on lego at equal time.
        turned = {"rotated": True, "betas": (0.9, 0.95)}
        groups: list[dict[str, Any]] = [{"params": rest, "lr": rate, "name": "network", **turned}]
        head = list(field.fine.density.parameters())
        # Adam's steps do not know the scale of a weight.
        return [*groups, {"params": head, "lr": rate * field.unit, "name": "density", **turned}]
