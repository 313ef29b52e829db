"""Unbounded scenes: all of space mapped into a ball or a cube of radius 2, and rays that bend in it.

mip-NeRF 360 (Barron et al. 2022, equation 10): within the unit ball nothing moves; beyond, ``u -> (2 - 1/|u|) u/|u|``.
nerfstudio takes the largest coordinate for |u|, so that all of space is a cube. Fields of such a scene are asked at
contracted positions (as those of NDC at warped ones); lengths, steps of compositing and depths stay the world's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pvdconvert.kernels.march import Cells
from pvdconvert.scene import RaySpace

REACH = 2.0
"""Radius of all of space, contracted."""

_MOST = 4096  # steps of a ray: what a lattice that never ends would otherwise take
_NUDGE = 1e-3


def norm(u: Tensor, space: RaySpace) -> Tensor:
    """|u| [..., 1] of ``u`` [..., 3] by the norm that ``space`` contracts with."""
    return u.norm(dim=-1, keepdim=True) if space.norm == "l2" else u.abs().amax(-1, keepdim=True)


def contract(x: Tensor, space: RaySpace) -> Tensor:
    """World positions [..., 3] -> contracted ones, within :data:`REACH`."""
    u = (x - x.new_tensor(space.center)) / space.radius
    m = norm(u, space).clamp_min(1.0)
    return u * ((2.0 - 1.0 / m) / m)


def stretch(x: Tensor, space: RaySpace) -> Tensor:
    """World length of a unit of contracted length along the radius, at contracted positions ``x`` [N, 3] -> [N]."""
    m = norm(x, space)[:, 0].clamp(1.0, REACH - 1e-3)
    return space.radius / (REACH - m).square().clamp_max(1.0)


def reachable(low: Tensor, high: Tensor, space: RaySpace) -> Tensor:
    """Whether boxes between ``low`` and ``high`` [N, 3] hold contracted positions of anything -> bool [N]."""
    nearest = torch.maximum(torch.maximum(low, -high), torch.zeros_like(low))
    return norm(nearest, space)[:, 0] < REACH


def march(
    o: Tensor, d: Tensor, cells: Cells, step: float, phase: Tensor, space: RaySpace, near: float, far: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of rays ``o + t d`` [R, 3] (world, unit) in occupied cells, about ``step`` apart in contracted space.

    Each ray is cut into intervals of that contracted length, from ``near`` to ``far`` or to where less than a step is
    left of space; a sample lies at ``phase`` [R] of its interval and stands for its length in the world.
    -> offsets [R+1] int64, t [S] and dt [S], world units.
    """
    rays = o.shape[0]
    t = torch.full_like(o[:, 0], near)
    shape = torch.tensor(cells.grid.shape, device=o.device)
    live = torch.arange(rays, device=o.device)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(_MOST):
        if not len(live):
            break
        p, along, now = o[live], d[live], t[live]
        x = p + now[:, None] * along
        far_out = norm((x - x.new_tensor(space.center)) / space.radius, space).clamp_min(1.0)
        nudge = _NUDGE * space.radius * far_out
        speed = (contract(x + nudge * along, space) - contract(x, space)).norm(dim=-1) / nudge[:, 0]
        # Never more than doubling the distance in one interval: where a ray starts to bend it is still followed.
        dt = torch.minimum(step / speed.clamp_min(1e-12), far_out[:, 0] * space.radius).clamp_max(far)
        at = now + phase[live] * dt
        i = torch.floor((contract(p + at[:, None] * along, space) - cells.origin) / cells.cell).long()
        inside = ((i >= 0) & (i < shape)).all(-1) & (at < far)
        i = torch.where(inside[:, None], i, 0)
        inside &= cells.grid[i[:, 0], i[:, 1], i[:, 2]] > 0
        kept.append((live[inside], at[inside], dt[inside]))
        t[live] = now + dt
        live = live[(now + dt < far) & (far_out[:, 0] * step < 1.0)]  # 1 / |u| is what is left of space
    if not kept:
        return torch.zeros(rays + 1, dtype=torch.int64, device=o.device), o.new_zeros(0), o.new_zeros(0)
    ray, at, dt = (torch.cat(column) for column in zip(*kept, strict=True))
    order = torch.argsort(ray, stable=True)  # a ray's samples were found front to back
    offsets = torch.zeros(rays + 1, dtype=torch.int64, device=o.device)
    torch.cumsum(torch.bincount(ray, minlength=rays), 0, out=offsets[1:])
    return offsets, at[order], dt[order]
