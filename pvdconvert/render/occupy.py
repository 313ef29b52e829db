"""Building occupancy from any field, coarse to fine, and checking that it hides nothing (pvd.md 6.3, 7).

Never a blind evaluation of the fine cube: a coarse grid is asked first, its occupied cells are dilated and split, and
only those are asked again. Thin parts that fall between the points are found by rays that ignore the grid
(:func:`check_occupancy`).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from pvdconvert.errors import RequestError
from pvdconvert.field import RadianceField
from pvdconvert.progress import Progress, Silent
from pvdconvert.render.contracted import reachable, stretch
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, RaySpace

COARSE = 64
ALPHA = 0.01
"""A cell is occupied where the opacity across its side reaches this."""


def grid_over(box: Box, resolution: int, device: torch.device) -> Occupancy:
    """An empty grid of cubic cells over ``box``, ``resolution`` of them along its longest side."""
    cell = box.longest / resolution
    shape = [max(1, math.ceil(s / cell - 1e-6)) for s in box.size]
    return Occupancy(
        torch.tensor(box.min, dtype=torch.float32, device=device),
        cell,
        torch.zeros(shape, dtype=torch.uint8, device=device),
    )


def dilate(grid: Tensor, times: int = 1) -> Tensor:
    """``grid`` uint8 [nx, ny, nz] grown by one cell in all 26 directions, ``times`` over."""
    out = grid
    for _ in range(times):
        for axis in range(3):
            grown = out.clone()
            n = out.shape[axis]
            if n > 1:
                grown.narrow(axis, 1, n - 1).bitwise_or_(out.narrow(axis, 0, n - 1))
                grown.narrow(axis, 0, n - 1).bitwise_or_(out.narrow(axis, 1, n - 1))
            out = grown
    return out


def split(occupancy: Occupancy, factor: int) -> Occupancy:
    """The same cells, each cut into ``factor`` cubed."""
    grid = occupancy.grid
    for axis in range(3):
        grid = grid.repeat_interleave(factor, dim=axis)
    return Occupancy(occupancy.origin, occupancy.cell / factor, grid)


def resample(occupancy: Occupancy, like: Occupancy) -> Occupancy:
    """``occupancy`` on the grid of ``like``: a cell is set where any cell of ``occupancy`` that it touches is set."""
    out = torch.zeros_like(like.grid)
    index = occupancy.grid.nonzero().to(occupancy.origin.dtype)
    if len(index):
        eps = 1e-4
        low = occupancy.origin + index * occupancy.cell
        first = torch.floor((low - like.origin) / like.cell + eps).long()
        last = torch.floor((low + occupancy.cell - like.origin) / like.cell - eps).long()
        span = int((last - first).max()) + 1
        shape = torch.tensor(like.grid.shape, device=out.device)
        for dx in range(span):
            for dy in range(span):
                for dz in range(span):
                    i = torch.minimum(first + torch.tensor([dx, dy, dz], device=out.device), last)
                    i = i[((i >= 0) & (i < shape)).all(-1)]
                    out[i[:, 0], i[:, 1], i[:, 2]] = 1
    return Occupancy(like.origin, like.cell, out)


def tight(occupancy: Occupancy, margin: int = 1) -> Occupancy:
    """The same cells on a grid cropped to them, ``margin`` cells around."""
    if not bool(occupancy.grid.any()):
        return occupancy
    low, high = occupancy.span()
    low = (low - margin).clamp_min(0)
    high = torch.minimum(high + margin, torch.tensor(occupancy.grid.shape))
    a, b = low.tolist(), high.tolist()
    grid = occupancy.grid[a[0] : b[0], a[1] : b[1], a[2] : b[2]].contiguous()
    return Occupancy(occupancy.origin + low.to(occupancy.origin.device) * occupancy.cell, occupancy.cell, grid)


@torch.no_grad()
def peak_density(field: RadianceField, occupancy: Occupancy, points: int, generator: torch.Generator) -> Tensor:
    """[count] the largest density over ``points`` stratified points in each occupied cell, in nonzero() order."""
    index = occupancy.grid.nonzero()
    peak = torch.zeros(len(index), device=index.device)
    chunk = max(1, (1 << 17) // points)
    for part in torch.split(torch.arange(len(index), device=index.device), chunk):
        jitter = torch.rand(points, len(part), 3, generator=generator, device=index.device)
        if points == 1:
            jitter = 0.25 + 0.5 * jitter
        x = (occupancy.origin + (index[part] + jitter) * occupancy.cell).reshape(-1, 3)
        sigma = field.density(field.encode(x))
        if not bool(torch.isfinite(sigma).all()):
            raise RequestError("the teacher's density is not a number at some points", hint="its weights are damaged")
        peak[part] = sigma.reshape(points, -1).amax(0)
    return peak


def build_occupancy(
    field: RadianceField,
    box: Box,
    *,
    resolution: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
    device: torch.device | None = None,
    seconds: float = 6.0,
    flops_per_second: float = 5e10,
    space: RaySpace = RaySpace(),  # noqa: B008 (frozen)
) -> Occupancy:
    """Occupied cells of ``field`` in ``box``, ``resolution`` of them along its longest side (64, 128, 256, ...).

    The number of points a cell follows from what the field costs and ``seconds``. Raises RequestError where the box
    holds no density at all.
    """
    progress = progress or Silent()
    device = device or torch.device("cpu")
    generator = torch.Generator(device=device).manual_seed(seed)
    coarse = grid_over(box, min(COARSE, resolution), device)
    support = field.support()
    if support is not None:
        coarse = resample(support, coarse)
    else:
        coarse.grid.fill_(1)
    if space.kind == "contracted":
        low = coarse.origin + coarse.grid.new_ones(coarse.grid.shape).nonzero() * coarse.cell
        coarse.grid &= reachable(low, low + coarse.cell, space).reshape(coarse.grid.shape)

    def affordable(cells: int, low: int, high: int) -> int:
        cost = max(1.0, cells * field.flops_per_point) / flops_per_second
        return int(min(high, max(low, seconds / 2 / cost)))

    points = affordable(coarse.count, 1, 16)
    index = coarse.grid.nonzero()
    peak = peak_density(field, coarse, points, generator)
    keep = 1.0 - torch.exp(-peak * _side(coarse, index, space)) > ALPHA
    progress.note(f"occupancy: {len(index)} coarse cells asked at {points} points, {int(keep.sum())} occupied")
    grid = torch.zeros_like(coarse.grid)
    kept = index[keep]
    grid[kept[:, 0], kept[:, 1], kept[:, 2]] = 1
    if not len(kept):
        raise RequestError(
            "no density anywhere in the scene's box " + f"{box.min} .. {box.max}",
            hint="is the box right? give --bounds x0,y0,z0,x1,y1,z1",
        )
    fine = Occupancy(coarse.origin, coarse.cell, dilate(grid))
    if support is not None:
        fine.grid &= resample(support, fine).grid
    while fine.cell > box.longest / resolution * 1.001:
        fine = split(fine, 2)
        if support is not None:
            within = resample(support, fine)
            fine.grid &= within.grid
        points = affordable(fine.count, 2, 16)
        index = fine.grid.nonzero()
        peak = peak_density(field, fine, points, generator)
        kept = index[1.0 - torch.exp(-peak * _side(fine, index, space)) > ALPHA]
        grid = torch.zeros_like(fine.grid)
        grid[kept[:, 0], kept[:, 1], kept[:, 2]] = 1
        fine = Occupancy(fine.origin, fine.cell, dilate(grid))
        if support is not None:
            fine.grid &= resample(support, fine).grid
    return tight(fine)


def _side(cells: Occupancy, index: Tensor, space: RaySpace) -> Tensor | float:
    """Length of a cell's side, world units: of each cell where space is contracted."""
    if space.kind != "contracted":
        return cells.cell
    return cells.cell * stretch(cells.origin + (index + 0.5) * cells.cell, space)


@dataclasses.dataclass(frozen=True)
class Check:
    """Teacher with occupancy against teacher without: PSNR over ``rays`` rays, and cells that had to be added."""

    psnr: float
    rays: int
    added: int


@torch.no_grad()
def check_occupancy(
    field: RadianceField,
    occupancy: Occupancy,
    box: Box,
    o: Tensor,
    d: Tensor,
    backdrop: tuple[float, float, float],
    *,
    steps: int = 192,
    chunk: int = 1 << 16,
) -> tuple[Occupancy, Check]:
    """Render rays ``o``, ``d`` [R, 3] through the whole box with and without ``occupancy``; mend what it hid.

    Cells whose hidden samples carry a visible weight are added (grown by one cell). Returns the mended grid and the
    PSNR that the grid had *before* mending.
    """
    from pvdconvert.kernels.march import ray_box

    t0, t1 = ray_box(o, d, box)
    live = (t1 > t0).nonzero().squeeze(1)
    o, d, t0, t1 = o[live], d[live], t0[live], t1[live]
    rays = max(1, chunk // steps)
    squared, count, hidden = 0.0, 0, []
    back = torch.tensor(backdrop, device=o.device)
    for part in torch.split(torch.arange(len(live), device=o.device), rays):
        u = (torch.arange(steps, device=o.device) + 0.5) / steps
        dt = ((t1 - t0)[part] / steps)[:, None]
        t = t0[part, None] + (t1 - t0)[part, None] * u
        x = o[part, None] + d[part, None] * t[..., None]
        flat = x.reshape(-1, 3)
        latent = field.encode(flat)
        sigma = field.density(latent).reshape(t.shape)
        inside = occupancy.contains(flat).reshape(t.shape)
        colors = torch.zeros(*t.shape, 3, device=o.device)
        shown = ((1 - torch.exp(-sigma * dt)) > 1e-3).reshape(-1).nonzero().squeeze(1)
        if len(shown):
            dirs = d[part, None].expand(*t.shape, 3).reshape(-1, 3)[shown]
            colors.view(-1, 3)[shown] = field.color(latent[shown], dirs[:, None])[:, 0]
        images = []
        for density in (sigma, torch.where(inside, sigma, 0.0)):
            tau = density * dt
            through = torch.exp(-torch.cumsum(tau, 1))
            weight = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], 1) * (1 - torch.exp(-tau))
            images.append((weight[..., None] * colors).sum(1) + through[:, -1:] * back)
            if density is sigma:
                lost = (weight > 0.02) & ~inside
        # A lost sample only matters where the pixel changes: fog of the background's own colour does not.
        change = (images[0] - images[1]).abs().amax(1)
        squared += float((images[0] - images[1]).square().sum())
        count += images[0].numel()
        hidden.append(x[lost & (change > 0.01)[:, None]])
    mse = squared / max(1, count)
    psnr = 99.0 if mse <= 1e-10 else -10.0 * math.log10(mse)
    points = torch.cat(hidden) if hidden else o[:0]
    result, added = occupancy, 0
    if len(points):
        whole = grid_over(box, max(1, round(box.longest / occupancy.cell)), o.device)
        union = resample(occupancy, whole) if not _aligned(occupancy, whole) else _pasted(occupancy, whole)
        before = union.count
        i = union.index(points)
        inside_box = ((i >= 0) & (i < torch.tensor(union.grid.shape, device=i.device))).all(-1)
        i = i[inside_box]
        extra = torch.zeros_like(union.grid)
        extra[i[:, 0], i[:, 1], i[:, 2]] = 1
        union.grid |= dilate(extra)
        added = union.count - before
        result = tight(union)
    return result, Check(psnr, len(live), added)


def _aligned(a: Occupancy, b: Occupancy) -> bool:
    offset = (a.origin - b.origin) / b.cell
    return abs(a.cell - b.cell) < 1e-6 * b.cell and bool(((offset - offset.round()).abs() < 1e-3).all())


def _pasted(a: Occupancy, whole: Occupancy) -> Occupancy:
    x, y, z = (int(v) for v in ((a.origin - whole.origin) / whole.cell).round().long())
    grid = torch.zeros_like(whole.grid)
    nx, ny, nz = (min(n, m - s) for n, m, s in zip(a.grid.shape, whole.grid.shape, (x, y, z)))
    grid[x : x + nx, y : y + ny, z : z + nz] = a.grid[:nx, :ny, :nz]
    return Occupancy(whole.origin, whole.cell, grid)
