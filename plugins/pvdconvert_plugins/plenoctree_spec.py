"""What `plenoctree` is and how it is configured. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from pvdconvert.errors import InputError, RequestError
from pvdconvert.plugin import ArchitectureSpec

SPEC = ArchitectureSpec(
    name="plenoctree",
    title="PlenOctree: an octree whose leaves hold constant density and harmonics",
    code="pvdconvert_plugins.plenoctree:Plenoctree",
    options="pvdconvert_plugins.plenoctree_spec:PlenoctreeOptions",
    paper="Yu et al. 2021, arXiv:2103.14024",
    licence="MIT",
)
EXTRA_WIDTH = {"SG": 4, "ASG": 11}
"""Columns of ``extra_data``: sharpness and axis; two sharpnesses and three axes."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, slots=True)
class PlenoctreeOptions:
    """Every configuration key. Tensors (n nodes of N^3 cells, B coefficients a colour, D = 3 B + 1; svox's own):

    ``child``       [n, N, N, N] int32: 0 = a leaf, else how many nodes further on the one stands that splits the cell
    ``data``        [n, N, N, N, D] ``store_dtype``: all of red, then green, then blue, before the sigmoid; density last
    ``extra_data``  [B, 4] or [B, 11] float32, with SG and ASG only: the lobes
    """

    resolution: int = _option(256, "leaves along the longest side of the occupied box")
    data_format: str = _option("SH9", "SH1, SH4, SH9, SH16 or SH25; RGBA (no view dependence); files also SG#, ASG#")
    store_dtype: str = _option("float16", "how files hold the leaves: float16 (svox) or float32")
    branching: int = _option(2, "cells along a side of a node: 2 = an octree")
    offset: tuple[float, float, float] | None = _option(None, "the unit cube is offset + position * invradius3")
    invradius3: tuple[float, float, float] | None = _option(None, "1 / sides of the tree's box, per axis")

    @property
    def kind(self) -> str:
        """SH, SG, ASG or RGBA."""
        return self.data_format.rstrip("0123456789")

    @property
    def coefficients(self) -> int:
        """B."""
        digits = self.data_format[len(self.kind) :]
        return int(digits) if digits else 1


def plain(value: Any) -> Any:
    """Tuples as lists: JSON knows no others."""
    return list(value) if isinstance(value, tuple) else value


def as_config(options: PlenoctreeOptions) -> dict[str, Any]:
    """The options as a JSON configuration."""
    return {k: plain(v) for k, v in dataclasses.asdict(options).items()}


def _vector(value: Any) -> tuple[float, float, float] | None:
    if value is None:
        return None
    x, y, z = (float(v) for v in value)
    return (x, y, z)


def checked(config: Mapping[str, Any], error: type[InputError] | type[RequestError]) -> PlenoctreeOptions:
    """Checked options. Raises ``error`` naming the key."""
    known = [f.name for f in dataclasses.fields(PlenoctreeOptions)]
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise error(
                f"plenoctree has no option {key!r}; known: {', '.join(known)}",
                hint=f"did you mean {near[0]!r}?" if near else "",
            )
    try:
        o = PlenoctreeOptions(**config)
        o = dataclasses.replace(
            o,
            resolution=int(o.resolution),
            branching=int(o.branching),
            data_format=str(o.data_format),
            offset=_vector(o.offset),
            invradius3=_vector(o.invradius3),
        )
    except (TypeError, ValueError) as wrong:
        raise error(f"plenoctree: malformed option: {wrong}") from wrong
    formats = re.fullmatch(r"RGBA|SH(1|4|9|16|25)|A?SG([1-9]\d{0,2})", o.data_format)
    for key, fine, allowed in (
        ("resolution", 2 <= o.resolution <= 1 << 13, "2..8192"),
        ("branching", 2 <= o.branching <= 16, "2..16"),
        ("data_format", formats is not None, "RGBA, SH1, SH4, SH9, SH16, SH25, SG# or ASG#"),
        ("store_dtype", o.store_dtype in ("float32", "float16"), "float32 or float16"),
        ("offset", all(map(math.isfinite, o.offset or ())), "three numbers"),
        ("invradius3", all(0 < v < math.inf for v in o.invradius3 or ()), "three positive numbers"),
    ):
        if not fine:
            raise error(f"plenoctree: {key}={getattr(o, key)!r} is not {allowed}")
    if (o.offset is None) != (o.invradius3 is None):
        raise error("plenoctree: offset and invradius3 go together")
    return o
