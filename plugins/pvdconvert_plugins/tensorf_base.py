"""What the plugins of tensor decompositions share: plans, files, and what a projection of density is fitted to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import RadianceField
from pvdconvert.nn.mask import Mask
from pvdconvert.plugin import ArchitectureBase, Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Box, Scene
from pvdconvert.solve.als import corners, scatter
from pvdconvert_plugins.tensorf_field import TensorialField
from pvdconvert_plugins.tensorf_mask import AlphaMask
from pvdconvert_plugins.tensorf_spec import TensorialOptions

if TYPE_CHECKING:
    from pvdconvert.distill.store import Store

SMALLEST = 16
EMPTY = 0.01
"""Optical thickness of one voxel where the components are 0: as good as empty, yet with a gradient that can fill it."""
FLOPS_RATE = 3e10
"""Floating-point operations of a teacher in a second on two plain cores."""
SCATTERED = 128
"""Longest side of the grid to which samples are spread."""
SHADING: Config = {
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
"""Colour and density of students."""


class Tensorial(ArchitectureBase):
    """What the tensor decompositions share: plans, files, parameter groups."""

    name: str
    student: Mapping[str, Any]
    """What a student has unless its user says otherwise."""

    def parse(self, config: Mapping[str, Any]) -> TensorialOptions:
        """Options out of a configuration; raises InputError naming the key."""
        raise NotImplementedError

    def megabytes(self, options: TensorialOptions) -> float:
        """Size of the field's float32 tensors, 10^6 bytes."""
        raise NotImplementedError

    def field(self, options: TensorialOptions, scene: Scene, generator: torch.Generator) -> TensorialField:
        """A fresh field."""
        raise NotImplementedError

    def preset(self, name: str) -> Config:
        """What a preset decides; ``resolution`` is the number of vertices along the longest axis."""
        raise NotImplementedError

    def assign(self, field: TensorialField, tensors: Mapping[str, Tensor]) -> None:
        """Take the factors out of tensors of the right shapes."""
        raise NotImplementedError

    def plan(self, facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
        for key in set(overrides) & set(limits.fixed):
            if overrides[key] != limits.fixed[key]:
                raise RequestError(
                    f"{self.name}: {key}={overrides[key]} was asked, but the output layout needs {limits.fixed[key]}",
                    hint=f"drop --set {key} or choose another layout",
                )
        given = {**limits.defaults, **overrides, **limits.fixed}
        config: Config = {**self.student, **self.preset(budget.preset)}
        config |= {k: v for k, v in given.items() if v is not None}
        if config.get("view_space") == "ray":
            config["view_space"] = facts.scene.ray_space.kind
        longest = config["resolution"]
        box = around(facts, given)
        config["box"] = box.to_json()
        if isinstance(longest, int | float):
            config["resolution"] = cubic(box, int(longest))
        if config["shading"] != "mlp" and "color_features" not in given:
            config["color_features"] = 27 if config["shading"] == "sh" else 3
        try:
            options = self.parse(config)
        except InputError as error:
            raise RequestError(str(error)) from error
        if budget.max_mb is not None and self.megabytes(options) > budget.max_mb:
            options = self._shrink(options, box, budget.max_mb, fixed=given.get("resolution") is not None)
        if given.get("density_shift") is None:
            options = dataclasses.replace(options, density_shift=_empty_shift(options, box))
        return _plain(options)

    def _shrink(self, options: TensorialOptions, box: Box, limit: float, *, fixed: bool) -> TensorialOptions:
        hint = "raise --max-mb, or lower resolution or ranks with --set"
        if not fixed:
            for side in range(max(options.resolution) - 1, SMALLEST - 1, -1):
                n = cubic(box, side)
                smaller = dataclasses.replace(options, resolution=(n[0], n[1], n[2]))
                if self.megabytes(smaller) <= limit:
                    return smaller
        raise RequestError(
            f"{self.name}: {self.megabytes(options):.1f} MB do not fit into --max-mb {limit:g}", hint=hint
        )

    def build(self, config: Config, scene: Scene, seed: int) -> TensorialField:
        generator = torch.Generator().manual_seed(seed)
        return self.field(self.parse({**config, "mask": None, "alpha_mask": None}), scene, generator)

    def load(self, config: Config, tensors: Mapping[str, Tensor], scene: Scene) -> TensorialField:
        field = self.build(config, scene, 0)
        wanted = {name: tuple(t.shape) for name, t in _tensors(field).items()}
        masks = {"mask.bits": config.get("mask"), "alphaMask.mask": config.get("alpha_mask")}
        for name, said in masks.items():
            if said is not None:
                wanted[name] = tuple(tensors[name].shape) if name in tensors else ()
        for name in sorted(wanted.keys() ^ tensors.keys()):
            raise InputError(
                f"{self.name}: tensor {name!r} is {'missing' if name in wanted else 'not part of this configuration'}"
            )
        for name, shape in wanted.items():
            if tuple(tensors[name].shape) != shape:
                raise InputError(
                    f"{self.name}: {name!r} has shape {list(tensors[name].shape)}, {list(shape)} was expected"
                )
        with torch.no_grad():
            self.assign(field, tensors)
            for name, parameter in _linear(field).items():
                parameter.copy_(tensors[name])
        if config.get("mask") is not None:
            field.mask = Mask.from_parts(config["mask"], tensors["mask.bits"])
        if config.get("alpha_mask") is not None:
            field.alpha_mask = AlphaMask(config["alpha_mask"], tensors["alphaMask.mask"])
        return field

    def save(self, field: RadianceField) -> tuple[Config, dict[str, Tensor]]:
        assert isinstance(field, TensorialField)
        config, tensors = _plain(field.options), _tensors(field)
        if field.mask is not None:
            config["mask"] = field.mask.to_config()
            tensors["mask.bits"] = field.mask.bits
        if field.alpha_mask is not None:
            config["alpha_mask"] = field.alpha_mask.config
            tensors["alphaMask.mask"] = field.alpha_mask.bits.clone()
        return config, tensors


@dataclasses.dataclass
class Targets:
    """Sums of components ``values`` [M] wanted at vertices ``index`` [M, 3] of a grid ``shape``.

    ``weights`` [M] or None, ``limit`` [M] int8: as :func:`pvdconvert.solve.als.vm_als` takes them.
    """

    index: Tensor
    values: Tensor
    shape: list[int]
    weights: Tensor | None
    limit: Tensor
    how: str

    def __str__(self) -> str:
        return f"{len(self.index)} vertices of {'x'.join(str(v) for v in self.shape)}, {self.how}"


def targets(field: TensorialField, store: Store, seconds: float, solved: float) -> Targets | None:
    """Log-density (or what the activation makes of it) at the vertices that samples touch; None without samples.

    The teacher is asked at those vertices if that is cheap, on a coarser grid if need be; otherwise the store's own
    samples are spread to vertices. Costs are estimated, not measured: the same call gives the same field.

    solved    how many vertices may be fitted to at most
    """
    x, sigma = torch.cat([store.x, store.free_x]), torch.cat([store.sigma, store.free_sigma])
    x01 = field.unit(x)
    inside = ((x01 >= 0) & (x01 <= 1)).all(-1)
    x01, sigma = x01[inside], sigma[inside]
    if not len(x01):
        return None
    resolution = field.options.resolution
    affordable = min(seconds * 0.5 * FLOPS_RATE / store.teacher.flops_per_point, solved)
    for scale in (1.0, 0.8, 0.64, 0.5):
        shape = [max(2, round(scale * v)) for v in resolution]
        index = corners(x01, shape)
        if len(index) <= affordable:
            last = torch.tensor(shape, device=x.device) - 1
            where = (index / last * field.size + field.low).float()
            values, limit = field.inverse(store.ask_density(where))
            return Targets(index, values, shape, None, limit, "asked at the vertices")
    shape = [max(2, round(min(1.0, SCATTERED / max(resolution)) * v)) for v in resolution]
    index, means, weights = scatter(x01, field.inverse(sigma)[0][:, None], shape)
    values = means[:, 0]
    low, high = field.inverse(torch.tensor([0.0, math.inf], device=x.device))[0]
    limit = (values >= high - 1e-3).to(torch.int8) - (values <= low + 1e-3).to(torch.int8)
    return Targets(index, values, shape, weights.clamp(max=4.0), limit, "spread from the samples")


def around(facts: TeacherFacts, given: Mapping[str, Any]) -> Box:
    """The occupied box and a margin of a cell, within the scene's; numbers that float32 holds, as files do."""
    if given.get("box") is not None:
        return Box.from_json(given["box"])
    low = [max(s, o - facts.cell) for s, o in zip(facts.scene.box.min, facts.occupied_box.min)]
    high = [min(s, o + facts.cell) for s, o in zip(facts.scene.box.max, facts.occupied_box.max)]
    a, b, c, d, e, f = torch.tensor([*low, *high], dtype=torch.float32).tolist()
    return Box((a, b, c), (d, e, f))


def heads(field: TensorialField) -> list[Tensor]:
    """Parameters of the linear layers."""
    return [*field.basis.parameters(), *([] if field.head is None else field.head.parameters())]


def _empty_shift(options: TensorialOptions, box: Box) -> float:
    """The shift at which components of 0 are :data:`EMPTY`."""
    empty = EMPTY * (max(options.resolution) - 1) / (box.longest * options.density_scale)
    if options.density_activation == "exp":
        return round(math.log(empty), 4)
    if options.density_activation == "softplus":
        return round(math.log(math.expm1(min(empty, 50.0))), 4)
    return options.density_shift


def _linear(field: TensorialField) -> dict[str, Tensor]:
    """Parameters of the linear layers under TensoRF's names."""
    out: dict[str, Tensor] = {"basis_mat.weight": field.basis.layers[0].get_parameter("weight")}
    for j, layer in enumerate([] if field.head is None else field.head.layers):
        out[f"renderModule.mlp.{2 * j}.weight"] = layer.get_parameter("weight")
        if layer.bias is not None:
            out[f"renderModule.mlp.{2 * j}.bias"] = layer.get_parameter("bias")
    return out


def _tensors(field: TensorialField) -> dict[str, Tensor]:
    linear = {name: p.detach().clone() for name, p in _linear(field).items()}
    return {**field.density_grid.export("density"), **field.color_grid.export("app"), **linear}


def _plain(options: TensorialOptions) -> Config:
    config = dataclasses.asdict(options)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}


def cubic(box: Box, side: int) -> list[int]:
    """Vertices along each axis at one spacing, ``side`` along the longest."""
    return [max(2, round(s / box.longest * (side - 1)) + 1) for s in box.size]
