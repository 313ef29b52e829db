"""What `tensorf` is and how it is configured. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from pvdconvert.errors import InputError
from pvdconvert.plugin import ArchitectureSpec

SPEC = ArchitectureSpec(
    name="tensorf",
    title="TensoRF (VM): planes times lines, fast and compact",
    code="pvdconvert_plugins.tensorf:Tensorf",
    options="pvdconvert_plugins.tensorf_spec:TensorfOptions",
    paper="Chen et al. 2022, arXiv:2203.09517",
    licence="MIT",
)

MAX_SIDE = 8192
CHOICES = {
    "shading": ("mlp", "sh"),
    "color_activation": ("sigmoid", "relu"),
    "view_encoding": ("frequency", "sh"),
    "density_activation": ("softplus", "relu", "exp"),
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, slots=True)
class TensorfOptions:
    """Every configuration key. The defaults are those of the TensoRF program; conversions plan their own.

    Tensors, in TensoRF's names and shapes (layouts 3.2), for mode i of the axis pairs (0, 1), (0, 2), (1, 2) and the
    lines 2, 1, 0; n = resolution:

    ``density_plane.{i}``           [1, density_ranks[i], n[second of pair], n[first of pair]]
    ``density_line.{i}``            [1, density_ranks[i], n[line], 1]
    ``app_plane.{i}, app_line.{i}`` the same with color_ranks
    ``basis_mat.weight``            [color_features, sum of color_ranks]
    ``renderModule.mlp.{2j}.weight, .bias``   j < mlp_layers, for shading = mlp; input of layer 0:
                                    [features, d, waves(features), waves(d)], or with view_encoding = sh
                                    [features, harmonics(d), waves(features)]

    and, with ``mask``, ``mask.bits`` (uint8).
    """

    resolution: tuple[int, int, int] = _option(
        (128, 128, 128), "vertices along x, y, z; one number in --set = along the longest axis"
    )
    density_ranks: tuple[int, int, int] = _option((16, 16, 16), "components of each mode for density")
    color_ranks: tuple[int, int, int] = _option((48, 48, 48), "components of each mode for colour")
    color_features: int = _option(27, "colour features after basis_mat; for shading=sh: 3 * bands^2")
    shading: str = _option("mlp", "mlp, or sh: the features are spherical harmonics coefficients, [rgb, bands^2]")
    color_activation: str = _option("sigmoid", "for shading=sh: sigmoid, or relu (of the harmonics + 0.5, as TensoRF)")
    fea_pe: int = _option(2, "octaves of the encoded colour features, for shading=mlp")
    view_encoding: str = _option("frequency", "frequency (with the plain direction), or sh, for shading=mlp")
    view_pe: int = _option(2, "octaves of the direction encoding, for view_encoding=frequency")
    view_bands: int = _option(4, "bands of spherical harmonics, for view_encoding=sh")
    mlp_width: int = _option(128, "units of the hidden layers")
    mlp_layers: int = _option(3, "linear layers of the colour network")
    density_activation: str = _option("softplus", "softplus, relu (without the shift) or exp")
    density_shift: float = _option(-10.0, "added before softplus or exp")
    density_scale: float = _option(25.0, "density per world unit = this times the activated value")
    box: Mapping[str, Any] | None = _option(None, "{min, max}: where the planes lie; none = the scene's box")
    mask: Mapping[str, Any] | None = _option(None, "{shape, origin, cell} of the cells outside of which density is 0")

    @property
    def bands(self) -> int:
        """Bands of harmonics that ``color_features`` holds, for shading = sh."""
        return round(math.sqrt(self.color_features / 3))

    @property
    def ranks(self) -> int:
        """All components of one position, density and colour."""
        return sum(self.density_ranks) + sum(self.color_ranks)


def megabytes(options: TensorfOptions) -> float:
    """Size of the float32 planes, lines and networks in MB, 10^6 bytes; a mask comes on top."""
    n = options.resolution
    floats = 0
    for i, (a, b, c) in enumerate(((0, 1, 2), (0, 2, 1), (1, 2, 0))):
        floats += (options.density_ranks[i] + options.color_ranks[i]) * (n[a] * n[b] + n[c])
    floats += options.color_features * sum(options.color_ranks)
    if options.shading == "mlp":
        view = options.view_bands**2 if options.view_encoding == "sh" else 3 + 6 * options.view_pe
        widths = [options.color_features * (1 + 2 * options.fea_pe) + view]
        widths += [options.mlp_width] * (options.mlp_layers - 1) + [3]
        floats += sum((a + 1) * b for a, b in itertools.pairwise(widths))
    return 4e-6 * floats


def parse(config: Mapping[str, Any]) -> TensorfOptions:
    """Options from a JSON configuration. Raises InputError naming the key that is unknown or impossible."""
    known = {f.name: f for f in dataclasses.fields(TensorfOptions)}
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key not in known:
            raise InputError(f"tensorf: unknown key {key!r}", hint=f"known: {', '.join(known)}")
        values[key] = _typed(key, value)
    options = TensorfOptions(**values)
    for key, allowed in CHOICES.items():
        if getattr(options, key) not in allowed:
            raise InputError(f"tensorf: {key} is {getattr(options, key)!r}", hint=f"choose {' or '.join(allowed)}")
    if options.shading == "sh" and (options.color_features != 3 * options.bands**2 or options.bands > 5):
        raise InputError(
            f"tensorf: color_features is {options.color_features}", hint="shading=sh needs 3, 12, 27, 48 or 75"
        )
    return options


RANGES: dict[str, tuple[int, int]] = {
    "resolution": (2, MAX_SIDE),
    "density_ranks": (1, 1024),
    "color_ranks": (1, 1024),
    "color_features": (1, 1024),
    "fea_pe": (0, 16),
    "view_pe": (0, 16),
    "view_bands": (1, 5),
    "mlp_width": (1, 4096),
    "mlp_layers": (1, 16),
}


def _typed(key: str, value: Any) -> Any:
    default = getattr(TensorfOptions(), key)
    try:
        if key in RANGES:
            low, high = RANGES[key]
            triple = isinstance(default, tuple)
            numbers = tuple(int(v) for v in value) if triple else (int(value),)
            if len(numbers) != (3 if triple else 1) or not all(low <= v <= high for v in numbers):
                what = "three numbers" if triple else "a number"
                raise InputError(f"tensorf: {key} is {value!r}", hint=f"{what} in {low}..{high}")
            return numbers if triple else numbers[0]
        if isinstance(default, float):
            number = float(value)
            if not abs(number) < float("inf"):
                raise ValueError
            return number
    except (TypeError, ValueError):
        raise InputError(f"tensorf: {key} is {value!r}, like {default!r} was expected") from None
    return value
