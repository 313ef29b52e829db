"""N^3-trees with values in their leaves: descent, checks, and rows gathered with a gradient for few of them.

``child`` int32 [n, N, N, N] holds, for each cell of each node, 0 (a leaf) or how far on the node lies that splits it
(layouts section 4.2). The row of a cell is its place in C order: ``((node N + i) N + j) N + k``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pvdconvert.kernels.backend import use_numba
from pvdconvert.kernels.rowgrad import sink_of

MAX_DEPTH = 32


def reach(child: Tensor) -> tuple[Tensor, int]:
    """(bool [n]: the nodes that hang on the root, levels of nodes).

    Raises ValueError where a link leaves the tree, or a node hangs on two cells: then the descent might not end.
    """
    count, cells = len(child), child[0].numel()
    flat = child.reshape(count, cells).long()
    seen = torch.zeros(count, dtype=torch.bool, device=child.device)
    level = torch.zeros(1, dtype=torch.int64, device=child.device)
    seen[0] = True
    for depth in range(1, MAX_DEPTH + 1):
        links = flat[level]
        target = (level[:, None] + links)[links != 0]
        if not len(target):
            return seen, depth
        if bool(((target < 0) | (target >= count)).any()):
            raise ValueError(f"a link leads out of the tree of {count} nodes")
        level = torch.unique(target)
        if len(level) < len(target) or bool(seen[level].any()):
            raise ValueError("a node hangs on two cells")
        seen[level] = True
    raise ValueError(f"the tree is more than {MAX_DEPTH} levels deep")


def leaf_rows_torch(u: Tensor, child: Tensor) -> Tensor:
    """The truth of :func:`leaf_rows`."""
    side = child.shape[1]
    inside = ((u >= 0) & (u <= 1)).all(-1)
    flat = child.reshape(-1)
    rows = torch.full((len(u),), -1, dtype=torch.int64, device=u.device)
    left = inside.nonzero().squeeze(1)
    v, node = u[left], torch.zeros(len(left), dtype=torch.int64, device=u.device)
    while len(left):
        v = v * side
        cell = torch.floor(v).clamp_max(side - 1)
        v = v - cell
        i = cell.long()
        row = ((node * side + i[:, 0]) * side + i[:, 1]) * side + i[:, 2]
        link = flat[row].long()
        leaf = link == 0
        rows[left[leaf]] = row[leaf]
        left, v, node = left[~leaf], v[~leaf], (node + link)[~leaf]
    return rows


def leaf_rows(u: Tensor, child: Tensor) -> Tensor:
    """int64 [N]: the row of the leaf that holds ``u`` [N, 3] in the unit cube, faces included; -1 outside."""
    if use_numba(u):
        from pvdconvert.kernels import octree_numba

        return octree_numba.leaf_rows(u, child)
    return leaf_rows_torch(u, child)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor) -> Tensor:
        ctx.values, ctx.rows = values, rows
        if not len(values):
            return values.new_zeros(len(rows), values.shape[1])
        out = values.index_select(0, rows.clamp_min(0))
        return out.masked_fill_((rows < 0)[:, None], 0.0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None]:
        values, keep = ctx.values, ctx.rows >= 0
        rows, g = ctx.rows[keep], g[keep]
        sink = sink_of(values)
        grad = sink[0] if sink else torch.zeros_like(values)
        grad.index_add_(0, rows, g)
        if sink:
            sink[1][rows] = 1
        return None if sink else grad, None


def gather_rows(values: Tensor, rows: Tensor) -> Tensor:
    """[N, C]: ``values`` [R, C] at ``rows`` int64 [N], zero where -1. The gradient is sparse (``kernels.rowgrad``)."""
    out: Tensor = _Gather.apply(values, rows)  # type: ignore[no-untyped-call]
    return out
