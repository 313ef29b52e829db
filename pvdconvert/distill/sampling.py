"""Where on a ray samples lie while training: cells that may be occupied, or the original pipeline's two passes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pvdconvert.kernels.march import march, ray_box
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.render.trace import ndc_rays
from pvdconvert.scene import Box, Scene

REACHED = 1e-3
"""Transmittance below which what follows on a ray changes nothing."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """S samples on R rays, front to back: x [S, 3], dt [S], ray [S] int64; ray r owns offsets[r]:offsets[r + 1]."""

    x: Tensor
    dt: Tensor
    offsets: Tensor
    ray: Tensor

    def __len__(self) -> int:
        return int(self.x.shape[0])

    def kept(self, keep: Tensor) -> Samples:
        """Those of them where ``keep`` [S] is true."""
        counts = torch.zeros(len(self.offsets) - 1, dtype=torch.int64, device=self.x.device)
        counts.index_add_(0, self.ray[keep], torch.ones_like(self.ray[keep]))
        offsets = torch.zeros_like(self.offsets)
        torch.cumsum(counts, 0, out=offsets[1:])
        return Samples(self.x[keep], self.dt[keep], offsets, self.ray[keep])


@dataclasses.dataclass(frozen=True)
class Segments:
    """The parts of rays in which samples may lie: ``o + t d`` for t0 <= t <= t1, with unit d (NDC: warped rays)."""

    o: Tensor
    d: Tensor
    t0: Tensor
    t1: Tensor

    def shares(self, samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
        """Of samples on these rays: their middles and lengths [S] as shares of the ray's part, and their offsets."""
        whole = (self.t1 - self.t0)[samples.ray]
        t = ((samples.x - self.o[samples.ray]) * self.d[samples.ray]).sum(1) - self.t0[samples.ray]
        return t / whole, samples.dt / whole, samples.offsets


def segments(o: Tensor, d: Tensor, scene: Scene, box: Box) -> Segments:
    """Rays of the world [R, 3] clipped to ``box`` and to the scene's near and far, warped where the scene is."""
    near, far = scene.near or 0.0, torch.inf if scene.far is None else scene.far
    scale = torch.ones_like(o[:, 0])
    if scene.ray_space.kind == "ndc":
        o, d = ndc_rays(o, d, scene.ray_space)
        scale = d.norm(dim=-1)
        d = d / scale[:, None]
        far = min(far, 1.0)
    t0, t1 = ray_box(o, d, box)
    t0 = torch.maximum(t0, near * scale)
    return Segments(o, d, t0, torch.maximum(t0, torch.minimum(t1, far * scale)))


def in_cells(rays: Segments, occupancy: Occupancy, step: float, jitter: Tensor) -> Samples:
    """One lattice a ray, shifted by ``jitter`` [R], kept in occupied cells."""
    offsets, t = march(rays.o, rays.d, rays.t0, rays.t1, occupancy, step, jitter)
    ray = torch.repeat_interleave(torch.arange(len(rays.o), device=t.device), offsets[1:] - offsets[:-1])
    x = rays.o[ray] + t[:, None] * rays.d[ray]
    return Samples(x, torch.full_like(t, step), offsets, ray)


def _packed(rays: Segments, t: Tensor, ends: Tensor) -> Samples:
    """t [R, N] ascending -> samples, each standing for the way to the next; the last ends at ``ends`` [R]."""
    count, n = t.shape
    dt = torch.diff(t, dim=1, append=torch.maximum(ends, t[:, -1])[:, None])
    x = rays.o[:, None] + t[..., None] * rays.d[:, None]
    offsets = torch.arange(count + 1, device=t.device) * n
    ray = torch.repeat_interleave(torch.arange(count, device=t.device), n)
    return Samples(x.reshape(-1, 3), dt.reshape(-1), offsets, ray)


def stratified(rays: Segments, u: Tensor) -> tuple[Samples, Tensor]:
    """One sample at random (``u`` [R, N] in [0, 1)) in each of N equal parts of the ray; also their t [R, N]."""
    n = u.shape[1]
    share = (torch.arange(n, device=u.device) + u) / n
    t = rays.t0[:, None] + (rays.t1 - rays.t0)[:, None] * share
    return _packed(rays, t, rays.t1), t


def importance(rays: Segments, t: Tensor, weight: Tensor, u: Tensor) -> Samples:
    """Samples at ``t`` [R, N] and M more, drawn by ``weight`` [R, N] (Mildenhall et al. 2020, section 5.2).

    The distribution is constant between the midpoints of ``t``; ``u`` [R, M] in [0, 1).
    """
    middle = 0.5 * (t[:, 1:] + t[:, :-1])
    pdf = weight[:, 1:-1] + 1e-5
    cdf = torch.cumsum(pdf / pdf.sum(1, keepdim=True), 1)
    cdf = torch.cat([torch.zeros_like(cdf[:, :1]), cdf], 1)
    above = torch.searchsorted(cdf, u.contiguous(), right=True).clamp(1, cdf.shape[1] - 1)
    low, high = torch.gather(cdf, 1, above - 1), torch.gather(cdf, 1, above)
    a, b = torch.gather(middle, 1, above - 1), torch.gather(middle, 1, above)
    share = (u - low) / torch.where(high - low < 1e-5, 1.0, high - low)
    every = torch.cat([t, a + share.clamp(0, 1) * (b - a)], 1).sort(1).values
    return _packed(rays, every, rays.t1)


def reached(samples: Samples, weight: Tensor) -> Tensor:
    """[S] bool: whether any light passes a sample, given the compositing weights [S] of all."""
    total = torch.cumsum(weight.double(), 0)
    before = total - weight
    start = torch.cat([total.new_zeros(1), total])[samples.offsets[:-1]]
    return 1.0 - (before - start[samples.ray]) > REACHED
