"""CANDECOMP/PARAFAC (CP) decomposition: products of three lines (TensoRF, arXiv 2203.09517, eq. 3; layouts 3.3).

``lines[i]`` [L_i, R] runs along axis 2, 1, 0 for i = 0, 1, 2, as in :mod:`pvdconvert.kernels.planes`, channel-last.
Interpolation is linear between vertices, the outermost of which lie on the faces of the unit cube
(``align_corners=True``); positions outside of the cube are clamped to it. Positions get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pvdconvert.kernels.backend import twin
from pvdconvert.kernels.operators import define

AXES = (2, 1, 0)
"""Axis of line i."""


def cp_sum(x01: Tensor, lines: Sequence[Tensor]) -> Tensor:
    """Sum over ranks of the products of three lines: [N] at ``x01`` [N, 3] in the unit cube."""
    return _cp_any(x01, lines, True)


def cp_features(x01: Tensor, lines: Sequence[Tensor]) -> Tensor:
    """Products of three lines of every rank: [N, R] at ``x01`` [N, 3] in the unit cube."""
    return _cp_any(x01, lines, False)


def _cp_any(x01: Tensor, lines: Sequence[Tensor], summed: bool) -> Tensor:
    if not torch.compiler.is_compiling() and twin(x01, *lines) == "torch":
        return (cp_sum_torch if summed else cp_features_torch)(x01, lines)
    out: Tensor = _cp(x01, *lines, summed)
    return out


def cp_sum_torch(x01: Tensor, lines: Sequence[Tensor]) -> Tensor:
    """:func:`cp_sum` in plain torch: the truth, on any device."""
    return cp_features_torch(x01, lines).sum(-1)


def cp_features_torch(x01: Tensor, lines: Sequence[Tensor]) -> Tensor:
    """:func:`cp_features` in plain torch: the truth, on any device."""
    out: Tensor | None = None
    for axis, line in zip(AXES, lines, strict=True):
        value = _value(line, *_cell(x01.detach()[:, axis], line.shape[0]))
        out = value if out is None else out * value
    assert out is not None
    return out


def _cell(u: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper vertex [N] and the fraction between them [N, 1] of ``u`` [N] on ``n`` vertices."""
    pos = u.nan_to_num(0.0).clamp(0, 1) * (n - 1)
    low = pos.long().clamp(max=max(n - 2, 0))
    return low, (low + 1).clamp(max=n - 1), (pos - low)[:, None]


def _value(line: Tensor, low: Tensor, high: Tensor, part: Tensor) -> Tensor:
    return torch.lerp(line[low], line[high], part)


# ------------------------------------------------------------------------------------- the operator that torch knows


def _run(x01: Tensor, a: Tensor, b: Tensor, c: Tensor, summed: bool) -> Tensor:
    which = twin(x01, a, b, c)
    if which == "numba":
        from pvdconvert.kernels import lines_numba

        return lines_numba.forward(x01, a, b, c, summed)
    if which == "triton":
        from pvdconvert.kernels import lines_triton

        return lines_triton.forward(x01, a, b, c, summed)
    return (cp_sum_torch if summed else cp_features_torch)(x01, (a, b, c))


def _run_backward(
    x01: Tensor, grad: Tensor, a: Tensor, b: Tensor, c: Tensor, summed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    which = twin(x01, grad, a, b, c)
    if which == "numba":
        from pvdconvert.kernels import lines_numba

        return lines_numba.backward(x01, grad, a, b, c, summed)
    if which == "triton":
        from pvdconvert.kernels import lines_triton

        return lines_triton.backward(x01, grad, a, b, c, summed)
    g = grad[:, None] if summed else grad
    cells = [_cell(x01[:, axis], line.shape[0]) for axis, line in zip(AXES, (a, b, c))]
    u, v, w = (_value(line, *cell) for line, cell in zip((a, b, c), cells))
    out = []
    for line, up, (low, high, part) in zip((a, b, c), (g * v * w, g * u * w, g * u * v), cells):
        into = torch.zeros_like(line, memory_format=torch.contiguous_format)
        out.append(into.index_add_(0, low, (1 - part) * up).index_add_(0, high, part * up))
    return out[0], out[1], out[2]


def _fake(x01: Tensor, a: Tensor, b: Tensor, c: Tensor, summed: bool) -> Tensor:
    return a.new_empty(x01.shape[0]) if summed else a.new_empty(x01.shape[0], a.shape[1])


def _fake_backward(x01: Tensor, grad: Tensor, a: Tensor, b: Tensor, c: Tensor, summed: bool) -> tuple[Tensor, ...]:
    return tuple(line.new_empty(line.shape) for line in (a, b, c))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.summed = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x01, *lines = ctx.saved_tensors
    return (None, *_cp_backward(x01, grad, *lines, ctx.summed), None)


_cp_backward = define(
    "cp_backward(Tensor x01, Tensor grad, Tensor a, Tensor b, Tensor c, bool summed) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_cp = define(
    "cp(Tensor x01, Tensor a, Tensor b, Tensor c, bool summed) -> Tensor", _run, _fake, save=_save, backward=_backward
)
