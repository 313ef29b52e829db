"""The `kilonerf` architecture: a lattice of thousands of tiny perceptrons (Reiser et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import RadianceField
from pvdconvert.nn.mask import Mask
from pvdconvert.plugin import ArchitectureBase, Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Scene
from pvdconvert_plugins.kilonerf_field import KilonerfField, check_tensors
from pvdconvert_plugins.kilonerf_spec import KilonerfOptions

LONGEST = {"fast": 6, "balanced": 10, "best": 16}
"""Networks along the longest side of the occupied box, by preset; the paper has 16."""
THICK = 40.0
"""Unit output of a student's density is a mean free path of the box's longest side over this."""
RATE = 3e-3
"""Peak rate of Adam: each network sees few of a batch's points."""


class Kilonerf(ArchitectureBase):
    """See :class:`pvdconvert.plugin.Architecture`."""

    def plan(self, facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
        for key, value in overrides.items():
            if key in limits.fixed and limits.fixed[key] != value:
                raise RequestError(
                    f"kilonerf: {key}={value!r} was asked, but the output layout holds only {limits.fixed[key]!r}",
                    hint="leave out --set, or write the native layout",
                )
        box = facts.occupied_box
        given = {**limits.defaults, **limits.fixed, **overrides}
        for most in range(LONGEST.get(budget.preset, LONGEST["balanced"]), 0, -1):
            config: Config = {
                "resolution": [max(1, round(most * side / box.longest)) for side in box.size],
                "width": 32 if budget.preset == "best" else 24,
                "feature_width": 32 if budget.preset == "best" else 24,
                "direction_width": 32 if budget.preset == "best" else 24,
                # Cells are small: the paper's ten octaves are for whole scenes.
                "position_frequencies": 5,
                "density_activation": "softplus",
                "density_scale": THICK / box.longest,
                "box": box.to_json(),
                **given,
            }
            try:
                options = KilonerfOptions.from_config(config)
            except InputError as error:
                raise RequestError(str(error)) from error
            size = _megabytes(options, facts)
            if budget.max_mb is None or size <= budget.max_mb:
                return options.to_config()
        raise RequestError(
            f"kilonerf: no lattice fits --max-mb {budget.max_mb}: the smallest takes {size:.3f} MB",
            hint="raise --max-mb, or --set width=16",
        )

    def build(self, config: Config, scene: Scene, seed: int) -> KilonerfField:
        field = KilonerfField(KilonerfOptions.from_config({**config, "mask": None, "occupancy": None}), scene)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in field.tensors().items():
                if name.endswith(".bias"):
                    p.zero_()
                    continue
                # One draw for all networks, as the program does: neighbours start alike.
                one = torch.empty(p.shape[-2:])
                gain = 6.0 if name.startswith(("trunk", "direction")) else 3.0
                bound = (gain / one.shape[0]) ** 0.5
                p.copy_(one.uniform_(-bound, bound, generator=generator).expand_as(p))
        return field

    def load(self, config: Config, tensors: Mapping[str, Tensor], scene: Scene) -> KilonerfField:
        options = KilonerfOptions.from_config(config)
        masks = {f"{key}.bits" for key in ("mask", "occupancy") if getattr(options, key) is not None}
        check_tensors(options.shapes(), masks, tensors)
        field = KilonerfField(options, scene)
        with torch.no_grad():
            for name, p in field.tensors().items():
                p.copy_(tensors[name])
        if options.mask is not None:
            field.mask = Mask.from_parts(options.mask, tensors["mask.bits"])
        if options.occupancy is not None:
            field.set_occupancy(tensors["occupancy.bits"])
        return field

    def save(self, field: RadianceField) -> tuple[Config, dict[str, Tensor]]:
        assert isinstance(field, KilonerfField)
        config = field.options.to_config()
        tensors = {name: p.detach() for name, p in field.tensors().items()}
        if field.mask is not None:
            config["mask"] = field.mask.to_config()
            tensors["mask.bits"] = field.mask.bits
        if field.occupied is not None:
            tensors["occupancy.bits"] = field.occupancy_bits()
        return config, tensors

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        return [{"params": [p for p in field.parameters() if p.requires_grad], "lr": RATE, "name": "networks"}]


def _megabytes(options: KilonerfOptions, facts: TeacherFacts) -> float:
    """Size on disk: float32 weights and a bit for each cell of the mask."""
    weights = sum(math.prod(shape) for shape in options.shapes().values())
    cells = math.prod(math.ceil(side / facts.cell) for side in facts.scene.box.size)
    return (4 * weights + cells / 8 + 4096) / 1e6
