"""tiny-cuda-nn's networks and grids inside flat parameter vectors (layouts sections 1.3 and 1.9). Imports no torch.

MLPs are matrices [out, in] back to back, without biases, the last one padded to a multiple of ``align`` rows; a grid is
its levels back to back, entry-major.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.errors import InputError
from pvdconvert.plugin import LazyTensor

MAX_ENTRIES = 1 << 30
MAX_LEVELS = 64


def padded(count: int, align: int) -> int:
    """The next multiple of ``align``."""
    return -(-count // align) * align


@dataclasses.dataclass(frozen=True, slots=True)
class Mlp:
    """A network's shape: ``inputs`` and ``outputs`` as they are stored, that is padded."""

    inputs: int
    width: int
    hidden: int
    outputs: int

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """[out, in] of every matrix, in their order."""
        if self.hidden == 0:
            return [(self.outputs, self.inputs)]
        inner = [(self.width, self.width)] * (self.hidden - 1)
        return [(self.width, self.inputs), *inner, (self.outputs, self.width)]

    @property
    def size(self) -> int:
        return sum(a * b for a, b in self.shapes)


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A :class:`LazyTensor`: ``count`` numbers of a flat one from ``start``, after ``change``."""

    source: LazyTensor
    start: int
    count: int
    shape: tuple[int, ...]
    change: Callable[[NDArray[Any]], NDArray[Any]]

    @property
    def dtype(self) -> str:
        return self.source.dtype

    def numpy(self) -> NDArray[Any]:
        flat = self.source.numpy().reshape(-1)[self.start : self.start + self.count]
        return np.ascontiguousarray(self.change(flat))


class Vector:
    """Takes tensors off the front of a flat parameter vector."""

    def __init__(self, source: LazyTensor) -> None:
        self.source, self.at = source, 0

    @property
    def left(self) -> int:
        return math.prod(self.source.shape) - self.at

    def matrix(self, rows: int, columns: int, keep: int | None = None, order: Sequence[int] | None = None) -> Piece:
        """The next [rows, columns] matrix: its first ``keep`` rows, and columns ``order``."""
        keep, picked = rows if keep is None else keep, list(range(columns) if order is None else order)

        def change(flat: NDArray[Any]) -> NDArray[Any]:
            return flat.reshape(rows, columns)[:keep, picked]

        return self._take(rows * columns, (keep, len(picked)), change)

    def mlp(self, mlp: Mlp, outputs: int, order: Sequence[int] | None = None) -> list[Piece]:
        """The next network's matrices: its first one with columns ``order``, its last one with ``outputs`` rows."""
        last = len(mlp.shapes) - 1
        return [
            self.matrix(*shape, keep=outputs if k == last else None, order=order if k == 0 else None)
            for k, shape in enumerate(mlp.shapes)
        ]

    def grid(self, entries: int, features: int) -> Piece:
        """The next grid's table [entries, features]."""
        return self._take(entries * features, (entries, features), lambda flat: flat.reshape(entries, features))

    def _take(self, count: int, shape: tuple[int, ...], change: Callable[[NDArray[Any]], NDArray[Any]]) -> Piece:
        piece = Piece(self.source, self.at, count, shape, change)
        self.at += count
        return piece


def growth(levels: int, base: int, finest: float) -> float:
    """``exp(ln(finest / base) / (levels - 1))`` in float32; 1 for a single level."""
    if levels < 2:
        return 1.0
    ratio = np.float32(np.log(np.float32(finest) / np.float32(base)))
    return float(np.float32(np.exp(np.float32(ratio / np.float32(levels - 1)))))


def level_entries(levels: int, base: int, scale: float, log2_table: int, kind: str = "hash") -> list[int]:
    """Entries of every level of a 3-D grid. Raises InputError where they are absurd."""
    if not (1 <= levels <= MAX_LEVELS and 1 <= base <= 1 << 22 and 0 <= log2_table <= 30 and 0 < scale < 1e6):
        raise InputError(f"a grid of {levels} levels from {base}, growing by {scale:g}, with tables of 2^{log2_table}")
    step = np.float32(np.log2(float(np.float32(scale))))
    out = []
    for level in range(levels):
        power = float(np.exp2(np.float64(np.float32(np.float32(level) * step))))
        if power * base > 1 << 22:
            raise InputError(f"a grid of {levels} levels from {base}, growing by {scale:g}, is impossibly fine")
        value = np.float32(np.float32(np.float32(power) * np.float32(base)) - np.float32(1.0))
        resolution = math.ceil(float(value)) + 1
        entries = padded(min(resolution**3, 0xFFFFFFFF // 2), 8)
        if kind == "hash":
            entries = min(entries, 1 << log2_table)
        elif kind == "tiled":
            entries = min(entries, base**3)
        if entries > MAX_ENTRIES:
            raise InputError(f"a {kind} grid with a level of {entries} entries")
        out.append(entries)
    return out
