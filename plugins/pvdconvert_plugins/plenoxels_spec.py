"""What `plenoxels` is and how it is configured. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any, cast

from pvdconvert.errors import InputError, RequestError
from pvdconvert.plugin import ArchitectureSpec
from pvdconvert.scene import Box

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
    density_clip: tuple[float, float] | None = _option(
        None, "for density_activation=exp: bounds to which the interpolated log-density is cut"
    )
    density_scale: float = _option(1.0, "density per world unit = this times the activated value")
    missing: str = _option("cell", "a cell lacking a vertex: cell = it is empty; zero = the vertex counts as 0 (svox2)")
    store_dtype: str = _option("float32", "how files hold the colour coefficients: float32 or float16")
    box: Mapping[str, Any] | None = _option(None, "{min, max} between the outer vertices; none = the scene's box")
    shape: tuple[int, int, int] | None = _option(
        None, "vertices along x, y, z; none = from resolution, with cells as near to cubes as whole counts allow"
    )
    mask: Mapping[str, Any] | None = _option(None, "{shape, origin, cell} of the cells outside of which density is 0")


def plain(value: Any) -> Any:
    """Tuples as lists: JSON knows no others."""
    return list(value) if isinstance(value, tuple) else value


def as_config(options: PlenoxelsOptions) -> dict[str, Any]:
    """The options as a JSON configuration; a clip and a mask only where there is one."""
    values = {k: plain(v) for k, v in dataclasses.asdict(options).items()}
    return {k: v for k, v in values.items() if v is not None or k not in ("density_clip", "mask")}


def checked(config: Mapping[str, Any], error: type[InputError] | type[RequestError]) -> PlenoxelsOptions:
    """Checked options. Raises ``error`` naming the key."""
    known = [f.name for f in dataclasses.fields(PlenoxelsOptions)]
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise error(
                f"plenoxels has no option {key!r}; known: {', '.join(known)}",
                hint=f"did you mean {near[0]!r}?" if near else "",
            )
    try:
        o = PlenoxelsOptions(**config)
        shape = None if o.shape is None else cast("tuple[int, int, int]", tuple(int(v) for v in o.shape))
        o = dataclasses.replace(
            o, shape=shape, resolution=int(o.resolution), bands=int(o.bands), density_scale=float(o.density_scale)
        )
        if o.density_clip is not None:
            low, high = (float(v) for v in o.density_clip)
            o = dataclasses.replace(o, density_clip=(low, high))
        if o.box is not None:
            Box.from_json(o.box)
    except (TypeError, ValueError, KeyError, IndexError, InputError) as wrong:
        raise error(f"plenoxels: malformed option: {wrong}") from wrong
    for key, fine, allowed in (
        ("resolution", 2 <= o.resolution <= 1 << 14, "2..16384"),
        ("bands", 1 <= o.bands <= 5, "1..5"),
        ("density_activation", o.density_activation in ("exp", "relu"), "exp or relu"),
        ("color_activation", o.color_activation in ("sigmoid", "shift"), "sigmoid or shift"),
        ("density_scale", 0 < o.density_scale < math.inf, "a positive number"),
        (
            "density_clip",
            o.density_clip is None or -100 <= o.density_clip[0] < o.density_clip[1] <= 30,
            "two rising numbers",
        ),
        ("missing", o.missing in ("cell", "zero"), "cell or zero"),
        ("store_dtype", o.store_dtype in ("float32", "float16"), "float32 or float16"),
        (
            "shape",
            o.shape is None or (len(o.shape) == 3 and all(2 <= v <= 1 << 14 for v in o.shape)),
            "three counts in 2..16384",
        ),
    ):
        if not fine:
            raise error(f"plenoxels: {key}={getattr(o, key)!r} is not {allowed}")
    if o.missing == "zero" and o.density_activation == "exp":
        raise error("plenoxels: missing=zero needs density_activation=relu: exp(0) is not empty")
    return o
