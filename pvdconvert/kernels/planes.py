"""Vector-matrix (VM) decomposition: products of planes and lines (TensoRF, arXiv 2203.09517, eq. 4 and 7; layouts 3.3).

Mode 0 is the plane over axes (0, 1) times the line over axis 2, mode 1 (0, 2) x 1, mode 2 (1, 2) x 0. Planes are
channel-last, [H, W, R] with W along the first axis of the pair; lines are [L, R]. Interpolation is linear between
vertices, the outermost of which lie on the faces of the unit cube (``align_corners=True``); positions outside of the
cube are clamped to it. Positions get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pvdconvert.kernels.backend import twin
from pvdconvert.kernels.operators import define

PAIRS = ((0, 1), (0, 2), (1, 2))
"""Axes of plane i: (along W, along H)."""
AXES = (2, 1, 0)
"""Axis of line i."""


def vm_sum(x01: Tensor, planes: Sequence[Tensor], lines: Sequence[Tensor]) -> Tensor:
    """Sum over modes and ranks of plane x line: [N] at ``x01`` [N, 3] in the unit cube."""
    return _vm_any(x01, planes, lines, True)


def vm_features(x01: Tensor, planes: Sequence[Tensor], lines: Sequence[Tensor]) -> Tensor:
    """Products of every rank, mode after mode: [N, R0 + R1 + R2] at ``x01`` [N, 3] in the unit cube."""
    return _vm_any(x01, planes, lines, False)


def _vm_any(x01: Tensor, planes: Sequence[Tensor], lines: Sequence[Tensor], summed: bool) -> Tensor:
    if not torch.compiler.is_compiling() and twin(x01, *planes, *lines) == "torch":
        return (vm_sum_torch if summed else vm_features_torch)(x01, planes, lines)
    out: Tensor = _vm(x01, *planes, *lines, summed)
    return out


def vm_sum_torch(x01: Tensor, planes: Sequence[Tensor], lines: Sequence[Tensor]) -> Tensor:
    """:func:`vm_sum` in plain torch: the truth, on any device."""
    total = x01.new_zeros(x01.shape[0])
    for plane, line in _modes(x01, planes, lines):
        total = total + (plane * line).sum(-1)
    return total


def vm_features_torch(x01: Tensor, planes: Sequence[Tensor], lines: Sequence[Tensor]) -> Tensor:
    """:func:`vm_features` in plain torch: the truth, on any device."""
    return torch.cat([plane * line for plane, line in _modes(x01, planes, lines)], dim=-1)


def _modes(x01: Tensor, planes: Sequence[Tensor], lines: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Interpolated (plane [N, R], line [N, R]) of every mode."""
    out = []
    for mode, (plane, line) in enumerate(zip(planes, lines, strict=True)):
        (i0, i1, fu), (j0, j1, fv), (k0, k1, fw) = _cells(x01.detach(), plane, line, mode)
        top = (1 - fu) * plane[j0, i0] + fu * plane[j0, i1]
        bottom = (1 - fu) * plane[j1, i0] + fu * plane[j1, i1]
        out.append(((1 - fv) * top + fv * bottom, (1 - fw) * line[k0] + fw * line[k1]))
    return out


def _cells(x01: Tensor, plane: Tensor, line: Tensor, mode: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    axes, sides = (*PAIRS[mode], AXES[mode]), (plane.shape[1], plane.shape[0], line.shape[0])
    return [_cell(x01[:, axis], n) for axis, n in zip(axes, sides)]


def _cell(u: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper vertex [N] and the fraction between them [N, 1] of ``u`` [N] on ``n`` vertices."""
    pos = u.nan_to_num(0.0).clamp(0, 1) * (n - 1)
    low = pos.long().clamp(max=max(n - 2, 0))
    return low, (low + 1).clamp(max=n - 1), (pos - low)[:, None]


# ------------------------------------------------------------------------------------- the operator that torch knows


def _run(x01: Tensor, p0: Tensor, p1: Tensor, p2: Tensor, l0: Tensor, l1: Tensor, l2: Tensor, summed: bool) -> Tensor:
    planes, lines = [p0, p1, p2], [l0, l1, l2]
    which = twin(x01, *planes, *lines)
    if which == "numba":
        from pvdconvert.kernels import planes_numba

        return planes_numba.forward(x01, planes, lines, summed)
    if which == "triton":
        from pvdconvert.kernels import planes_triton

        return planes_triton.forward(x01, planes, lines, summed)
    return (vm_sum_torch if summed else vm_features_torch)(x01, planes, lines)


def _run_backward(
    x01: Tensor, grad: Tensor, p0: Tensor, p1: Tensor, p2: Tensor, l0: Tensor, l1: Tensor, l2: Tensor, summed: bool
) -> list[Tensor]:
    planes, lines = [p0, p1, p2], [l0, l1, l2]
    which = twin(x01, grad, *planes, *lines)
    if which == "numba":
        from pvdconvert.kernels import planes_numba

        return planes_numba.backward(x01, grad, planes, lines, summed)
    if which == "triton":
        from pvdconvert.kernels import planes_triton

        return planes_triton.backward(x01, grad, planes, lines, summed)
    into = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (*planes, *lines)]
    offset = 0
    for mode, (plane, line) in enumerate(_modes(x01, planes, lines)):
        rank = plane.shape[1]
        g = grad[:, None] if summed else grad[:, offset : offset + rank]
        (i0, i1, fu), (j0, j1, fv), (k0, k1, fw) = _cells(x01, planes[mode], lines[mode], mode)
        rows, width, up, along = into[mode].view(-1, rank), planes[mode].shape[1], g * line, g * plane
        for j, wv in ((j0, 1 - fv), (j1, fv)):
            rows.index_add_(0, j * width + i0, wv * (1 - fu) * up).index_add_(0, j * width + i1, wv * fu * up)
        into[3 + mode].index_add_(0, k0, (1 - fw) * along).index_add_(0, k1, fw * along)
        offset += rank
    return into


def _fake(x01: Tensor, *rest: Any) -> Tensor:
    first: Tensor = rest[0]
    width = sum(plane.shape[2] for plane in rest[:3])
    return first.new_empty(x01.shape[0]) if rest[6] else first.new_empty(x01.shape[0], width)


def _fake_backward(x01: Tensor, grad: Tensor, *rest: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in rest[:6]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.summed = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x01, *factors = ctx.saved_tensors
    return (None, *_vm_backward(x01, grad, *factors, ctx.summed), None)


_FACTORS = ", ".join(f"Tensor {name}" for name in ("p0", "p1", "p2", "l0", "l1", "l2")) + ", bool summed"
_SIX = "(" + ", ".join(["Tensor"] * 6) + ")"
_vm_backward = define(
    f"vm_backward(Tensor x01, Tensor grad, {_FACTORS}) -> {_SIX}",
    lambda *arguments: tuple(_run_backward(*arguments)),
    lambda *arguments: tuple(_fake_backward(*arguments)),
)
_vm = define(f"vm(Tensor x01, {_FACTORS}) -> Tensor", _run, _fake, save=_save, backward=_backward)
