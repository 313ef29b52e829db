"""Announces ``ngp``: its name and its options. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pvdconvert.errors import InputError
from pvdconvert.plugin import ArchitectureSpec

SPEC = ArchitectureSpec(
    name="ngp",
    title="Hash grid and two tiny MLPs (Instant-NGP)",
    code="pvdconvert_plugins.ngp:Ngp",
    options="pvdconvert_plugins.ngp_spec:NgpOptions",
    paper="Mueller et al., Instant Neural Graphics Primitives with a Multiresolution Hash Encoding, SIGGRAPH 2022",
    licence="MIT",
)

MAX_BANDS = 5
MAX_LOG_DENSITY = 30.0
"""exp() is cut here, at 1e13 per unit: opaque at any length, and its square still fits float32."""

_CHOICES = {
    "index_rule": ("tcnn", "torch-ngp", "nerfstudio"),
    "grid_type": (None, "hash", "dense", "tiled"),
    "interpolation": ("linear", "smoothstep", "nearest"),
    "color_input": ("sh+geo", "h+sh"),
    "view_input": ("unit", "half"),
    "density_activation": ("exp",),
    "color_activation": ("sigmoid", "exp"),
    "dtype": (None, "float16"),
}


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
        "torch-ngp | tcnn | nerfstudio: whose entries and strides. Students take torch-ngp, which its files can hold",
    )
    grid_type: str | None = _option(
        None, "None = hash; of index_rule tcnn also dense (not capped) and tiled (at most base_resolution^3 entries)"
    )
    offsets: Sequence[int] | None = _option(None, "first row of each level and the end, as stored; None = by rule")
    interpolation: str = _option("linear", "linear | smoothstep between the corners of a cell, or nearest")
    hidden: int = _option(64, "width of the hidden layers of the density MLP")
    density_layers: int = _option(1, "hidden layers of the density MLP")
    geo_features: int = _option(15, "outputs of the density MLP beside the log-density")
    color_hidden: int | None = _option(None, "width of the hidden layers of the colour MLP; None = hidden")
    color_layers: int = _option(2, "hidden layers of the colour MLP")
    sh_bands: int = _option(4, "bands of the view direction's spherical harmonics: 4 are 16 numbers")
    color_input: str = _option(
        "sh+geo", "sh+geo: direction, then geo features (torch-ngp); h+sh: all density outputs first (instant-ngp)"
    )
    color_constants: Sequence[float] | None = _option(
        None, "numbers appended to the colour MLP's input: tiny-cuda-nn's padding ones, an image's latent code"
    )
    view_input: str = _option(
        "unit", "unit: harmonics of d; half: nerfstudio's torch harmonics, of (d + 1) / 2 and without odd signs"
    )
    bias: bool = _option(False, "whether both MLPs have biases")
    density_clip: Sequence[float] | None = _option(None, "bounds to which the log-density is cut first")
    density_activation: str = _option("exp", "exp: density = density_scale * exp(first output)")
    color_activation: str = _option("sigmoid", "sigmoid | exp (HDR; its input is clamped to -10..10)")
    density_scale: float = _option(1.0, "multiplies density: converts the source's length unit to the scene's")
    box: Sequence[Sequence[float]] | None = _option(None, "[[min], [max]] of the grid, world; None = the scene's box")
    mask: Mapping[str, Any] | None = _option(
        None, "shape, origin, cell (or center, halves: nested cubes): where it may be non-empty (mask.bits)"
    )
    dtype: str | None = _option(None, "of the weights on disk: None = float32, or float16")


def parse(config: Mapping[str, Any]) -> NgpOptions:
    """The options in ``config``. Raises InputError naming a key that is unknown or cannot be."""
    fields = {f.name: f for f in dataclasses.fields(NgpOptions)}
    for key in config:
        if key not in fields:
            raise InputError(f"ngp: unknown configuration key {key!r}", hint=f"known: {', '.join(fields)}")
    values = dict(config)
    try:
        for key, low in (("hidden", 1), ("density_layers", 0), ("geo_features", 0), ("color_layers", 0)):
            values[key] = int(values.get(key, fields[key].default))
            if not low <= values[key] <= 4096:
                raise InputError(f"ngp: {key} = {values[key]} is not in {low}..4096")
        for key in ("levels", "features", "log2_table", "base_resolution", "sh_bands"):
            values[key] = int(values.get(key, fields[key].default))
        for key in ("per_level_scale", "density_scale"):
            values[key] = float(values.get(key, fields[key].default))
        for key in ("offsets", "color_hidden"):
            if values.get(key) is not None:
                values[key] = [int(v) for v in values[key]] if key == "offsets" else int(values[key])
        if (constants := values.get("color_constants")) is not None:
            key = "color_constants"
            values[key] = [float(v) for v in constants]
            if len(values[key]) > 256 or not all(math.isfinite(v) for v in values[key]):
                raise ValueError
        if (clip := values.get("density_clip")) is not None:
            key, bounds = "density_clip", [float(v) for v in clip]
            values[key] = bounds
            if len(bounds) != 2 or not -100 <= bounds[0] < bounds[1] <= MAX_LOG_DENSITY:
                raise ValueError
    except (TypeError, ValueError) as error:
        raise InputError(f"ngp: {key!r} = {values[key]!r} is not possible") from error
    if not isinstance(values.get("bias", False), bool):
        raise InputError(f"ngp: bias = {values['bias']!r} is neither true nor false")
    if values.get("view_input") == "half" and values["sh_bands"] > 4:
        raise InputError(f"ngp: view_input = 'half' has at most 4 bands, not {values['sh_bands']}")
    if not 1 <= values["sh_bands"] <= MAX_BANDS:
        raise InputError(f"ngp: sh_bands = {values['sh_bands']} is not in 1..{MAX_BANDS}")
    if not 0 < values["density_scale"] < math.inf:
        raise InputError(f"ngp: density_scale = {values['density_scale']} is not positive")
    for key, choices in _CHOICES.items():
        if values.get(key, choices[0]) not in choices:
            raise InputError(
                f"ngp: {key} = {values[key]!r} is not supported", hint=f"one of {', '.join(map(str, choices))}"
            )
    return NgpOptions(**values)
