"""What `kilonerf` is and how it is configured. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from pvdconvert.errors import InputError
from pvdconvert.plugin import ArchitectureSpec, Config
from pvdconvert.scene import Box

SPEC = ArchitectureSpec(
    name="kilonerf",
    title="KiloNeRF: a lattice of thousands of tiny perceptrons",
    code="pvdconvert_plugins.kilonerf:Kilonerf",
    options="pvdconvert_plugins.kilonerf_spec:KilonerfOptions",
    paper="Reiser et al. 2021, arXiv:2103.13744",
    licence="MIT",
)
MOST = 1 << 20
"""Networks of a lattice, at most."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, slots=True)
class KilonerfOptions:
    """Every configuration key. The defaults are the networks of the paper.

    Tensors, for the N networks of the lattice in C order (z fastest); weights are [N, in, out], biases [N, out]:

    ``trunk.{i}``       i < depth; input of layer 0: the encoded position in the network's own cell, from -1 to 1; after
                        layer ``refeed`` the next layer's input is [encoded position, hidden]
    ``density``, ``feature``  [N, width, 1] and [N, width, feature width], from the last hidden layer, no activation
    ``diffuse``         [N, width, 3], with ``view_independent``: added to the colour before the sigmoid
    ``direction``       input [feature, encoded direction]; relu. With ``shared_color`` one layer for all: [in, out]
    ``rgb``             [N, direction_width, 3]; with ``shared_color`` [direction_width, 3]

    each as ``.weight`` and ``.bias``; with ``occupancy`` and ``mask``, ``occupancy.bits`` and ``mask.bits`` (uint8).
    """

    resolution: tuple[int, int, int] = _option((16, 16, 16), "networks along x, y and z")
    depth: int = _option(2, "hidden layers of a network")
    width: int = _option(32, "units of each hidden layer")
    refeed: int | None = _option(None, "layer (from 0) after which [encoded position, hidden] is concatenated")
    feature_width: int = _option(32, "units between the trunk and the direction layer")
    direction_width: int = _option(32, "units of the direction layer")
    position_frequencies: int = _option(10, "octaves of the position encoding")
    direction_frequencies: int = _option(4, "octaves of the direction encoding")
    view_independent: bool = _option(False, "whether a colour without direction is added before the sigmoid")
    shared_color: bool = _option(False, "whether all networks share the direction and rgb layers")
    density_activation: str = _option("relu", "relu or softplus")
    density_scale: float = _option(1.0, "density per world unit = this times the activated value")
    margin: float = _option(0.0, "world units inside of the box's faces in which the program renders nothing")
    box: Mapping[str, Any] | None = _option(None, "{min, max} of the lattice; none = the scene's box")
    occupancy: Sequence[int] | None = _option(None, "cells of the box along x, y, z of the program's occupancy grid")
    mask: Mapping[str, Any] | None = _option(None, "{shape, origin, cell} of the cells outside of which density is 0")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> KilonerfOptions:
        """Read a configuration; absent keys take their defaults. Raises InputError naming the key that is wrong."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in config:
            if key not in known:
                raise InputError(f"kilonerf: config has no key {key!r}", hint=f"known: {', '.join(sorted(known))}")
        options = cls(**{key: _parse(key, value) for key, value in config.items()})
        if options.refeed is not None and not 0 <= options.refeed < options.depth - 1:
            raise InputError(f"kilonerf: config 'refeed' is {options.refeed}: below depth - 1 = {options.depth - 1}")
        return options

    def to_config(self) -> Config:
        """JSON values; the inverse of :meth:`from_config`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            key: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v
            for key, v in values.items()
        }

    @property
    def networks(self) -> int:
        return math.prod(self.resolution)

    @property
    def position_width(self) -> int:
        return 3 + 6 * self.position_frequencies

    @property
    def direction_columns(self) -> int:
        return 3 + 6 * self.direction_frequencies

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight and bias by tensor name."""
        out: dict[str, tuple[int, ...]] = {}

        def layer(name: str, wide: int, units: int, shared: bool = False) -> None:
            lead = () if shared else (self.networks,)
            out[f"{name}.weight"], out[f"{name}.bias"] = (*lead, wide, units), (*lead, units)

        for i in range(self.depth):
            again = self.refeed is not None and i - 1 == self.refeed
            wide = self.position_width if i == 0 else self.width + self.position_width * again
            layer(f"trunk.{i}", wide, self.width)
        layer("density", self.width, 1)
        layer("feature", self.width, self.feature_width)
        if self.view_independent:
            layer("diffuse", self.width, 3)
        layer("direction", self.feature_width + self.direction_columns, self.direction_width, self.shared_color)
        layer("rgb", self.direction_width, 3, self.shared_color)
        return out


_RANGES = {
    "depth": (1, 16),
    "width": (1, 512),
    "feature_width": (1, 512),
    "direction_width": (1, 512),
    "position_frequencies": (0, 20),
    "direction_frequencies": (0, 20),
    "refeed": (0, 15),
}


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _parse(key: str, value: Any) -> Any:
    """``value`` of configuration key ``key``, checked. Raises InputError."""
    bad = InputError(f"kilonerf: config {key!r} is {value!r:.60}")
    if key in _RANGES:
        if not (key == "refeed" and value is None) and not _whole(value, *_RANGES[key]):
            raise bad
        return value
    if key in ("resolution", "occupancy"):
        if key == "occupancy" and value is None:
            return None
        most = 4096 if key == "occupancy" else 1024
        three = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3
        if not three or not all(_whole(v, 1, most) for v in value) or (key == "resolution" and math.prod(value) > MOST):
            raise InputError(f"kilonerf: config {key!r} is {value!r:.60}", hint="three whole numbers, such as 9,16,10")
        return tuple(value)
    if key in ("view_independent", "shared_color"):
        if not isinstance(value, bool):
            raise bad
        return value
    if key == "density_activation":
        if value not in ("relu", "softplus"):
            raise InputError(f"kilonerf: config {key!r} is {value!r:.40}", hint="relu or softplus")
        return value
    if key in ("density_scale", "margin"):
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e30
        if not number or (key == "density_scale" and value == 0):
            raise bad
        return float(value)
    if value is not None and not isinstance(value, Mapping):
        raise bad
    if key == "box" and value is not None:
        try:
            return Box.from_json(value).to_json()
        except (KeyError, TypeError) as error:
            raise InputError(f"kilonerf: config 'box' is malformed: {error}") from error
    return value
