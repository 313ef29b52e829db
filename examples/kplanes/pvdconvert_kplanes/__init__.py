"""K-Planes (Fridovich-Keil, Meanti et al. 2023, arXiv:2301.10241) for pvdconvert: what is announced. Imports no torch.

The heavy code is named by strings and imported on first use.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pvdconvert.errors import InputError
from pvdconvert.plugin import ArchitectureSpec, FormatSpec
from pvdconvert.scene import Box

ARCHITECTURE = ArchitectureSpec(
    name="kplanes",  # what --to takes; the same as the entry point's name
    title="K-Planes: products of three planes at several scales, and a small decoder",
    code="pvdconvert_kplanes.architecture:KPlanes",
    options="pvdconvert_kplanes:KPlanesOptions",
    paper="Fridovich-Keil, Meanti et al. 2023, arXiv:2301.10241",
    licence="MIT",
)

FORMAT = FormatSpec(
    name="kplanes",  # what --from takes
    title="sarafridov/K-Planes: model.pth",
    probe="pvdconvert_kplanes.format:probe",
    code="pvdconvert_kplanes.format:KPlanesFile",
    architectures=("kplanes",),
    suffixes=(".pth",),
    versions="static bounded scenes, hybrid and linear decoder; not dynamic, contracted or NDC ones",
    verified="a hybrid file of the program's own code with its oracle; known answers of the linear decoder",
    program="sarafridov/K-Planes",
    licence="BSD-3-Clause",
)

Shape = tuple[int, int, int]


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class KPlanesOptions:
    """Every configuration key, with its default and its help text: what ``--set key=value`` takes."""

    resolution: int = _option(64, "vertices along the longest side of the box at the first scale")
    scales: tuple[int, ...] = _option((1, 2, 4), "factors of the resolution, one for each scale")
    channels: int = _option(16, "features of each scale")
    concat: bool = _option(True, "whether scales are concatenated; else they are added")
    decoder: str = _option("hybrid", "hybrid (two small networks) or linear (a learned basis of the direction)")
    hidden: int = _option(64, "hybrid: units of the networks' hidden layers")
    geo_features: int = _option(15, "hybrid: numbers handed from the density network to the colour network")
    color_layers: int = _option(2, "hybrid: hidden layers of the colour network")
    basis_width: int = _option(128, "linear: units of the basis network's hidden layers")
    basis_layers: int = _option(2, "linear: hidden layers of the basis network")
    density_activation: str = _option("exp", "exp or relu")
    density_shift: float = _option(-1.0, "added before the density activation")
    box: Mapping[str, Any] | None = _option(None, "{min, max} of the planes; none = the scene's box")
    resolutions: tuple[Shape, ...] | None = _option(None, "vertices along x, y, z of each scale; none = by the above")
    mask: Mapping[str, Any] | None = _option(None, "{shape, origin, cell} of the cells outside of which density is 0")

    @property
    def width(self) -> int:
        """Features of a point."""
        return self.channels * (len(self.resolutions or self.scales) if self.concat else 1)


def options_of(config: Mapping[str, Any], box: Box) -> KPlanesOptions:
    """Check a configuration and fill in ``box`` and ``resolutions``. Raises InputError naming the key."""
    known = [f.name for f in dataclasses.fields(KPlanesOptions)]
    for key in config:
        if key not in known:
            raise InputError(f"kplanes has no option {key!r}", hint=f"known: {', '.join(known)}")
    try:
        o = KPlanesOptions(**config)
        scales = tuple(int(s) for s in ([o.scales] if isinstance(o.scales, int) else o.scales))
        box = box if o.box is None else Box.from_json(o.box)
        o = dataclasses.replace(o, scales=scales, box=box.to_json(), density_shift=float(o.density_shift))
        sizes = o.resolutions or tuple(shape_of(box, o.resolution * s) for s in scales)
        o = dataclasses.replace(o, resolutions=tuple(_shape(n) for n in sizes))
    except (TypeError, ValueError, KeyError, IndexError) as wrong:
        raise InputError(f"kplanes: malformed option: {wrong}") from wrong
    whole = {"resolution": 4096, "channels": 1024, "hidden": 4096, "geo_features": 1024, "color_layers": 32}
    for key, high in {**whole, "basis_width": 4096, "basis_layers": 32}.items():
        value = getattr(o, key)
        if type(value) is not int or not 1 <= value <= high:
            raise InputError(f"kplanes: {key}={value!r} is not a whole number from 1 to {high}")
    for key, fine, allowed in (
        ("scales", all(1 <= s <= 64 for s in o.scales) and o.scales, "factors from 1 to 64"),
        ("decoder", o.decoder in ("hybrid", "linear"), "hybrid or linear"),
        ("density_activation", o.density_activation in ("exp", "relu"), "exp or relu"),
        ("density_shift", math.isfinite(o.density_shift), "a number"),
        ("concat", isinstance(o.concat, bool), "true or false"),
        ("resolutions", all(2 <= n <= 8192 for r in o.resolutions or () for n in r), "triples of counts in 2..8192"),
    ):
        if not fine:
            raise InputError(f"kplanes: {key}={getattr(o, key)!r} is not {allowed}")
    return o


def shape_of(box: Box, longest: int) -> Shape:
    """Vertices along each axis at one spacing, ``longest`` along the longest side of ``box``."""
    x, y, z = (max(2, round(s / box.longest * (longest - 1)) + 1) for s in box.size)
    return (x, y, z)


def _shape(values: Any) -> Shape:
    x, y, z = (int(v) for v in values)
    return (x, y, z)


def config_of(options: KPlanesOptions) -> dict[str, Any]:
    """The options as JSON values."""
    config = dataclasses.asdict(options)
    config["scales"] = list(options.scales)
    config["resolutions"] = [list(r) for r in options.resolutions or ()]
    return config


def network_widths(o: KPlanesOptions) -> dict[str, list[int]]:
    """Widths, from input to output, of each network of a decoder."""
    if o.decoder == "linear":
        return {
            "sigma_net": [o.width, 1],
            "color_basis": [3, *[o.basis_width] * o.basis_layers, 3 * o.width],
        }
    return {
        "sigma_net": [o.width, o.hidden, o.geo_features + 1],
        "color_net": [16 + o.geo_features, *[o.hidden] * o.color_layers, 3],
    }
