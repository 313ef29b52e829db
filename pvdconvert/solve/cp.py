"""Exact, sparse, masked alternating least squares: the CP decomposition of values known at some vertices of a grid.

The fit is linear in each of the three lines. An update solves, for every entry of a line, its own R x R normal
equations over the known vertices of that slice only; vertices that are not listed are "don't care". The equations of a
slice are one matrix product, so this needs no kernel of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pvdconvert.kernels.lines import AXES

POINTS = 1 << 14
"""Vertices of a slice that are multiplied at once: their products stay in a core's cache."""


@dataclasses.dataclass(frozen=True)
class CpFit:
    """lines[i] [n[axis i], R] (:mod:`pvdconvert.kernels.lines`), and how the fit went.

    ``objective``, after each sweep: the weighted mean of squared errors (0 where a one-sided target is met) plus the
    ridge; it never rises. ``error``: root of the former, of the last sweep.
    """

    lines: list[Tensor]
    objective: list[float]
    error: float


@torch.no_grad()
def cp_als(
    index: Tensor,
    values: Tensor,
    shape: Sequence[int],
    rank: int,
    *,
    sweeps: int = 5,
    weights: Tensor | None = None,
    limit: Tensor | None = None,
    ridge: float = 1e-2,
    generator: torch.Generator | None = None,
) -> CpFit:
    """Lines whose summed products meet ``values`` [M] at vertices ``index`` [M, 3] of a grid ``shape``.

    weights   [M] >= 0, relative
    limit     [M] int8: 0 meet the value; -1 be at most the value; +1 be at least the value (targets cut off at a floor
              or ceiling say no more than that)
    ridge     Tikhonov weight on all factors, per vertex of mean weight: settles slices with fewer vertices than ranks

    Deterministic for a seeded ``generator``. Memory: about 60 bytes a vertex beside the factors.
    """
    count, device = len(values), values.device
    target = values.float()
    weight = torch.ones_like(target) if weights is None else weights.float() / weights.float().mean()
    side = torch.zeros(count, dtype=torch.int8, device=device) if limit is None else limit.to(torch.int8)
    n = [int(v) for v in shape]
    # Signs and sizes vary, but no component starts at 0 anywhere: products of three normals mostly would.
    lines = [1.0 + 0.5 * torch.randn(n[axis], rank, generator=generator) for axis in AXES]
    signs = torch.where(torch.rand(rank, generator=generator) < 0.5, -1.0, 1.0)
    lines[0] *= signs
    lines = [(line * rank ** (-1 / 6)).to(device) for line in lines]
    entries = [index[:, axis].long() for axis in AXES]
    slices = [_slices(entry, n[axis]) for entry, axis in zip(entries, AXES)]
    fit = _products(lines, entries)
    objective: list[float] = []
    square = 0.0
    for _ in range(sweeps):
        for i in range(3):
            others = [k for k in range(3) if k != i]
            for row, members in slices[i]:
                _solve(lines, i, row, others, entries, members, target, weight, side, fit, ridge)
            _balance(lines)
        error = target.double() - fit.double()
        error[error * side < 0] = 0.0
        square = float((weight * error.square()).sum())
        penalty = sum(float(line.double().square().sum()) for line in lines)
        objective.append((square + ridge * penalty) / max(count, 1))
    return CpFit(lines, objective, (square / max(count, 1)) ** 0.5)


def _slices(entry: Tensor, n: int) -> list[tuple[int, Tensor]]:
    """(row, its vertices [K] in order) for every row that has some."""
    order = entry.sort(stable=True).indices
    counts = torch.bincount(entry, minlength=n).tolist()
    return [(row, members) for row, members in enumerate(torch.split(order, counts)) if len(members)]


def _products(lines: Sequence[Tensor], entries: Sequence[Tensor]) -> Tensor:
    """[M]: the sum of all products at every listed vertex."""
    parts = [torch.split(entry, POINTS) for entry in entries]
    sums = [(lines[0][a] * lines[1][b] * lines[2][c]).sum(1) for a, b, c in zip(*parts)]
    return torch.cat(sums)


def _solve(
    lines: list[Tensor],
    i: int,
    row: int,
    others: Sequence[int],
    entries: Sequence[Tensor],
    members: Tensor,
    target: Tensor,
    weight: Tensor,
    side: Tensor,
    fit: Tensor,
    ridge: float,
) -> None:
    """Replace row ``row`` of line ``i`` by its best values given the other two lines; ``fit`` follows."""
    rank = lines[i].shape[1]
    old = lines[i][row]
    left = torch.zeros(rank, rank, dtype=torch.float64, device=old.device)
    right = torch.zeros(rank, dtype=torch.float64, device=old.device)
    kept = []
    for m in torch.split(members, POINTS):
        v = lines[others[0]][entries[others[0]][m]] * lines[others[1]][entries[others[1]][m]]
        error = target[m] - fit[m]
        error = torch.where(error * side[m] < 0, 0.0, error)
        weighted = v * weight[m, None]
        left += (weighted.t() @ v).double()
        # The old row is where the error is measured from: only the change is solved for.
        right += (weighted.t() @ error).double()
        kept.append((m, v))
    left.diagonal().add_(ridge)
    right -= ridge * old.double()
    change = torch.cholesky_solve(right[:, None], torch.linalg.cholesky(left))[:, 0].float()
    lines[i][row] = old + change
    for m, v in kept:
        fit[m] += v @ change


def _balance(lines: list[Tensor]) -> None:
    """Give the three lines of each component one norm: the product stays, and the ridge is least."""
    norms = [line.double().norm(dim=0) for line in lines]
    mean = (norms[0] * norms[1] * norms[2]).pow(1 / 3)
    for line, norm in zip(lines, norms):
        line *= torch.where(mean > 0, mean / norm.clamp(min=1e-30), 1.0).float()
