"""What `tensorf` is and how it is configured; what it shares with `tensorf-cp`. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any, TypeVar

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
    "shading": ("mlp", "sh", "rgb"),
    "color_activation": ("sigmoid", "relu", "none"),
    "view_encoding": ("frequency", "sh"),
    "view_space": ("world", "ndc"),
    "density_activation": ("softplus", "relu", "exp"),
    "padding": ("none", "zero"),
}


def option(default: Any, text: str) -> Any:
    """A field of an options dataclass with its help."""
    return field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, slots=True)
class TensorialOptions:
    """Keys of every tensor decomposition: its grid, its colour, its density. Defaults are the TensoRF program's."""

    resolution: tuple[int, int, int] = option(
        (128, 128, 128), "vertices along x, y, z; one number in --set = along the longest axis"
    )
    color_features: int = option(27, "colour features after basis_mat; shading=sh: 3 * bands^2; shading=rgb: 3")
    shading: str = option(
        "mlp", "mlp; sh: the features are spherical harmonics coefficients [rgb, bands^2]; rgb: they are the colour"
    )
    color_activation: str = option(
        "sigmoid", "for shading=sh and rgb: sigmoid, relu (for sh of the harmonics + 0.5, as TensoRF) or none"
    )
    fea_pe: int = option(2, "octaves of the encoded colour features, for shading=mlp")
    mlp_bias: bool = option(True, "whether the colour network has biases")
    pos_pe: int = option(0, "octaves of the encoded position in the box, from -1 to 1, for shading=mlp")
    view_encoding: str = option("frequency", "frequency (with the plain direction), or sh, for shading=mlp")
    view_pe: int = option(2, "octaves of the direction encoding, for view_encoding=frequency")
    view_bands: int = option(4, "bands of spherical harmonics, for view_encoding=sh")
    view_space: str = option(
        "world",
        "world, or ndc: the network is shown the direction of the ray after the scene's NDC warp; in --set also ray: "
        "whichever the scene has",
    )
    wave_scale: float = option(1.0, "lowest frequency of encoded features and directions (2 pi in nerfstudio)")
    wave_step: float = option(1.0, "octaves from one of those frequencies to the next")
    mlp_width: int = option(128, "units of the hidden layers")
    mlp_layers: int = option(3, "linear layers of the colour network")
    density_activation: str = option("softplus", "softplus, relu (without the shift) or exp")
    density_shift: float = option(-10.0, "added before softplus or exp")
    density_scale: float = option(25.0, "density per world unit = this times the activated value")
    density_clip: tuple[float, float] | None = option(None, "bounds to which the sum of components is cut first")
    feature_clip: tuple[float, float] | None = option(None, "bounds to which the colour features are cut")
    box: Mapping[str, Any] | None = option(None, "{min, max}: where the vertices lie; none = the scene's box")
    padding: str = option(
        "none",
        "outside of box, within the scene's: none = empty; zero = components fade to 0 over one voxel, as grid_sample",
    )
    mask: Mapping[str, Any] | None = option(None, "{shape, origin, cell} of the cells outside of which density is 0")
    alpha_mask: Mapping[str, Any] | None = option(
        None, "{shape, box} of TensoRF's alphaMask: density is 0 where its interpolated vertices are"
    )

    @property
    def bands(self) -> int:
        """Bands of harmonics that ``color_features`` holds, for shading = sh."""
        return round(math.sqrt(self.color_features / 3))

    @property
    def head_input(self) -> int:
        """Width of what the colour network is shown."""
        view = self.view_bands**2 if self.view_encoding == "sh" else 3 + 6 * self.view_pe
        return self.color_features * (1 + 2 * self.fea_pe) + 6 * self.pos_pe + view

    @property
    def shading_floats(self) -> int:
        """Parameters of the colour network."""
        if self.shading != "mlp":
            return 0
        widths = [self.head_input, *[self.mlp_width] * (self.mlp_layers - 1), 3]
        return sum((a + self.mlp_bias) * b for a, b in itertools.pairwise(widths))


@dataclasses.dataclass(frozen=True, slots=True)
class TensorfOptions(TensorialOptions):
    """Every configuration key. The defaults are those of the TensoRF program; conversions plan their own.

    Tensors, in TensoRF's names and shapes (layouts 3.2), for mode i of the axis pairs (0, 1), (0, 2), (1, 2) and the
    lines 2, 1, 0; n = resolution:

    ``density_plane.{i}``           [1, density_ranks[i], n[second of pair], n[first of pair]]
    ``density_line.{i}``            [1, density_ranks[i], n[line], 1]
    ``app_plane.{i}, app_line.{i}`` the same with color_ranks
    ``basis_mat.weight``            [color_features, sum of color_ranks]
    ``renderModule.mlp.{2j}.weight, .bias``   j < mlp_layers, for shading = mlp; input of layer 0:
                                    [features, d, waves(features), waves(position), waves(d)], or with
                                    view_encoding = sh [features, harmonics(d), waves(features), waves(position)];
                                    waves are channel-major: all sines, then all cosines (layouts 0.5, FE-C)

    the biases with ``mlp_bias``; and, with ``mask``, ``mask.bits`` (uint8, see :mod:`pvdconvert.nn.mask`); with
    ``alpha_mask``, ``alphaMask.mask``: the uint8 bytes of TensoRF's file, volume axes z, y, x, big-endian bits.
    """

    density_ranks: tuple[int, int, int] = option((16, 16, 16), "components of each mode for density")
    color_ranks: tuple[int, int, int] = option((48, 48, 48), "components of each mode for colour")

    @property
    def ranks(self) -> int:
        """All components of one position, density and colour."""
        return sum(self.density_ranks) + sum(self.color_ranks)


def megabytes(options: TensorfOptions) -> float:
    """Size of the float32 planes, lines and networks in MB, 10^6 bytes; a mask comes on top."""
    n = options.resolution
    floats = options.color_features * sum(options.color_ranks) + options.shading_floats
    for i, (a, b, c) in enumerate(((0, 1, 2), (0, 2, 1), (1, 2, 0))):
        floats += (options.density_ranks[i] + options.color_ranks[i]) * (n[a] * n[b] + n[c])
    return 4e-6 * floats


def parse(config: Mapping[str, Any]) -> TensorfOptions:
    """Options from a JSON configuration. Raises InputError naming the key that is unknown or impossible."""
    return parse_as(TensorfOptions, "tensorf", config)


Options = TypeVar("Options", bound=TensorialOptions)


def parse_as(kind: type[Options], name: str, config: Mapping[str, Any]) -> Options:
    """Options of architecture ``name``. Raises InputError naming the key that is unknown or impossible."""
    defaults = kind()
    known = {f.name: getattr(defaults, f.name) for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key not in known:
            raise InputError(f"{name}: unknown key {key!r}", hint=f"known: {', '.join(known)}")
        values[key] = _typed(name, key, value, known[key])
    options = kind(**values)
    for key, allowed in CHOICES.items():
        if getattr(options, key) not in allowed:
            raise InputError(f"{name}: {key} is {getattr(options, key)!r}", hint=f"choose {' or '.join(allowed)}")
    if options.shading == "sh" and (options.color_features != 3 * options.bands**2 or options.bands > 5):
        raise InputError(
            f"{name}: color_features is {options.color_features}", hint="shading=sh needs 3, 12, 27, 48 or 75"
        )
    if options.shading == "rgb" and options.color_features != 3:
        raise InputError(f"{name}: color_features is {options.color_features}", hint="shading=rgb needs 3")
    return options


RANGES: dict[str, tuple[int, int]] = {
    "resolution": (2, MAX_SIDE),
    "density_ranks": (1, 1024),
    "color_ranks": (1, 1024),
    "density_rank": (1, 4096),
    "color_rank": (1, 4096),
    "color_features": (1, 1024),
    "fea_pe": (0, 16),
    "pos_pe": (0, 16),
    "view_pe": (0, 16),
    "view_bands": (1, 5),
    "mlp_width": (1, 4096),
    "mlp_layers": (1, 16),
}
CLIPS = ("density_clip", "feature_clip")


def _typed(name: str, key: str, value: Any, default: Any) -> Any:
    try:
        if key in RANGES:
            low, high = RANGES[key]
            triple = isinstance(default, tuple)
            numbers = tuple(int(v) for v in value) if triple else (int(value),)
            if len(numbers) != (3 if triple else 1) or not all(low <= v <= high for v in numbers):
                what = "three numbers" if triple else "a number"
                raise InputError(f"{name}: {key} is {value!r}", hint=f"{what} in {low}..{high}")
            return numbers if triple else numbers[0]
        if key in CLIPS and value is not None:
            bounds = (_finite(value[0]), _finite(value[1]))
            if len(value) != 2 or bounds[0] >= bounds[1]:
                raise ValueError
            return bounds
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError
        if isinstance(default, float):
            return _finite(value)
    except (TypeError, ValueError, LookupError):
        like = "two rising numbers" if key in CLIPS else f"like {default!r}"
        raise InputError(f"{name}: {key} is {value!r}, {like} was expected") from None
    return value


def _finite(value: Any) -> float:
    number = float(value)
    if not abs(number) < float("inf"):
        raise ValueError
    return number
