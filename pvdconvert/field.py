"""The one question every architecture answers: what are density and colour here?"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pvdconvert.nn.mask import Mask
    from pvdconvert.render.occupancy import Occupancy


class Stage(enum.StrEnum):
    """What is compared, shallow to deep: the progression of PVD (pvd.md 1.2)."""

    FEATURES = "features"
    DENSITY = "density"
    COLOR = "color"
    RENDER = "render"


class RadianceField(nn.Module):
    """A loaded model. Subclasses implement :meth:`encode`, :meth:`density` and :meth:`color`.

    Positions are in the scene's world. Activations and masks stay inside: what comes out is physical. Outside of its
    box a field answers density exactly 0.
    """

    feature_width: int | None = None
    """Width F of :meth:`features`, or None if this architecture has no tap."""

    flops_per_point: float = 1e4
    """Rough cost of :meth:`encode` and :meth:`density` for a point, in floating-point operations: plans use it."""

    batch_points: int = 1 << 13
    """Points in a step at which this architecture learns fastest."""

    batch_sides: int = 2
    """Directions in which a step compares the colour of a point; more pay where a direction costs next to nothing."""

    mask: Mask | None
    """Cells outside of which density is exactly 0; None = the box alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = None

    def restrict(self, occupancy: Occupancy) -> None:
        """Render nothing outside of the occupied cells. Called once on a fresh student, before it is projected.

        The default keeps the cells as :attr:`mask`, which :meth:`density` must honour; sparse structures allocate here.
        """
        from pvdconvert.nn.mask import Mask

        self.mask = Mask.from_occupancy(occupancy)

    def support(self) -> Occupancy | None:
        """Cells outside of which density is surely 0, or None if nothing is known but the box."""
        if self.mask is None:
            return None
        from pvdconvert.render.occupancy import Occupancy

        grid = self.mask.grid
        return Occupancy(torch.tensor(self.mask.origin, dtype=torch.float32, device=grid.device), self.mask.cell, grid)

    def encode(self, x: Tensor) -> Tensor:  # [N, 3] -> [N, C]
        """The position trunk, evaluated once: ``x`` [N, 3] world -> latent [N, C]. Row n belongs to point n.

        Fields without a trunk (grids) return ``x`` itself, so that density and colour pay only for what is asked.
        """
        raise NotImplementedError

    def density(self, latent: Tensor) -> Tensor:  # [N, C] -> [N]
        """Density [N] per world unit, >= 0; exactly 0 where the field renders nothing."""
        raise NotImplementedError

    def color(self, latent: Tensor, d: Tensor) -> Tensor:  # [N, C], [N, K, 3] -> [N, K, 3]
        """Colour [N, K, 3] in the scene's colour space for ``K`` unit view directions ``d`` [N, K, 3] a point."""
        raise NotImplementedError

    def features(self, latent: Tensor) -> Tensor | None:  # [N, C] -> [N, F]
        """The tap of PVD's first stage, or None."""
        return None

    def forward(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Density [N] and colour [N, 3] at ``x`` [N, 3] for one direction ``d`` [N, 3] a point."""
        latent = self.encode(x)
        return self.density(latent), self.color(latent, d[:, None, :])[:, 0]


class FunctionField(RadianceField):
    """A teacher made of two bare functions: ``density(x [N,3]) -> [N]`` and ``color(x [N,3], d [N,3]) -> [N,3]``."""

    def __init__(self, density: Callable[[Tensor], Tensor], color: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._density, self._color = density, color

    def encode(self, x: Tensor) -> Tensor:
        return x

    def density(self, latent: Tensor) -> Tensor:
        return self._density(latent).reshape(-1)

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        n, k, _ = d.shape
        x = latent[:, None, :].expand(n, k, 3).reshape(-1, 3)
        return self._color(x, d.reshape(-1, 3)).reshape(n, k, 3)


def forward_stage(
    field: RadianceField, stage: Stage, x: Tensor, d: Tensor | None, latent: Tensor | None = None
) -> Tensor | None:
    """The default of a plugin's ``forward_stage`` hook, made of the field's methods.

    FEATURES -> [N, F] or None; DENSITY -> [N]; COLOR -> [N, K, 3] (``d`` [N, K, 3] needed); RENDER -> [N, 4]: density
    and the colour of the first direction, which the renderer composites.
    """
    if latent is None:
        latent = field.encode(x)
    if stage is Stage.FEATURES:
        return field.features(latent)
    if stage is Stage.DENSITY:
        return field.density(latent)
    if d is None:
        raise ValueError(f"stage {stage} needs directions")
    if stage is Stage.COLOR:
        return field.color(latent, d)
    return torch.cat([field.density(latent)[:, None], field.color(latent, d[:, :1])[:, 0]], dim=-1)
