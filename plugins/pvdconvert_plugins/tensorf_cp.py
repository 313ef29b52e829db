"""The architecture ``tensorf-cp``: plans, files and projection of :class:`TensorfCpField`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvdconvert.field import RadianceField
from pvdconvert.kernels.lines import AXES
from pvdconvert.nn.lines import resample_line
from pvdconvert.plugin import Config
from pvdconvert.scene import Scene
from pvdconvert.solve.cp import cp_als
from pvdconvert_plugins.tensorf_base import SHADING, Tensorial, heads, targets
from pvdconvert_plugins.tensorf_color import PART, Solver, project_color
from pvdconvert_plugins.tensorf_cp_field import TensorfCpField
from pvdconvert_plugins.tensorf_cp_spec import TensorfCpOptions, megabytes, parse
from pvdconvert_plugins.tensorf_field import TensorialField
from pvdconvert_plugins.tensorf_spec import TensorialOptions

if TYPE_CHECKING:
    from pvdconvert.distill.store import Store

PRESETS: Mapping[str, Config] = {
    "fast": {"resolution": 160, "density_rank": 96, "color_rank": 192},
    "balanced": {"resolution": 300, "density_rank": 128, "color_rank": 288},
    "best": {"resolution": 400, "density_rank": 192, "color_rank": 384},
}
"""``resolution``: vertices along the longest axis of the occupied box."""
SWEEPS, COLOR_SWEEPS = 8, 6
ALS_RATE = 2e9
"""Vertices times rank squared of one sweep in a second on two plain cores."""


class TensorfCp(Tensorial):
    """The architecture ``tensorf-cp``."""

    name = "tensorf-cp"
    student = SHADING

    def parse(self, config: Mapping[str, Any]) -> TensorfCpOptions:
        return parse(config)

    def megabytes(self, options: TensorialOptions) -> float:
        assert isinstance(options, TensorfCpOptions)
        return megabytes(options)

    def field(self, options: TensorialOptions, scene: Scene, generator: torch.Generator) -> TensorfCpField:
        assert isinstance(options, TensorfCpOptions)
        return TensorfCpField(options, scene, generator)

    def build(self, config: Config, scene: Scene, seed: int) -> TensorfCpField:
        field = super().build(config, scene, seed)
        assert isinstance(field, TensorfCpField)
        return field

    def preset(self, name: str) -> Config:
        return dict(PRESETS.get(name, PRESETS["balanced"]))

    def assign(self, field: TensorialField, tensors: Mapping[str, Tensor]) -> None:
        assert isinstance(field, TensorfCpField)
        for name, grid in (("density", field.density_grid), ("app", field.color_grid)):
            grid.assign([tensors[f"{name}_line.{i}"][0, :, :, 0].t() for i in range(3)])

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        assert isinstance(field, TensorfCpField)
        return [
            {"params": list(field.density_grid.parameters()), "lr": 2e-2, "name": "density lines"},
            {"params": list(field.color_grid.parameters()), "lr": 2e-2, "name": "colour lines"},
            {"params": heads(field), "lr": 2e-2, "name": "colour network", "rotated": True, "betas": (0.9, 0.95)},
        ]

    @torch.no_grad()
    def project(self, field: RadianceField, store: Store, seconds: float) -> str | None:
        """Density by masked least squares over the vertices that samples touch, then colour likewise."""
        assert isinstance(field, TensorfCpField)
        rank, n = field.options.density_rank, field.options.resolution
        goal = targets(field, store, seconds, seconds * 0.3 * ALS_RATE / (SWEEPS * rank**2))
        if goal is None:
            return None
        fit = cp_als(
            goal.index,
            goal.values,
            goal.shape,
            rank,
            sweeps=SWEEPS,
            weights=goal.weights,
            limit=goal.limit,
            generator=torch.Generator().manual_seed(0),
        )
        field.density_grid.assign([resample_line(line, n[axis]) for line, axis in zip(fit.lines, AXES)])
        density = f"density by {SWEEPS} sweeps of masked least squares over {goal}: rms error {fit.error:.3f}"
        color = project_color(field, store, 0.3 * seconds, _color_solver(field))
        return density if color is None else f"{density}; {color}"


def _color_solver(field: TensorfCpField) -> Solver:
    o, grid = field.options, field.color_grid

    def fit(
        index: Tensor, values: Tensor, shape: list[int], ranks: list[int], weights: Tensor, generator: torch.Generator
    ) -> list[Tensor]:
        found = cp_als(index, values, shape, ranks[0], sweeps=COLOR_SWEEPS, weights=weights, generator=generator)
        return [resample_line(line, o.resolution[axis]) for line, axis in zip(found.lines, AXES)]

    return Solver(
        ranks=(o.color_rank,),
        modes=(0, 0, 0),
        factors=[p.data for p in grid.parameters()],
        assign=grid.assign,
        fit=fit,
        rate=ALS_RATE / (COLOR_SWEEPS * (o.color_rank // PART) ** 2 + 1),
    )
