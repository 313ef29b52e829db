"""Least squares on the leaves of a tree: each is a small system of its own, and borrows from its parents."""

from __future__ import annotations

import torch
from torch import Tensor

from pvdconvert.solve.voxels import EDGE

RIDGE = 0.05
"""Weight of what a leaf borrows, in samples of mean weight."""
CHUNK = 1 << 14


def parents_of(child: Tensor) -> Tensor:
    """int64 [n]: the row of the cell on which each node hangs; -1 for the root and for nodes that hang on none."""
    flat = child.reshape(len(child), -1).long()
    cells = flat.shape[1]
    node, cell = (flat != 0).nonzero().unbind(1)
    out = torch.full((len(child),), -1, dtype=torch.int64, device=child.device)
    target = node + flat[node, cell]
    held = (target > 0) & (target < len(child))
    out[target[held]] = (node * cells + cell)[held]
    return out


def mean_leaves(total: Tensor, weight: Tensor, child: Tensor, wanted: Tensor) -> Tensor:
    """Means [R, C] of the leaves ``wanted`` (bool [R]): ``total`` [R, C] over ``weight`` [R].

    A leaf of weight 0 takes the mean of the leaves below its nearest ancestor that has any; elsewhere 0.
    """
    cells = child[0].numel()
    parent = parents_of(child)
    total, weight = total.clone(), weight.clone()
    order = _by_level(parent, cells)
    for nodes in reversed(order[1:]):  # sums climb to the cell that holds the node
        total.index_add_(0, parent[nodes], total.view(len(child), cells, -1)[nodes].sum(1))
        weight.index_add_(0, parent[nodes], weight.view(len(child), cells)[nodes].sum(1))
    mean = total / weight.clamp_min(1e-30)[:, None]
    whole = total.view(len(child), cells, -1)[0].sum(0) / weight.view(len(child), cells)[0].sum().clamp_min(1e-30)
    for depth, nodes in enumerate(order):
        above = mean[parent[nodes]] if depth else whole.expand(len(nodes), -1)
        inner = mean.view(len(child), cells, -1)
        some = (weight.view(len(child), cells)[nodes] > 0)[..., None]
        inner[nodes] = torch.where(some, inner[nodes], above[:, None])
    return torch.where(wanted[:, None], mean, 0.0)


def _by_level(parent: Tensor, cells: int) -> list[Tensor]:
    """The nodes of each level, the root's first."""
    level = torch.zeros(1, dtype=torch.int64, device=parent.device)
    out = [level]
    up = torch.where(parent >= 0, torch.div(parent, cells, rounding_mode="floor"), -1)
    marked = torch.zeros(len(parent), dtype=torch.bool, device=parent.device)
    marked[0] = True
    while True:
        below = (marked[up.clamp_min(0)] & (up >= 0)).nonzero().squeeze(1)
        if not len(below):
            return out
        out.append(below)
        marked.zero_()
        marked[below] = True


@torch.no_grad()
def fit_leaves(rows: Tensor, basis: Tensor, rgb: Tensor, weight: Tensor, child: Tensor, wanted: Tensor) -> Tensor:
    """Coefficients [R, 3 B] such that ``sigmoid(sum_b basis[c, b] v[rows[c], k B + b])`` meets ``rgb`` [C, 3].

    ``rows`` int64 [C] in leaves, ``basis`` [C, B], ``weight`` [C]. Logits are fitted, weighted by what they do to the
    colour; a ridge of :data:`RIDGE` samples holds each leaf to the mean colour of its surroundings.
    """
    count, bands = len(wanted), basis.shape[1]
    inner = rgb.clamp(EDGE, 1 - EDGE)
    target = torch.logit(inner)
    w = weight / weight.mean().clamp_min(1e-12)
    slope = (inner * (1 - inner)).clamp_min(0.02)
    total, mass = rgb.new_zeros(count, 3), rgb.new_zeros(count)
    total.index_add_(0, rows, target * w[:, None])
    mass.index_add_(0, rows, w)
    mean = mean_leaves(total, mass, child, wanted)
    first = basis[:, 0].mean()  # the first function of harmonics is constant
    out = rgb.new_zeros(count, 3, bands)
    out[:, :, 0] = mean / first
    order = torch.argsort(rows, stable=True)
    seen, size = torch.unique_consecutive(rows[order], return_counts=True)
    starts = torch.cat([size.new_zeros(1), torch.cumsum(size, 0)]).tolist()
    eye = torch.eye(bands, device=rgb.device)
    for low in range(0, len(seen), CHUNK):
        high = min(len(seen), low + CHUNK)
        pick = order[starts[low] : starts[high]]
        local = torch.repeat_interleave(torch.arange(high - low, device=rows.device), size[low:high])
        b, at = basis[pick], seen[low:high]
        for channel in range(3):
            weights = w[pick] * slope[pick, channel] ** 2
            miss = target[pick, channel] - (b * out[at][local, channel]).sum(1)
            normal = rgb.new_zeros(high - low, bands, bands)
            normal.index_add_(0, local, (b * weights[:, None])[:, :, None] * b[:, None, :])
            right = rgb.new_zeros(high - low, bands)
            right.index_add_(0, local, b * (weights * miss)[:, None])
            ridge = RIDGE * (slope**2).mean() * first**2
            out[at, channel] += torch.linalg.solve(normal + ridge * eye, right)
    return out.reshape(count, -1)
