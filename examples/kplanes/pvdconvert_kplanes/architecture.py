"""The architecture ``kplanes``: how big a student is, and how a field becomes named tensors and back."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import RadianceField
from pvdconvert.nn.mask import Mask
from pvdconvert.plugin import ArchitectureBase, Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Box, Scene
from pvdconvert_kplanes import KPlanesOptions, config_of, network_widths, options_of
from pvdconvert_kplanes.field import KPlanesField

PRESETS: dict[str, Config] = {
    "fast": {"resolution": 64, "channels": 16},
    "balanced": {"resolution": 96, "channels": 24},
    "best": {"resolution": 128, "channels": 32},
}
SMALLEST = 8


class KPlanes(ArchitectureBase):
    """Everything that is not written here (files, occupancy, distillation, reports) is the core's."""

    def plan(self, facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
        """By preset, over the occupied box; channels, then the resolution shrink to keep ``max_mb``."""
        for key, value in limits.fixed.items():
            if overrides.get(key, value) != value:
                raise RequestError(
                    f"kplanes: {key}={overrides[key]} was asked, but the output layout needs {value}",
                    hint=f"drop --set {key}",
                )
        given = {**limits.defaults, **limits.fixed, **overrides}
        preset = PRESETS.get(budget.preset, PRESETS["balanced"])
        box = _margin(facts)

        def options(**smaller: Any) -> KPlanesOptions:
            try:
                return options_of({**preset, **smaller, **given}, box)
            except InputError as error:
                raise RequestError(str(error)) from error

        o = options()
        if budget.max_mb is None or megabytes(o, facts) <= budget.max_mb:
            return config_of(o)
        for resolution in range(preset["resolution"], SMALLEST - 1, -4):
            o = options(resolution=resolution, channels=16 if resolution > 32 else 8)
            if megabytes(o, facts) <= budget.max_mb:
                return config_of(o)
        raise RequestError(
            f"kplanes: needs {megabytes(o, facts):.2f} MB at least, --max-mb is {budget.max_mb:g}",
            hint="raise --max-mb, or lower channels or scales with --set",
        )

    def build(self, config: Config, scene: Scene, seed: int) -> KPlanesField:
        options = options_of({**config, "mask": None}, scene.box)
        return KPlanesField(options, scene, torch.Generator().manual_seed(seed))

    def load(self, config: Config, tensors: Mapping[str, Tensor], scene: Scene) -> KPlanesField:
        options = options_of(config, scene.box)
        field = KPlanesField(options, scene)
        expected = named_tensors(field)
        masked = {"mask.bits"} if options.mask is not None else set()
        for key in [*expected, *masked, *tensors]:
            if key not in tensors:
                raise InputError(f"kplanes: tensor {key!r} is missing")
            if key not in expected and key not in masked:
                raise InputError(f"kplanes: tensor {key!r} is not part of this configuration")
            if key in expected and tensors[key].shape != expected[key].shape:
                shapes = f"{list(tensors[key].shape)}, expected {list(expected[key].shape)}"
                raise InputError(f"kplanes: tensor {key!r} is {shapes}")
        with torch.no_grad():
            for key, view in expected.items():
                view.copy_(tensors[key])
        if options.mask is not None:
            field.mask = Mask.from_parts(options.mask, tensors["mask.bits"])
        return field

    def save(self, field: RadianceField) -> tuple[Config, dict[str, Tensor]]:
        assert isinstance(field, KPlanesField)
        tensors = {key: view.detach().clone().contiguous() for key, view in named_tensors(field).items()}
        config = config_of(dataclasses.replace(field.options, mask=None))
        if field.mask is not None:
            config["mask"], tensors["mask.bits"] = field.mask.to_config(), field.mask.bits
        return config, tensors

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        assert isinstance(field, KPlanesField)
        return [
            {"params": list(field.planes), "lr": 2e-2, "name": "planes"},
            {"params": list(field.networks.parameters()), "lr": 1e-2, "name": "decoder", "rotated": True},
        ]

    def distortion(self, scene: Scene) -> float:
        """As nerfstudio's K-Planes has it."""
        return 0.001


def named_tensors(field: KPlanesField) -> dict[str, Tensor]:
    """Views of the parameters under the names of files: planes [1, C, H, W] as the program has them, then layers."""
    out = {f"grids.{i // 3}.{i % 3}": p.permute(2, 0, 1)[None] for i, p in enumerate(field.planes)}
    for name in network_widths(field.options):
        for i, layer in enumerate(field.layers(name)):
            out[f"{name}.{i}.weight"], out[f"{name}.{i}.bias"] = layer.weight, layer.bias
    return out


def megabytes(o: KPlanesOptions, facts: TeacherFacts) -> float:
    """Megabytes (10^6) of the file: planes, networks and the mask of the occupied cells."""
    numbers = sum(o.channels * (x * y + x * z + y * z) for x, y, z in o.resolutions or ())
    for widths in network_widths(o).values():
        numbers += sum((a + 1) * b for a, b in itertools.pairwise(widths))
    cells = math.prod(side / facts.cell + 2 for side in facts.scene.box.size)
    return (4 * numbers + cells / 8) / 1e6 + 0.002


def _margin(facts: TeacherFacts) -> Box:
    """The occupied box and a cell around it, within the scene's."""
    low = [max(s, o - facts.cell) for s, o in zip(facts.scene.box.min, facts.occupied_box.min, strict=True)]
    high = [min(s, o + facts.cell) for s, o in zip(facts.scene.box.max, facts.occupied_box.max, strict=True)]
    return Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))
