"""The architecture ``tensorf``: plans, files and projection of :class:`TensorfField`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import RadianceField
from pvdconvert.kernels.planes import AXES, PAIRS
from pvdconvert.nn.mask import Mask
from pvdconvert.nn.planes import resample_mode
from pvdconvert.plugin import ArchitectureBase, Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Box, Scene
from pvdconvert.solve.als import corners, scatter, vm_als
from pvdconvert_plugins.tensorf_field import TensorfField
from pvdconvert_plugins.tensorf_spec import TensorfOptions, megabytes, parse

if TYPE_CHECKING:
    from pvdconvert.distill.store import Store

LONGEST = {"fast": 144, "balanced": 288, "best": 400}
"""Vertices along the longest axis of the occupied box, by preset."""
SMALLEST = 16
EMPTY = 0.01
"""Optical thickness of one voxel where the components are 0: as good as empty, yet with a gradient that can fill it."""
SWEEPS = 5
FLOPS_RATE = 3e10
"""Floating-point operations of a teacher, and below vertices solved, in a second on two plain cores."""
ALS_RATE = 1e6
SCATTERED = 128
"""Longest side of the grid to which samples are spread."""
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
            {"params": list(field.density_grid.parameters()), "lr": 1e-2, "name": "density planes"},
            {"params": list(field.color_grid.parameters()), "lr": 2e-2, "name": "colour planes"},
            {"params": heads, "lr": 5e-3, "name": "colour network"},
        ]

    @torch.no_grad()
    def project(self, field: RadianceField, store: Store, seconds: float) -> str | None:
        """Log-density (or what the activation makes of it) by least squares over the vertices that samples touch.

        The teacher is asked at those vertices if that is cheap, on a coarser grid if need be; otherwise the store's own
        samples are spread to vertices. Costs are estimated, not measured: the same call gives the same field.
        """
        assert isinstance(field, TensorfField)
        x, sigma = torch.cat([store.x, store.free_x]), torch.cat([store.sigma, store.free_sigma])
        x01 = field.unit(x)
        inside = ((x01 >= 0) & (x01 <= 1)).all(-1)
        x, x01, sigma = x[inside], x01[inside], sigma[inside]
        if not len(x):
            return None
        o = field.options
        affordable = seconds * min(0.5 * FLOPS_RATE / store.teacher.flops_per_point, 0.5 * ALS_RATE / SWEEPS)
        for scale in (1.0, 0.8, 0.64, 0.5):
            shape = [max(2, round(scale * v)) for v in o.resolution]
            index = corners(x01, shape)
            if len(index) <= affordable:
                last = torch.tensor(shape, device=x.device) - 1
                where = (index / last * field.size + field.low).float()
                values, limit = field.inverse(store.ask_density(where))
                weights, how = None, "asked at the vertices"
                break
        else:
            shape = [max(2, round(min(1.0, SCATTERED / max(o.resolution)) * v)) for v in o.resolution]
            index, values, weights = scatter(x01, field.inverse(sigma)[0], shape)
            low, high = field.inverse(torch.tensor([0.0, math.inf], device=x.device))[0]
            limit = (values >= high - 1e-3).to(torch.int8) - (values <= low + 1e-3).to(torch.int8)
            how = "spread from the samples"
            weights = weights.clamp(max=4.0)
        generator = torch.Generator().manual_seed(0)
        fit = vm_als(
            index, values, shape, o.density_ranks, sweeps=SWEEPS, weights=weights, limit=limit, generator=generator
        )
        for i, ((a, b), c) in enumerate(zip(PAIRS, AXES)):
            n = o.resolution
            fit.planes[i], fit.lines[i] = resample_mode(fit.planes[i], fit.lines[i], n[a], n[b], n[c])
        field.density_grid.assign(fit.planes, fit.lines)
        size = f"{len(index)} vertices of {'x'.join(str(v) for v in shape)}, {how}"
        return f"density by {SWEEPS} sweeps of masked least squares over {size}: rms error {fit.error:.3f}"


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
