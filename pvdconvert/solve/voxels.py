"""Least squares on sparse voxels: values on vertices such that their trilinear interpolation meets samples.

Everything is matrix-free: the normal operator is one forward and one backward pass of the voxel kernels. A pyramid of
coarser lattices gives vertices that few samples reach what their surroundings say.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from pvdconvert.kernels.voxels import BrickMap, Missing, voxel_interp, voxel_sh_color

DC = 0.28209479177387814
"""The value of the first spherical harmonic."""
MEAN_SQUARE = 1 / (4 * math.pi)
"""Mean square of any spherical harmonic over the sphere."""
EDGE = 0.004
"""Colours are taken as this far from 0 and 1 at least (half an 8-bit level is 0.002): logits stay finite."""


@dataclasses.dataclass(frozen=True)
class Level:
    """A lattice of a pyramid: ``vertices`` [V, 3] sorted, their map, and how many finest cells its cell spans."""

    vertices: Tensor
    grid: BrickMap
    factor: int


def pyramid(vertices: Tensor, grid: BrickMap, levels: int) -> list[Level]:
    """Finest first: each next lattice has cells twice as large and covers the one before."""
    out = [Level(vertices, grid, 1)]
    for k in range(1, levels):
        before = out[-1]
        n = [(s - 2) // 2 + 2 for s in before.grid.shape]
        last = torch.tensor(n, device=vertices.device) - 2
        cells = _unique(torch.minimum(before.vertices.long() >> 1, last), n)
        corners = torch.tensor([[c >> 2 & 1, c >> 1 & 1, c & 1] for c in range(8)], device=vertices.device)
        v = _unique((cells[:, None] + corners).reshape(-1, 3), n)
        out.append(Level(v, BrickMap.from_vertices(v, (n[0], n[1], n[2]), grid.side), 1 << k))
    return out


def _unique(v: Tensor, shape: list[int]) -> Tensor:
    """The different rows of ``v`` [V, 3], x-major (sorting one number a row is far cheaper than sorting rows)."""
    key = torch.unique((v[:, 0] * shape[1] + v[:, 1]) * shape[2] + v[:, 2])
    xy = torch.div(key, shape[2], rounding_mode="floor")
    return torch.stack([torch.div(xy, shape[1], rounding_mode="floor"), xy % shape[1], key % shape[2]], -1)


def affordable(
    samples: int, levels: list[Level], width: int, seconds: float, *, rounds: int = 0, most: int = 12
) -> tuple[int, int, int]:
    """(finest, iterations, rounds) of a fit of ``width`` numbers a vertex that takes about ``seconds`` on two cores.

    By a fixed estimate of the cost, not by the clock: the same request gives the same result. Where the time is short
    the rounds go first, then iterations below 3, then the finest levels (``finest`` is the first one that is solved).
    """
    for finest in range(len(levels)):
        cost = [
            samples / _stride(samples, level, k) * (80 + 2 * width) * 1e-9 + len(level.vertices) * width * 1.5e-8
            for k, level in enumerate(levels[finest:])
        ]
        for again, least in ((rounds, 3), (0, 2)):
            # An iteration's cost once more sets a system up.
            iterations = int(seconds / max(again * cost[0] + sum(cost), 1e-9)) - 1
            if iterations >= least:
                return finest, min(most, iterations), again
    return len(levels) - 1, 1, 0


def _stride(samples: int, level: Level, k: int) -> int:
    """Coarser levels need fewer samples: every 4^k-th, but two a vertex at least."""
    return int(max(1, min(4**k, samples // max(1, 2 * len(level.vertices)))))


def order(xg: Tensor, grid: BrickMap) -> Tensor:
    """A permutation [N] that puts samples ``xg`` [N, 3] into the order of the vertices: memory is met in order."""
    i = torch.floor(xg).long()
    key = (i[:, 0] * grid.shape[1] + i[:, 1]) * grid.shape[2] + i[:, 2]
    return torch.argsort(key, stable=True)


def _evaluate(grid: BrickMap, xg: Tensor, basis: Tensor | None, values: Tensor, missing: Missing) -> Tensor:
    if basis is None:
        return voxel_interp(xg, grid, values, missing)
    return voxel_sh_color(xg, basis, grid, values, missing)[:, 0]


def _adjoint(grid: BrickMap, xg: Tensor, basis: Tensor | None, like: Tensor, g: Tensor, missing: Missing) -> Tensor:
    with torch.enable_grad():
        v = like.detach().requires_grad_()
        out = _evaluate(grid, xg, basis, v, missing)
    return torch.autograd.grad(out, v, g)[0]


@torch.no_grad()
def least_squares(
    grid: BrickMap,
    xg: Tensor,
    target: Tensor,
    weight: Tensor,
    start: Tensor,
    *,
    ridge: Tensor,
    iterations: int,
    basis: Tensor | None = None,
    missing: Missing = "cell",
) -> Tensor:
    """The minimiser v [V, K*B] of ``sum weight (A v - target)^2 + sum ridge (v - start)^2``, by conjugate gradients.

    ``A`` interpolates at ``xg`` [C, 3] and, with ``basis`` [C, 1, B], sums over spherical harmonics (K = 3); without,
    B = 1. ``target`` and ``weight`` are [C, K]; ``ridge`` broadcasts to [V, K*B] and is > 0. Each of the K channels is
    a system of its own. The objective never rises from one iteration to the next. Deterministic.
    """
    width = target.shape[1]
    v0 = start.detach()
    norm = 1.0 if basis is None else MEAN_SQUARE
    mass = _adjoint(grid, xg, None, v0.new_zeros(len(v0), width), weight, missing)
    scale = (1 / (mass.repeat_interleave(v0.shape[1] // width, 1) * norm + ridge)).contiguous()

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return torch.mul(a, b, out=spare).view(len(v0), width, -1).sum((0, 2))

    def spread(a: Tensor) -> Tensor:
        return a.repeat_interleave(v0.shape[1] // width)

    def normal(p: Tensor) -> Tensor:
        with torch.enable_grad():
            q = p.detach().requires_grad_()
            out = _evaluate(grid, xg, basis, q, missing)
        return torch.autograd.grad(out, q, out.detach() * weight)[0].addcmul_(ridge, p)

    residual = _adjoint(grid, xg, basis, v0, weight * (target - _evaluate(grid, xg, basis, v0, missing)), missing)
    # All in place: a large tensor made anew costs more than what is computed in it.
    spare, delta, z = torch.empty_like(v0), torch.zeros_like(v0), residual * scale
    p, rz = z.clone(), dot(residual, z)
    for _ in range(iterations):
        ap = normal(p)
        curve = dot(p, ap)
        alpha = spread(torch.where(curve > 0, rz / curve.clamp_min(1e-30), 0.0))
        delta.addcmul_(p, alpha)
        residual.addcmul_(ap, alpha, value=-1.0)
        torch.mul(residual, scale, out=z)
        after = dot(residual, z)
        p.mul_(spread(torch.where(rz > 0, after / rz.clamp_min(1e-30), 0.0))).add_(z)
        rz = after
        if not bool((rz > 0).any()):
            break
    return v0 + delta


def _ridge(
    grid: BrickMap, xg: Tensor, weight: Tensor, count: int, width: int, share: Tensor, missing: Missing
) -> Tensor:
    """``share`` [width] of the mean weight of the vertices that have any, [1, width]."""
    mass = _adjoint(grid, xg, None, weight.new_zeros(count, 1), weight.mean(1, keepdim=True), missing)
    mean = mass.sum() / (mass > 0).sum().clamp_min(1)
    return (share * mean.clamp_min(1e-12)).view(1, width)


def prolong(coarse: Level, values: Tensor, fine: Level) -> Tensor:
    """Values on ``fine``'s vertices by interpolating those on ``coarse``."""
    return voxel_interp(fine.vertices.float() * (fine.factor / coarse.factor), coarse.grid, values)


@torch.no_grad()
def fit_scalar(
    levels: list[Level],
    xg: Tensor,
    target: Tensor,
    weight: Tensor,
    start: Tensor | float,
    *,
    iterations: int,
    share: float = 1e-2,
    missing: Missing = "cell",
    finest: int = 0,
) -> Tensor:
    """Values [V, 1] on the finest level for samples ``target`` [C] at ``xg`` [C, 3] (finest vertex units).

    ``start``: values on the finest level to stay close to (no pyramid then), or a number for the coarsest. Levels
    before ``finest`` are only interpolated from that one.
    """
    t, w = target[:, None], weight[:, None]
    used = levels[:1] if isinstance(start, Tensor) else levels
    values = start if isinstance(start, Tensor) else xg.new_full((len(levels[-1].vertices), 1), start)
    for k in range(len(used) - 1, -1, -1):
        level = used[k]
        pick = slice(None, None, _stride(len(xg), level, k - finest))
        if k >= finest:
            x = xg[pick] / level.factor
            ridge = _ridge(level.grid, x, w[pick], len(values), 1, x.new_full((1,), share), missing)
            values = least_squares(
                level.grid, x, t[pick], w[pick], values, ridge=ridge, iterations=iterations, missing=missing
            )
        if k:
            values = prolong(level, values, used[k - 1])
    return values


@torch.no_grad()
def fit_color(
    levels: list[Level],
    xg: Tensor,
    basis: Tensor,
    rgb: Tensor,
    weight: Tensor,
    *,
    activation: str,
    iterations: int,
    rounds: int = 2,
    share: tuple[float, float] = (2e-3, 2e-2),
    missing: Missing = "cell",
    finest: int = 0,
) -> Tensor:
    """SH coefficients [V, 3*B] on the finest level for colours ``rgb`` [C, 3] at ``xg`` [C, 3] (finest vertex units).

    ``basis`` [C, 1, B], ``weight`` [C]. With ``activation`` "sigmoid" the squared error of the colour itself is
    minimised: a weighted fit of the logits, then ``rounds`` Gauss-Newton steps, each kept only if it lowers the error;
    with "shift" (max(value + 0.5, 0)) the problem is linear. ``share``: ridge on the first coefficient and on the
    others, as shares of the mean weight of a vertex. A firmer one helps where answers are many and harms where they
    are few (lego, dB on test views, 25 times this: 29.58 -> 29.82 with 13 samples a vertex, 31.11 -> 30.54 with 2).
    Levels before ``finest`` are only interpolated from that one.
    """
    bands = basis.shape[2]
    shares = rgb.new_tensor([share[0], *[share[1]] * (bands - 1)]).repeat(3)
    w = (weight / weight.mean().clamp_min(1e-12))[:, None]
    sigmoid = activation == "sigmoid"
    inner = rgb.clamp(EDGE, 1 - EDGE) if sigmoid else rgb
    target = torch.logit(inner) if sigmoid else inner - 0.5
    # A logit counts by what it does to the colour.
    slope = (inner * (1 - inner)).clamp_min(0.02) if sigmoid else torch.ones_like(inner)
    mean = (target * w * slope**2).sum(0) / (w * slope**2).sum(0)
    values = rgb.new_zeros(len(levels[-1].vertices), 3, bands)
    values[:, :, 0] = mean / DC
    values = values.view(-1, 3 * bands)

    def error(level: Level, x: Tensor, v: Tensor) -> float:
        out = torch.sigmoid(_evaluate(level.grid, x, basis, v, missing))
        return float((w * (out - inner) ** 2).sum(dtype=torch.float64))

    for k in range(len(levels) - 1, -1, -1):
        level, pick = levels[k], slice(None, None, _stride(len(xg), levels[k], k - finest))
        x, part = xg[pick] / level.factor, basis[pick]

        def solve(
            t: Tensor, weights: Tensor, v: Tensor, level: Level = level, x: Tensor = x, part: Tensor = part
        ) -> Tensor:
            ridge = _ridge(level.grid, x, weights, len(v), 3 * bands, shares * MEAN_SQUARE, missing)
            return least_squares(
                level.grid, x, t, weights, v, ridge=ridge, iterations=iterations, basis=part, missing=missing
            )

        if k >= finest:
            values = solve(target[pick], (w * slope**2)[pick], values)
        if sigmoid and k == finest:
            best = error(level, x, values)
            for _ in range(rounds):
                z = _evaluate(level.grid, x, basis, values, missing)
                p = torch.sigmoid(z)
                j = (p * (1 - p)).clamp_min(0.02)
                trial = solve(z + (inner - p) / j, w * j**2, values)
                after = error(level, x, trial)
                if after >= best:
                    break
                best, values = after, trial
        if k:
            values = prolong(level, values, levels[k - 1])
    return values
