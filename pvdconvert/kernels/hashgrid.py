"""Multiresolution hash encoding (Mueller et al. 2022, section 3): the operator and its plain-torch truth.

Twins: :mod:`pvdconvert.kernels.hashgrid_numba` (CPU), ``hashgrid_triton`` and ``hashgrid_tcnn`` (CUDA). The index
rules are in :mod:`pvdconvert.kernels.hashgrid_spec`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pvdconvert.kernels import backend
from pvdconvert.kernels.hashgrid_spec import INTERPOLATIONS, POWER, PRIMES, HashGridSpec, Level, growth
from pvdconvert.kernels.operators import define

__all__ = ["HashGridSpec", "Level", "growth", "hash_encode", "hash_encode_torch"]

_UINT32 = 0xFFFFFFFF


def hash_encode(x01: Tensor, table: Tensor, spec: HashGridSpec) -> Tensor:
    """Interpolated table rows: ``x01`` [N, 3] in box units, ``table`` [E, F] -> [N, L*F], level-major.

    Outside of ``spec.domain`` the features are 0. Differentiable in ``table``; gradients in ``x01`` are answered by the
    plain-torch truth only, which runs whenever ``x01`` asks for them. The result may be a transposed view.
    Raises ValueError where the shapes do not fit ``spec``.
    """
    if x01.ndim != 2 or x01.shape[1] != 3:
        raise ValueError(f"positions must be [N, 3], got {list(x01.shape)}")
    if tuple(table.shape) != (spec.entries, spec.features):
        raise ValueError(f"the table is {list(table.shape)}, the grid needs {[spec.entries, spec.features]}")
    if x01.requires_grad and torch.is_grad_enabled():
        return hash_encode_torch(x01, table, spec)
    if not torch.compiler.is_compiling():
        if backend.twin(x01, table) == "torch":
            return hash_encode_torch(x01, table, spec)
        if x01.is_cuda and backend.get_backend() in ("auto", "tinycudann") and backend.has_tinycudann():
            from pvdconvert.kernels import hashgrid_tcnn

            if hashgrid_tcnn.represents(spec):
                return hashgrid_tcnn.hash_encode_tcnn(x01, table, spec)
    out: Tensor = _hashgrid(x01, table, spec.scales, spec.ints, *spec.domain, spec.mode, spec.shift)
    return out


def hash_encode_torch(x01: Tensor, table: Tensor, spec: HashGridSpec) -> Tensor:
    """The truth of :func:`hash_encode` in plain torch: any device and float type, differentiable in both arguments."""
    inside, x = _inside(x01, *spec.domain)
    parts = []
    for level in spec.levels:
        total: Tensor | None = None
        for rows, weight in _corners(x, level, spec.mode, spec.shift):
            term = weight[:, None] * table[rows]
            total = term if total is None else total + term
        assert total is not None
        parts.append(total)
    return torch.where(inside, torch.cat(parts, dim=-1), 0)


def _inside(x01: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    inside = ((x01 >= low) & (x01 <= high)).all(-1)[:, None]
    return inside, torch.where(inside, x01, 0)


def _corners(x: Tensor, level: Level, mode: int, shift: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows [N] and weights [N] of the eight corners around ``x`` [N, 3], x fastest."""
    pos = x * level.scale + shift
    cell = pos.detach().floor()
    f = pos - cell
    if INTERPOLATIONS[mode] == "smoothstep":
        f = f * f * (3 - 2 * f)
    elif INTERPOLATIONS[mode] == "nearest":
        f = torch.zeros_like(f)
    corner, near, far = cell.long(), (1 - f).unbind(-1), f.unbind(-1)
    for k in range(8):
        bits = (k & 1, k >> 1 & 1, k >> 2 & 1)
        weight = torch.ones_like(near[0])
        for axis in range(3):
            weight = weight * (far[axis] if bits[axis] else near[axis])
        yield level.offset + _index(corner + corner.new_tensor(bits), level), weight


def _index(corner: Tensor, level: Level) -> Tensor:
    """:meth:`Level.index` for corners [N, 3] int64. Products may wrap in int64: their low 32 bits are right."""
    x, y, z = corner.unbind(-1)
    if level.hashed:
        i = (x * PRIMES[0]) ^ (y * PRIMES[1]) ^ (z * PRIMES[2])
    else:
        i = x + y * level.stride + z * (level.stride * level.stride)
    return (i & _UINT32) % level.entries


# ------------------------------------------------------------------------------------- the operator that torch knows

Numbers = Sequence[float]
Ints = Sequence[int]


def _levels(scales: Numbers, ints: Ints) -> list[Level]:
    rows = [tuple(ints[i : i + 4]) for i in range(0, len(ints), 4)]
    return [Level(s, 0, stride, n, at, kind >= POWER) for s, (stride, n, at, kind) in zip(scales, rows)]


def _run(
    x01: Tensor, table: Tensor, scales: Numbers, ints: Ints, low: float, high: float, mode: int, shift: float
) -> Tensor:
    which = backend.twin(x01, table)
    if which == "numba":
        from pvdconvert.kernels import hashgrid_numba

        return hashgrid_numba.forward(x01, table, scales, ints, low, high, mode, shift)
    if which == "triton":
        from pvdconvert.kernels import hashgrid_triton

        return hashgrid_triton.forward(x01, table, scales, ints, low, high, mode, shift)
    inside, x = _inside(x01, low, high)
    out = _fake(x01, table, scales)
    for n, level in enumerate(_levels(scales, ints)):
        part = out[:, n * table.shape[1] : (n + 1) * table.shape[1]].zero_()
        for rows, weight in _corners(x, level, mode, shift):
            part += weight[:, None] * table[rows]
    return out.masked_fill_(~inside, 0)


def _run_backward(
    x01: Tensor, grad: Tensor, rows: int, scales: Numbers, ints: Ints, low: float, high: float, mode: int, shift: float
) -> Tensor:
    which = backend.twin(x01, grad)
    if which == "numba":
        from pvdconvert.kernels import hashgrid_numba

        return hashgrid_numba.backward(x01, grad, rows, scales, ints, low, high, mode, shift)
    if which == "triton":
        from pvdconvert.kernels import hashgrid_triton

        return hashgrid_triton.backward(x01, grad, rows, scales, ints, low, high, mode, shift)
    inside, x = _inside(x01, low, high)
    width = grad.shape[1] // len(scales)
    out = _fake_backward(x01, grad, rows, scales).zero_()
    for n, level in enumerate(_levels(scales, ints)):
        part = torch.where(inside, grad[:, n * width : (n + 1) * width], 0)
        for at, weight in _corners(x, level, mode, shift):
            out.index_add_(0, at, weight[:, None] * part)
    return out


def _fake(x01: Tensor, table: Tensor, scales: Numbers, *_: Any) -> Tensor:
    # Feature-major, so that each level writes one run of memory; the transpose is free for what follows (a GEMM).
    return table.new_empty(len(scales) * table.shape[1], x01.shape[0]).t()


def _fake_backward(x01: Tensor, grad: Tensor, rows: int, scales: Numbers, *_: Any) -> Tensor:
    return grad.new_empty(rows, grad.shape[1] // len(scales))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x01, table, *ctx.geometry = inputs
    ctx.rows = table.shape[0]
    ctx.save_for_backward(x01)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x01,) = ctx.saved_tensors
    return (None, _hashgrid_backward(x01, grad, ctx.rows, *ctx.geometry), *[None] * 6)


_GEOMETRY = "float[] scales, int[] ints, float low, float high, int mode, float shift"
_hashgrid_backward = define(
    f"hashgrid_backward(Tensor x01, Tensor grad, SymInt rows, {_GEOMETRY}) -> Tensor", _run_backward, _fake_backward
)
_hashgrid = define(
    f"hashgrid(Tensor x01, Tensor table, {_GEOMETRY}) -> Tensor", _run, _fake, save=_save, backward=_backward
)
