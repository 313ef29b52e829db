"""Where on a ray samples lie: one lattice a ray, kept only in occupied cells."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from pvdconvert.kernels.backend import twin
from pvdconvert.kernels.operators import define
from pvdconvert.scene import Box

_DENSE = 1 << 21  # lattice points that the truth looks at in one go


class Cells(Protocol):
    """What marching needs of an occupancy grid (:class:`pvdconvert.render.occupancy.Occupancy`)."""

    @property
    def origin(self) -> Tensor: ...
    @property
    def cell(self) -> float: ...
    @property
    def grid(self) -> Tensor: ...


def ray_box(o: Tensor, d: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """The part ``t0 <= t <= t1`` [R] of the rays ``o + t d`` [R, 3] in ``box``, ``t0 >= 0``; a miss has t0 = t1 = 0.

    ``d`` may have any length and zero components (the ray then lies inside or outside of that slab for all t).
    """
    low = torch.tensor(box.min, dtype=o.dtype, device=o.device)
    high = torch.tensor(box.max, dtype=o.dtype, device=o.device)
    flat = d == 0
    safe = torch.where(flat, torch.ones_like(d), d)
    a, b = (low - o) / safe, (high - o) / safe
    inf = torch.full_like(a, torch.inf)
    within = (o >= low) & (o <= high)
    near = torch.where(flat, torch.where(within, -inf, inf), torch.minimum(a, b))
    far = torch.where(flat, torch.where(within, inf, -inf), torch.maximum(a, b))
    t0, t1 = near.amax(-1).clamp(min=0), far.amin(-1)
    hit = (t1 > t0) & torch.isfinite(t0) & torch.isfinite(t1)
    return torch.where(hit, t0, 0), torch.where(hit, t1, 0)


def march(
    o: Tensor, d: Tensor, t0: Tensor, t1: Tensor, occ: Cells, step: float, jitter: Tensor | float = 0.5
) -> tuple[Tensor, Tensor]:
    """Samples of every ray in occupied cells.

    Ray r has the lattice ``t = t0 + (k + jitter) * step``, k = 0, 1, ... with ``t < t1``; of it, those samples are kept
    whose point ``o + t d`` lies in an occupied cell of ``occ``. A sample stands for the interval of length
    ``step`` that begins at ``t - jitter * step``: with jitter 0.5 it is the midpoint.

    o, d [R, 3], t0, t1 [R] (finite), jitter [R] in [0, 1) or one number -> offsets [R+1] int64 and t [S]: ray r owns
    ``t[offsets[r]:offsets[r+1]]``, ascending. Not differentiable.
    """
    if not step > 0:
        raise ValueError(f"step must be positive, got {step}")
    if not (torch.isfinite(t0) & torch.isfinite(t1)).all():
        raise ValueError("t0 and t1 must be finite: clip rays with ray_box first")
    phase = jitter if isinstance(jitter, Tensor) else torch.full_like(t0, jitter)
    tensors = [v.detach() for v in (o, d, t0, t1, phase, occ.origin, occ.grid)]
    offsets, t = _march(*tensors, float(occ.cell), float(step))
    return offsets, t


@dataclasses.dataclass(frozen=True)
class _Grid:
    origin: Tensor
    cell: float
    grid: Tensor


def _run(
    o: Tensor, d: Tensor, t0: Tensor, t1: Tensor, phase: Tensor, origin: Tensor, grid: Tensor, cell: float, step: float
) -> tuple[Tensor, Tensor]:
    which = twin(o, d, t0, t1, phase, origin, grid)
    occ = _Grid(origin, cell, grid)
    if which == "numba":
        from pvdconvert.kernels.march_numba import march_numba

        return march_numba(o, d, t0, t1, occ, step, phase)
    if which == "triton":
        from pvdconvert.kernels.march_triton import march_triton

        return march_triton(o, d, t0, t1, occ, step, phase)
    return march_torch(o, d, t0, t1, occ, step, phase)


def _fake(o: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    samples = torch.library.get_ctx().new_dynamic_size()
    return o.new_empty(o.shape[0] + 1, dtype=torch.int64), o.new_empty(samples)


_march = define(
    "march(Tensor o, Tensor d, Tensor t0, Tensor t1, Tensor phase, Tensor origin, Tensor grid, float cell, float step)"
    " -> (Tensor, Tensor)",
    _run,
    _fake,
)


@torch.no_grad()
def march_torch(
    o: Tensor, d: Tensor, t0: Tensor, t1: Tensor, occ: Cells, step: float, jitter: Tensor
) -> tuple[Tensor, Tensor]:
    """The truth of :func:`march`: looks at every lattice point, in chunks of rays."""
    rays = o.shape[0]
    counts = torch.zeros(rays, dtype=torch.int64, device=o.device)
    kept: list[Tensor] = []
    if rays:
        shape = torch.tensor(occ.grid.shape, device=o.device)
        scale = torch.tensor(1.0 / occ.cell, dtype=o.dtype, device=o.device)
        a, b = (o - occ.origin.to(o)) * scale, d * scale  # in cells
        most = int(torch.ceil((t1 - t0).amax().double() / step).clamp(min=0).item()) + 1
        rows = max(1, _DENSE // most)
        lattice = torch.arange(most, dtype=o.dtype, device=o.device)
        for n in range(0, rays, rows):
            s = slice(n, n + rows)
            t = (lattice + jitter[s, None]) * step + t0[s, None]  # [r, K]
            i = torch.floor(a[s, None] + t[..., None] * b[s, None]).long()
            inside = ((i >= 0) & (i < shape)).all(-1)
            i = torch.where(inside[..., None], i, 0)
            keep = inside & (t < t1[s, None]) & (occ.grid[i[..., 0], i[..., 1], i[..., 2]] > 0)
            counts[s] = keep.sum(1)
            kept.append(t[keep])
    offsets = torch.zeros(rays + 1, dtype=torch.int64, device=o.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets, torch.cat(kept) if kept else t0.new_zeros(0)
