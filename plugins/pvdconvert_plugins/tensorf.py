"""The architecture ``tensorf``: plans, files and projection of :class:`TensorfField`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvdconvert.field import RadianceField
from pvdconvert.kernels.planes import AXES, PAIRS
from pvdconvert.nn.planes import resample_mode
from pvdconvert.plugin import Config
from pvdconvert.scene import Scene
from pvdconvert.solve.als import vm_als
from pvdconvert_plugins.tensorf_base import SHADING, Tensorial, heads, targets
from pvdconvert_plugins.tensorf_color import Solver, project_color
from pvdconvert_plugins.tensorf_field import TensorfField, TensorialField
from pvdconvert_plugins.tensorf_spec import TensorfOptions, TensorialOptions, megabytes, parse

if TYPE_CHECKING:
    from pvdconvert.distill.store import Store

LONGEST = {"fast": 144, "balanced": 288, "best": 400}
"""Vertices along the longest axis of the occupied box, by preset."""
SWEEPS, COLOR_SWEEPS = 5, 3
ALS_RATE = 1e6
"""Vertices solved in a second and sweep on two plain cores."""
SPARSE, VARIATION = 4e-5, (1e-3, 1e-4)
"""Weights of what training from pictures adds to the loss: L1 of the density's factors, total variation of planes of
density and of colour (arXiv 2203.09517, section 4.3; the authors' settings for real scenes)."""
STUDENT: Mapping[str, Any] = {"density_ranks": [16, 16, 16], "color_ranks": [48, 48, 48], **SHADING}


class Tensorf(Tensorial):
    """The architecture ``tensorf``."""

    name = "tensorf"
    student = STUDENT

    def parse(self, config: Mapping[str, Any]) -> TensorfOptions:
        return parse(config)

    def megabytes(self, options: TensorialOptions) -> float:
        assert isinstance(options, TensorfOptions)
        return megabytes(options)

    def field(self, options: TensorialOptions, scene: Scene, generator: torch.Generator) -> TensorfField:
        assert isinstance(options, TensorfOptions)
        return TensorfField(options, scene, generator)

    def build(self, config: Config, scene: Scene, seed: int) -> TensorfField:
        field = super().build(config, scene, seed)
        assert isinstance(field, TensorfField)
        return field

    def preset(self, name: str) -> Config:
        return {"resolution": LONGEST.get(name, LONGEST["balanced"])}

    def assign(self, field: TensorialField, tensors: Mapping[str, Tensor]) -> None:
        assert isinstance(field, TensorfField)
        for name, grid in (("density", field.density_grid), ("app", field.color_grid)):
            planes = [tensors[f"{name}_plane.{i}"][0].permute(1, 2, 0) for i in range(3)]
            grid.assign(planes, [tensors[f"{name}_line.{i}"][0, :, :, 0].t() for i in range(3)])

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        assert isinstance(field, TensorfField)
        return [
            {"params": list(field.density_grid.parameters()), "lr": 1e-2, "name": "density planes"},
            {"params": list(field.color_grid.parameters()), "lr": 2e-2, "name": "colour planes"},
            # The network bounds a short run: on lego, turned axes and eight times its usual rate are worth 1.3 dB at
            # equal steps.
            {"params": heads(field), "lr": 4e-2, "name": "colour network", "rotated": True, "betas": (0.9, 0.95)},
        ]

    def factor_norm(self, field: RadianceField) -> Tensor:
        """Sum over planes and lines of density of their mean absolute values (pvd.md 1.6)."""
        assert isinstance(field, TensorfField)
        return torch.stack([p.abs().mean() for p in field.density_grid.parameters()]).sum()

    def regularizer(self, field: RadianceField, generator: torch.Generator) -> Tensor | None:
        """L1 of the density's factors and total variation of all planes."""
        assert isinstance(field, TensorfField)
        rough = VARIATION[0] * field.density_grid.variation() + VARIATION[1] * field.color_grid.variation()
        return SPARSE * self.factor_norm(field) + rough

    @torch.no_grad()
    def project(self, field: RadianceField, store: Store, seconds: float) -> str | None:
        """Density by masked least squares over the vertices that samples touch, then colour likewise."""
        assert isinstance(field, TensorfField)
        goal = targets(field, store, seconds, seconds * 0.3 * ALS_RATE / SWEEPS)
        if goal is None:
            return None
        n = field.options.resolution
        fit = vm_als(
            goal.index,
            goal.values,
            goal.shape,
            field.options.density_ranks,
            sweeps=SWEEPS,
            weights=goal.weights,
            limit=goal.limit,
            generator=torch.Generator().manual_seed(0),
        )
        for i, ((a, b), c) in enumerate(zip(PAIRS, AXES)):
            fit.planes[i], fit.lines[i] = resample_mode(fit.planes[i], fit.lines[i], n[a], n[b], n[c])
        field.density_grid.assign(fit.planes, fit.lines)
        density = f"density by {SWEEPS} sweeps of masked least squares over {goal}: rms error {fit.error:.3f}"
        color = project_color(field, store, 0.3 * seconds, _color_solver(field))
        return density if color is None else f"{density}; {color}"


def _color_solver(field: TensorfField) -> Solver:
    o, grid = field.options, field.color_grid

    def fit(
        index: Tensor, values: Tensor, shape: list[int], ranks: list[int], weights: Tensor, generator: torch.Generator
    ) -> list[Tensor]:
        found = vm_als(index, values, shape, ranks, sweeps=COLOR_SWEEPS, weights=weights, generator=generator)
        pairs = [
            resample_mode(found.planes[i], found.lines[i], *(o.resolution[k] for k in (a, b, c)))
            for i, ((a, b), c) in enumerate(zip(PAIRS, AXES))
        ]
        return [plane for plane, _ in pairs] + [line for _, line in pairs]

    return Solver(
        ranks=o.color_ranks,
        modes=(0, 1, 2, 0, 1, 2),
        factors=[p.data for p in (*grid.planes, *grid.lines)],
        assign=lambda factors: grid.assign(factors[:3], factors[3:]),
        fit=fit,
        rate=ALS_RATE / COLOR_SWEEPS,
    )
