"""Exact, sparse, masked alternating least squares: the VM decomposition of values known at some vertices of a grid.

The fit is linear in the planes and linear in the lines. Each update solves, for every plane cell (or line entry), its
own R x R normal equations over the known vertices of that cell only; vertices that are not listed are "don't care".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pvdconvert.kernels.backend import use_numba
from pvdconvert.kernels.planes import AXES, PAIRS
from pvdconvert.kernels.voxels import BrickMap, voxel_spread

GROUPS = 4096
POINTS = 1 << 15
SPREAD = 1 << 18
"""Samples that are spread to vertices at once."""


@dataclasses.dataclass(frozen=True)
class VmFit:
    """planes[i] [n[b], n[a], R_i], lines[i] [n[c], R_i] (:mod:`pvdconvert.kernels.planes`), and how the fit went.

    ``objective``, after each sweep: the weighted mean of squared errors (0 where a one-sided target is met) plus the
    ridge; it never rises. ``error``: root of the former, of the last sweep.
    """

    planes: list[Tensor]
    lines: list[Tensor]
    objective: list[float]
    error: float


@torch.no_grad()
def vm_als(
    index: Tensor,
    values: Tensor,
    shape: Sequence[int],
    ranks: Sequence[int],
    *,
    sweeps: int = 5,
    weights: Tensor | None = None,
    limit: Tensor | None = None,
    ridge: float = 1e-2,
    generator: torch.Generator | None = None,
) -> VmFit:
    """Planes and lines whose summed products meet ``values`` [M] at vertices ``index`` [M, 3] of a grid ``shape``.

    weights   [M] >= 0, relative
    limit     [M] int8: 0 meet the value; -1 be at most the value; +1 be at least the value (targets cut off at a floor
              or ceiling say no more than that)
    ridge     Tikhonov weight on all factors, per vertex of mean weight: settles cells with fewer vertices than ranks

    Deterministic for a seeded ``generator``. Memory: about 60 bytes a vertex beside the factors.
    """
    count = len(values)
    device = values.device
    target = values.float().contiguous()
    weight = torch.ones_like(target) if weights is None else (weights.float() / weights.float().mean()).contiguous()
    side = torch.zeros(count, dtype=torch.int8, device=device) if limit is None else limit.to(torch.int8).contiguous()
    n = [int(v) for v in shape]
    fit = torch.zeros_like(target)
    planes: list[Tensor] = []
    lines: list[Tensor] = []
    blocks = []
    for (a, b), c, rank in zip(PAIRS, AXES, ranks, strict=True):
        planes.append(torch.zeros(n[b] * n[a], rank, device=device))
        lines.append(torch.randn(n[c], rank, generator=generator).to(device))
        cell = index[:, b].long() * n[a] + index[:, a].long()
        entry = index[:, c].long()
        blocks.append((cell, entry, _group(cell), _group(entry)))
    objective: list[float] = []
    square = 0.0
    for _ in range(sweeps):
        penalty = 0.0
        for plane, line, (cell, entry, by_cell, by_entry) in zip(planes, lines, blocks):
            _update(line, entry, plane, by_cell, target, weight, side, fit, ridge)
            _update(plane, cell, line, by_entry, target, weight, side, fit, ridge)
            _balance(plane, line)
            penalty += float(plane.double().square().sum() + line.double().square().sum())
        error = target.double() - fit.double()
        error[error * side < 0] = 0.0
        square = float((weight * error.square()).sum())
        objective.append((square + ridge * penalty) / max(count, 1))
    for plane, line, (_, _, by_cell, by_entry) in zip(planes, lines, blocks):
        # Gradient steps treat all entries alike: give those of planes and lines the same size.
        _balance(plane, line, (len(by_entry[0]) / max(len(by_cell[0]), 1)) ** 0.5)
    shaped = [p.view(n[b], n[a], -1) for p, (a, b) in zip(planes, PAIRS)]
    return VmFit(shaped, lines, objective, (square / max(count, 1)) ** 0.5)


Groups = tuple[Tensor, Tensor, Tensor]


def _group(key: Tensor) -> Groups:
    """(rows [U], offsets [U + 1], order [M]): ``order[offsets[u]:offsets[u + 1]]`` are the vertices of ``rows[u]``."""
    ordered, order = key.sort(stable=True)
    rows, counts = torch.unique_consecutive(ordered, return_counts=True)
    offsets = torch.zeros(len(rows) + 1, dtype=torch.int64, device=key.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return rows, offsets, order


def _balance(plane: Tensor, line: Tensor, ratio: float = 1.0) -> None:
    """Give line and plane of each component norms in ``ratio``: the product stays; at 1 the ridge is least."""
    p, q = plane.double().norm(dim=0), line.double().norm(dim=0)
    scale = torch.where((p > 0) & (q > 0), (q / p.clamp(min=1e-30) / ratio).sqrt(), 1.0)
    plane *= scale.float()
    line /= scale.float()


def _update(
    fixed: Tensor,
    fixed_row: Tensor,
    solved: Tensor,
    groups: Groups,
    target: Tensor,
    weight: Tensor,
    limit: Tensor,
    fit: Tensor,
    ridge: float,
) -> None:
    """Replace the rows of ``solved`` [*, R] by their best values given ``fixed`` [*, R]; ``fit`` [M] follows."""
    rows, offsets, order = groups
    if use_numba(fixed, solved):
        from pvdconvert.kernels import als_numba

        als_numba.update(fixed, fixed_row, solved, rows, offsets, order, target, weight, limit, fit, ridge)
        return
    _update_torch(fixed, fixed_row, solved, groups, target, weight, limit, fit, ridge)


def _update_torch(
    fixed: Tensor,
    fixed_row: Tensor,
    solved: Tensor,
    groups: Groups,
    target: Tensor,
    weight: Tensor,
    limit: Tensor,
    fit: Tensor,
    ridge: float,
) -> None:
    rows, offsets, order = groups
    rank = fixed.shape[1]
    for start in range(0, len(rows), GROUPS):
        stop = min(start + GROUPS, len(rows))
        begin, end = int(offsets[start]), int(offsets[stop])
        group = torch.repeat_interleave(
            torch.arange(stop - start, device=fixed.device), offsets[start + 1 : stop + 1] - offsets[start:stop]
        )
        old = solved[rows[start:stop]].double()
        left = ridge * torch.eye(rank, dtype=torch.float64, device=fixed.device).repeat(stop - start, 1, 1)
        right = torch.zeros(stop - start, rank, dtype=torch.float64, device=fixed.device)
        for part in range(begin, end, POINTS):
            m = order[part : min(part + POINTS, end)]
            g = group[part - begin : part - begin + len(m)]
            v = fixed[fixed_row[m]].double()
            error = target[m].double() - fit[m].double()
            error = torch.where(error * limit[m] < 0, 0.0, error)
            wanted = (v * old[g]).sum(1) + error
            weighted = v * weight[m, None].double()
            left.index_add_(0, g, weighted[:, :, None] * v[:, None, :])
            right.index_add_(0, g, weighted * wanted[:, None])
        new = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(left))[:, :, 0].float()
        solved[rows[start:stop]] = new
        change = new.double() - old
        for part in range(begin, end, POINTS):
            m = order[part : min(part + POINTS, end)]
            g = group[part - begin : part - begin + len(m)]
            fit[m] += (fixed[fixed_row[m]].double() * change[g]).sum(1).float()


def corners(x01: Tensor, shape: Sequence[int]) -> Tensor:
    """The vertices [M, 3] int64, in order, of those cells of a unit-cube grid that hold some of ``x01`` [N, 3]."""
    n = torch.tensor([int(v) for v in shape], device=x01.device)
    seen = torch.zeros(tuple(n.tolist()), dtype=torch.uint8, device=x01.device)
    low = torch.minimum((x01.clamp(0, 1) * (n - 1)).long(), (n - 2).clamp(min=0))
    seen.view(-1)[(low[:, 0] * n[1] + low[:, 1]) * n[2] + low[:, 2]] = 1
    for axis in range(3):  # a cell's lower vertex marks its upper one
        last = seen.shape[axis] - 1
        seen.narrow(axis, 1, last).bitwise_or_(seen.narrow(axis, 0, last).clone())
    return seen.nonzero()


def scatter(x01: Tensor, values: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Trilinearly weighted means of ``values`` [N, K] at ``x01`` [N, 3] around vertices of a grid of the unit cube
    (``shape``: 2 or more along each axis): vertices [M, 3], means [M, K], sums of weights [M].

    A vertex is listed where its weights sum to half a sample or more.
    """
    n = (int(shape[0]), int(shape[1]), int(shape[2]))
    vertices = corners(x01, n)
    grid = BrickMap.from_vertices(vertices, n)
    last = torch.tensor(n, device=x01.device) - 1
    total = values.new_zeros(len(vertices), values.shape[1] + 1)
    for x, v in zip(torch.split(x01, SPREAD), torch.split(values, SPREAD)):
        voxel_spread((x.clamp(0, 1) * last).float(), grid, torch.cat([v, v.new_ones(len(v), 1)], 1), total)
    known = (total[:, -1] >= 0.5).nonzero().squeeze(1)
    weight = total[known, -1]
    return vertices[known], total[known, :-1] / weight[:, None], weight
