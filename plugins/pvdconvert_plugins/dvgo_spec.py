"""What `dvgo` is and how it is configured. Imports no torch."""

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
    name="dvgo",
    title="DirectVoxGO: dense voxels of density and features, and a small colour network",
    code="pvdconvert_plugins.dvgo:Dvgo",
    options="pvdconvert_plugins.dvgo_spec:DvgoOptions",
    paper="Sun et al. 2022, arXiv:2111.11215",
    licence="MIT",
)


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, slots=True)
class DvgoOptions:
    """Every configuration key. Tensors ([X, Y, Z] = ``shape``; vertices 0 and n - 1 lie on the faces of the box):

    ``density``             [1, 1, X, Y, Z] float32, before activation
    ``k0``                  [1, channels, X, Y, Z] ``store_dtype``: features, or colours before the sigmoid
    ``rgbnet.i.weight/bias``  layer i of ``mlp_depth``; its input is [features, encoded position, encoded direction]
    ``mask.bits``, ``mask_cache.bits``  cells that may hold density, eight a byte, C order, least significant bit first
    """

    resolution: int = _option(176, "vertices along the longest side of the box")
    channels: int = _option(12, "features of a vertex (3 = plain colours where mlp_depth is 0)")
    direct: bool = _option(False, "the network makes the colour from all features; else it adds to the first three")
    mlp_depth: int = _option(3, "layers of the colour network; 0 = none: colours do not depend on the direction")
    mlp_width: int = _option(64, "units of its hidden layers")
    view_frequencies: int = _option(4, "octaves of the direction encoding")
    position_frequencies: int | None = _option(
        None, "octaves of the encoding of the position in the box; none = the network does not see it"
    )
    act_shift: float = _option(0.0, "density per world unit = density_scale * softplus(value + act_shift)")
    density_scale: float = _option(1.0, "one over the side of the program's base voxel, world units")
    store_dtype: str = _option("float32", "how files hold the features: float32 or float16")
    box: Mapping[str, Any] | None = _option(None, "{min, max} between the outer vertices; none = the scene's box")
    shape: tuple[int, int, int] | None = _option(None, "vertices along x, y, z; none = from resolution")
    mask: Mapping[str, Any] | None = _option(None, "{shape, origin, cell} of the cells outside of which density is 0")
    mask_cache: Mapping[str, Any] | None = _option(
        None, "{shape, scale, shift}: the program's own mask; x belongs to the cell round(scale * x + shift)"
    )


def plain(value: Any) -> Any:
    """Tuples as lists: JSON knows no others."""
    return list(value) if isinstance(value, tuple) else value


def as_config(options: DvgoOptions) -> dict[str, Any]:
    """The options as a JSON configuration."""
    return {k: plain(v) for k, v in dataclasses.asdict(options).items()}


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def checked(config: Mapping[str, Any], error: type[InputError] | type[RequestError]) -> DvgoOptions:
    """Checked options. Raises ``error`` naming the key."""
    known = [f.name for f in dataclasses.fields(DvgoOptions)]
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise error(
                f"dvgo has no option {key!r}; known: {', '.join(known)}",
                hint=f"did you mean {near[0]!r}?" if near else "",
            )
    try:
        o = DvgoOptions(**config)
        shape = None if o.shape is None else cast("tuple[int, int, int]", tuple(int(v) for v in o.shape))
        o = dataclasses.replace(
            o, shape=shape, act_shift=float(o.act_shift), density_scale=float(o.density_scale), direct=bool(o.direct)
        )
        if o.box is not None:
            Box.from_json(o.box)
    except (TypeError, ValueError, KeyError, IndexError, InputError) as wrong:
        raise error(f"dvgo: malformed option: {wrong}") from wrong
    for key, fine, allowed in (
        ("resolution", _whole(o.resolution, 2, 4096), "2..4096"),
        ("channels", _whole(o.channels, 1, 1024), "1..1024"),
        ("mlp_depth", _whole(o.mlp_depth, 0, 32) and o.mlp_depth != 1, "0 or 2..32"),
        ("mlp_width", _whole(o.mlp_width, 1, 4096), "1..4096"),
        ("view_frequencies", _whole(o.view_frequencies, 0, 32), "0..32"),
        (
            "position_frequencies",
            o.position_frequencies is None or _whole(o.position_frequencies, 0, 32),
            "none or 0..32",
        ),
        ("act_shift", math.isfinite(o.act_shift), "a number"),
        ("density_scale", 0 < o.density_scale < math.inf, "a positive number"),
        ("store_dtype", o.store_dtype in ("float32", "float16"), "float32 or float16"),
        (
            "shape",
            o.shape is None or (len(o.shape) == 3 and all(2 <= v <= 4096 for v in o.shape)),
            "three counts in 2..4096",
        ),
    ):
        if not fine:
            raise error(f"dvgo: {key}={getattr(o, key)!r} is not {allowed}")
    if o.mlp_depth == 0 and o.channels != 3:
        raise error(f"dvgo: without a network (mlp_depth=0) the features are colours: channels={o.channels} is not 3")
    if not o.direct and o.channels < 3:
        raise error(f"dvgo: direct=false adds to the first three features: channels={o.channels} are too few")
    return o


def mlp_widths(o: DvgoOptions) -> list[int]:
    """Widths of the colour network from its input to the three colours; [] without one."""
    if o.mlp_depth == 0:
        return []
    position = 0 if o.position_frequencies is None else 3 + 6 * o.position_frequencies
    seen = o.channels - (0 if o.direct else 3)
    return [seen + position + 3 + 6 * o.view_frequencies, *[o.mlp_width] * (o.mlp_depth - 1), 3]
