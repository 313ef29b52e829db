"""The field of ``tensorf-cp``: TensoRF's CANDECOMP/PARAFAC decomposition (arXiv 2203.09517; layouts 3.2, 3.3)."""

from __future__ import annotations

import torch

from pvdconvert.nn.lines import CpLines
from pvdconvert.scene import Scene
from pvdconvert_plugins.tensorf_cp_spec import TensorfCpOptions
from pvdconvert_plugins.tensorf_field import TensorialField


class TensorfCpField(TensorialField):
    """Products of three lines."""

    options: TensorfCpOptions
    density_grid: CpLines
    color_grid: CpLines

    def __init__(self, options: TensorfCpOptions, scene: Scene, generator: torch.Generator | None = None) -> None:
        density = CpLines(options.resolution, options.density_rank, generator=generator)
        color = CpLines(options.resolution, options.color_rank, generator=generator)
        super().__init__(options, scene, density, color, options.color_rank, generator)
        self.flops_per_point = 11.0 * options.density_rank + 50.0
