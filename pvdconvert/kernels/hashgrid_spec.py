"""The geometry of a multiresolution hash grid: which entry belongs to which corner. Imports no torch.

Three programs, three rules (layouts sections 1.3 and 2.1); the tables are not interchangeable at dense levels:

=============  ======================================  ==============================================
               ``tcnn`` (tiny-cuda-nn)                 ``torch-ngp`` (gridencoder, align_corners False)
=============  ======================================  ==============================================
entries        min(ceil8(res^3), 2^T)                  ceil8(min((ceil(base b^l) + 1)^3, 2^T))
dense stride   res                                     res + 1
hashed         entries < res^3                         entries < (res + 1)^3
outside        wraps, modulo the entries               features are 0
=============  ======================================  ==============================================

with, in float32, ``scale = exp2(l log2(b)) base - 1``, ``res = ceil(scale) + 1`` and ``pos = x01 scale + 0.5`` in both.

tiny-cuda-nn's other types (section 1.3) never hash: ``dense`` levels are not capped by 2^T, ``tiled`` ones have at most
``base^3`` entries, and their indices wrap.

``nerfstudio`` (its torch implementation, layouts section 7.1): every level is hashed into ``2^T`` entries, ``scale =
floor(base b^l)`` in float32, ``pos = x01 scale``; looked up in the open box only.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal, cast, get_args

import numpy as np

IndexRule = Literal["tcnn", "torch-ngp", "nerfstudio"]
Interpolation = Literal["linear", "smoothstep", "nearest"]
GRID_TYPES = ("hash", "dense", "tiled")
INDEX_RULES: tuple[str, ...] = get_args(IndexRule)
INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)

PRIMES = (1, 2654435761, 805459861)
"""Factors of the spatial hash ``x p0 xor y p1 xor z p2`` in uint32 ("CoherentPrime")."""

DENSE, WRAPPED, POWER, HASHED = 0, 1, 2, 3
"""How the row of a corner is found: its place, that modulo the entries, the hash modulo 2^k, or modulo the entries."""

MAX_LEVELS, MAX_FEATURES, MAX_LOG2_TABLE = 64, 32, 30
MAX_RESOLUTION = 1 << 22
_MAX_STRIDE = 1625


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    """One level: ``pos = x01 * scale + shift``; its entries are rows ``offset .. offset + entries`` of the table.

    scale is a float32 value; stride is the number of corners per axis of a dense level.
    """

    scale: float
    resolution: int
    stride: int
    entries: int
    offset: int
    hashed: bool

    def index(self, x: int, y: int, z: int) -> int:
        """The row, counted from :attr:`offset`, of corner (x, y, z): the rule stated for one corner."""
        wrap = 0xFFFFFFFF
        if self.hashed:
            i = (x * PRIMES[0] & wrap) ^ (y * PRIMES[1] & wrap) ^ (z * PRIMES[2] & wrap)
        else:
            i = (x + y * self.stride + z * self.stride * self.stride) & wrap
        return i % self.entries


@dataclasses.dataclass(frozen=True, slots=True)
class HashGridSpec:
    """All levels, coarse to fine. Build it with :meth:`make`."""

    levels: tuple[Level, ...]
    features: int
    index_rule: IndexRule
    interpolation: Interpolation = "linear"
    scales: tuple[float, ...] = dataclasses.field(init=False, repr=False, compare=False)
    ints: tuple[int, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """What operators take: the scale of each level, and its stride, entries, offset and kind of index."""
        object.__setattr__(self, "scales", tuple(v.scale for v in self.levels))
        ints = ((v.stride, v.entries, v.offset, self._kind(v)) for v in self.levels)
        object.__setattr__(self, "ints", tuple(itertools.chain.from_iterable(ints)))

    def _kind(self, level: Level) -> int:
        if level.hashed:
            return HASHED if level.entries & (level.entries - 1) else POWER
        # Within the box, torch-ngp's corners end at stride - 1; tcnn's reach stride, one too many, and wrap.
        return DENSE if self.index_rule == "torch-ngp" and level.stride**3 <= level.entries else WRAPPED

    @classmethod
    def make(
        cls,
        levels: int,
        features: int,
        log2_table: int,
        base: int,
        per_level_scale: float,
        index_rule: str,
        offsets: Sequence[int] | None = None,
        interpolation: str = "linear",
        grid_type: str = "hash",
    ) -> HashGridSpec:
        """Lay out ``levels`` levels.

        log2_table       T: no level holds more than ``2**T`` entries
        base             resolution of the coarsest level
        per_level_scale  b: growth of the resolution from level to level
        offsets          ``levels + 1`` first rows as stored in a torch-ngp file: they win over the computed ones
                         (files from before 2022-06-06 are not rounded to multiples of 8)

        grid_type        "hash"; by the rule tcnn also "dense" or "tiled"

        Raises ValueError for values that no grid can have.
        """
        if index_rule not in INDEX_RULES:
            raise ValueError(f"index_rule {index_rule!r} is none of {', '.join(INDEX_RULES)}")
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {interpolation!r} is none of {', '.join(INTERPOLATIONS)}")
        if grid_type not in GRID_TYPES or (grid_type != "hash" and index_rule != "tcnn"):
            raise ValueError(f"grid_type {grid_type!r} is none of the rule {index_rule}")
        for name, value, low, high in (
            ("levels", levels, 1, MAX_LEVELS),
            ("features", features, 1, MAX_FEATURES),
            ("log2_table", log2_table, 3, MAX_LOG2_TABLE),
            ("base_resolution", base, 1, MAX_RESOLUTION),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} = {value} is not in {low}..{high}")
        if not (per_level_scale > 0 and base * float(per_level_scale) ** (levels - 1) <= MAX_RESOLUTION):
            raise ValueError(f"per_level_scale = {per_level_scale} gives an impossible finest resolution")
        tcnn = index_rule == "tcnn"
        scales = [level_scale(level, base, per_level_scale) for level in range(levels)]
        resolutions = [math.ceil(scale) + 1 for scale in scales]
        if index_rule == "nerfstudio":
            return cls._nerfstudio(levels, features, log2_table, base, per_level_scale, offsets, interpolation)
        if offsets is None:
            sizes = [
                _tcnn_entries(resolutions[level], log2_table, base, grid_type)
                if tcnn
                else _torch_ngp_entries(level, base, per_level_scale, log2_table)
                for level in range(levels)
            ]
            firsts = [sum(sizes[:level]) for level in range(levels)]
        else:
            firsts = [int(v) for v in offsets]
            sizes = [b - a for a, b in itertools.pairwise(firsts)]
            growing = all(1 <= size <= 1 << MAX_LOG2_TABLE for size in sizes)
            if len(firsts) != levels + 1 or firsts[0] != 0 or not growing:
                raise ValueError(f"offsets {firsts} are not {levels + 1} growing numbers from 0")
        rows = []
        for scale, resolution, entries, first in zip(scales, resolutions, sizes, firsts):
            stride = resolution if tcnn else resolution + 1
            hashed = _tcnn_hashed(stride, entries, grid_type) if tcnn else _torch_ngp_hashed(stride, entries)
            rows.append(Level(scale, resolution, stride, entries, first, hashed))
        rule: IndexRule = "tcnn" if tcnn else "torch-ngp"
        return cls(tuple(rows), features, rule, cast("Interpolation", interpolation))

    @classmethod
    def _nerfstudio(
        cls,
        levels: int,
        features: int,
        log2_table: int,
        base: int,
        per_level_scale: float,
        offsets: Sequence[int] | None,
        interpolation: str,
    ) -> HashGridSpec:
        entries = 1 << log2_table
        if offsets is not None and [int(v) for v in offsets] != [level * entries for level in range(levels + 1)]:
            raise ValueError(f"offsets {list(offsets)} are not multiples of {entries}")
        rows = []
        for level in range(levels):
            power = np.float32(np.power(np.float64(np.float32(per_level_scale)), level))
            scale = math.floor(np.float32(power * np.float32(base)))
            rows.append(Level(float(scale), scale + 1, scale + 1, entries, level * entries, True))
        return cls(tuple(rows), features, "nerfstudio", cast("Interpolation", interpolation))

    @property
    def mode(self) -> int:
        """The interpolation's place in :data:`INTERPOLATIONS`."""
        return INTERPOLATIONS.index(self.interpolation)

    @property
    def shift(self) -> float:
        """Added to ``x01 * scale``: lookups sit between vertices of two resolutions, or (nerfstudio) on one lattice."""
        return 0.0 if self.index_rule == "nerfstudio" else 0.5

    @property
    def entries(self) -> int:
        """E: rows of the table."""
        return self.levels[-1].offset + self.levels[-1].entries

    @property
    def width(self) -> int:
        """Encoded features a point: levels x features, level-major."""
        return len(self.levels) * self.features

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of every level, and E."""
        return (*(level.offset for level in self.levels), self.entries)

    @property
    def domain(self) -> tuple[float, float]:
        """Where ``x01`` is looked up; anything else (and NaN) encodes to zeros.

        torch-ngp and nerfstudio: the box. tcnn does not check; 256 boxes on either side keep its integers within int32.
        """
        return (-256.0, 256.0) if self.index_rule == "tcnn" else (0.0, 1.0)


def level_scale(level: int, base: int, per_level_scale: float) -> float:
    """``exp2(level * log2(b)) * base - 1``, every operation rounded to float32 as both programs' kernels do."""
    step = np.float32(np.log2(per_level_scale))
    exponent = np.float32(np.float32(level) * step)
    # exp2 in float64, then rounded: the closest to any device's exp2f.
    power = np.float32(np.exp2(np.float64(exponent)))
    return float(np.float32(np.float32(power * np.float32(base)) - np.float32(1.0)))


def growth(levels: int, base: int, finest: float, index_rule: str) -> float:
    """The ``per_level_scale`` that leads from ``base`` to ``finest`` in ``levels`` levels, rounded as the program does.

    instant-ngp: ``exp(ln(finest / base) / (L - 1))`` in float32; torch-ngp: ``exp2(log2(finest / base) / (L - 1))`` in
    float64.
    """
    if levels < 2:
        return 1.0
    if index_rule == "tcnn":
        ratio = np.float32(np.log(np.float32(finest) / np.float32(base)))
        return float(np.float32(np.exp(np.float32(ratio / np.float32(levels - 1)))))
    return float(np.exp2(np.log2(finest / base) / (levels - 1)))


def _ceil8(value: int) -> int:
    return (value + 7) // 8 * 8


def _tcnn_entries(resolution: int, log2_table: int, base: int, grid_type: str) -> int:
    cells = _ceil8(min(resolution**3, 0xFFFFFFFF // 2))
    entries = cells if grid_type == "dense" else min(cells, 1 << log2_table if grid_type == "hash" else base**3)
    if entries > 1 << MAX_LOG2_TABLE:
        raise ValueError(f"a {grid_type} level of resolution {resolution} would hold {entries} entries")
    return entries


def _tcnn_hashed(stride: int, entries: int, grid_type: str) -> bool:
    # A cube that does not fit 32 bits counts as infinite.
    if grid_type != "hash" and stride > _MAX_STRIDE:
        raise ValueError(f"a {grid_type} level of resolution {stride} does not fit 32 bits")
    return grid_type == "hash" and (stride > _MAX_STRIDE or entries < stride**3)


def _torch_ngp_entries(level: int, base: int, per_level_scale: float, log2_table: int) -> int:
    resolution = math.ceil(base * per_level_scale**level)
    return _ceil8(min((resolution + 1) ** 3, 1 << log2_table))


def _torch_ngp_hashed(stride: int, entries: int) -> bool:
    # The kernel's walk in uint32: it stops, and hashes, once the running stride exceeds the entries.
    running = 1
    for _ in range(3):
        if running > entries:
            break
        running = running * stride & 0xFFFFFFFF
    return running > entries
