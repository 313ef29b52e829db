"""Announces ``ngp``: its name and its options. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pvdconvert.plugin import ArchitectureSpec

SPEC = ArchitectureSpec(
    name="ngp",
    title="Hash grid and two tiny MLPs (Instant-NGP)",
    code="pvdconvert_plugins.ngp:Ngp",
    options="pvdconvert_plugins.ngp_spec:NgpOptions",
    paper="Mueller et al., Instant Neural Graphics Primitives with a Multiresolution Hash Encoding, SIGGRAPH 2022",
    licence="MIT",
)


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class NgpOptions:
    """Every configuration key of an ``ngp`` field."""

    levels: int = _option(16, "levels of the grid")
    features: int = _option(2, "features per level")
    log2_table: int = _option(19, "no level holds more than 2^this entries")
    base_resolution: int = _option(16, "resolution of the coarsest level")
    per_level_scale: float = _option(
        1.3819128799677762, "growth of the resolution per level; --set finest_resolution=N sets it for you"
    )
    index_rule: str = _option(
        "torch-ngp",
        "torch-ngp | tcnn: whose entries and strides. Students take torch-ngp, so that its files can hold them",
    )
    offsets: Sequence[int] | None = _option(None, "first row of each level and the end, as stored; None = by rule")
    interpolation: str = _option("linear", "linear | smoothstep, between the corners of a cell")
    hidden: int = _option(64, "width of the hidden layers of the density MLP")
    density_layers: int = _option(1, "hidden layers of the density MLP")
    geo_features: int = _option(15, "outputs of the density MLP beside the log-density")
    color_hidden: int | None = _option(None, "width of the hidden layers of the colour MLP; None = hidden")
    color_layers: int = _option(2, "hidden layers of the colour MLP")
    sh_bands: int = _option(4, "bands of the view direction's spherical harmonics: 4 are 16 numbers")
    color_input: str = _option(
        "sh+geo", "sh+geo: direction, then geo features (torch-ngp); h+sh: all density outputs first (instant-ngp)"
    )
    density_activation: str = _option("exp", "exp: density = density_scale * exp(first output)")
    color_activation: str = _option("sigmoid", "sigmoid | exp (HDR; its input is clamped to -10..10)")
    density_scale: float = _option(1.0, "multiplies density: converts the source's length unit to the scene's")
    box: Sequence[Sequence[float]] | None = _option(None, "[[min], [max]] of the grid, world; None = the scene's box")
    mask: Mapping[str, Any] | None = _option(None, "shape, origin, cell: where it may be non-empty (mask.bits)")
