"""What `plenoxels` is and how it is configured. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from pvdconvert.plugin import ArchitectureSpec

SPEC = ArchitectureSpec(
    name="plenoxels",
    title="Plenoxels: sparse voxels with spherical harmonics (fast to ask, no network)",
    code="pvdconvert_plugins.plenoxels:Plenoxels",
    options="pvdconvert_plugins.plenoxels_spec:PlenoxelsOptions",
    paper="Fridovich-Keil and Yu et al. 2022, arXiv:2112.05131",
    licence="MIT",
)


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, slots=True)
class PlenoxelsOptions:
    """Every configuration key. Tensors (V = vertices that exist, B = bands^2):

    ``vertices``      [V, 3] int16 or int32, sorted x-major; 0 and ``shape`` - 1 lie on the faces of the box
    ``density_data``  [V, 1] float32, before activation
    ``sh_data``       [V, 3 * B] ``store_dtype``: all of red, then green, then blue, before activation (svox2's order)
    """

    resolution: int = _option(256, "vertices along the longest side of the box")
    bands: int = _option(3, "bands of spherical harmonics, 1..5 (3 = SH degree 2: 9 coefficients a colour)")
    density_activation: str = _option("exp", "exp (log-density is interpolated) or relu (svox2)")
    color_activation: str = _option("sigmoid", "sigmoid, or shift: max(value + 0.5, 0) (svox2)")
    density_scale: float = _option(1.0, "density per world unit = this times the activated value")
    missing: str = _option("cell", "a cell lacking a vertex: cell = it is empty; zero = the vertex counts as 0 (svox2)")
    store_dtype: str = _option("float32", "how files hold the colour coefficients: float32 or float16")
    box: Mapping[str, Any] | None = _option(None, "{min, max} between the outer vertices; none = the scene's box")
    shape: tuple[int, int, int] | None = _option(
        None, "vertices along x, y, z; none = from resolution, with cells as near to cubes as whole counts allow"
    )
