"""The ray tracer: march, ask the field front to back, composite. Inference only.

Teachers can be slow (about 1 MFLOP a point), so the field is asked in wavefronts: a few samples of every live ray at a
time, rays leave as soon as they are opaque, and colour is asked only where it shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import RadianceField
from pvdconvert.kernels.composite import ray_sum
from pvdconvert.kernels.march import march, ray_box
from pvdconvert.kernels.wavefront import Wave, Weighed, take, weigh
from pvdconvert.render import contracted
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, RaySpace

CANDIDATES = 1 << 24
"""Bound on marched samples held at once: about 30 bytes each."""

_BENT = 1 << 14  # rays of a contracted scene that are marched at a time
_SLOW = 1e5  # FLOP a point from which an evaluation that turns out needless costs more than a round of bookkeeping


@dataclasses.dataclass
class Trace:
    """Samples that a field was asked for along rays, and the pixels they make. R rays, S samples.

    A ray keeps its samples up to the first before which its transmittance was below ``stop``.

    offsets [R+1]  int64: ray r owns samples offsets[r]:offsets[r+1]      x [S,3]  position handed to the field
    t [S]          distance along the ray (NDC: along the warped ray)     dt [S]   length the sample stands for
    sigma [S]      density                                                weight [S] compositing weight
    rgb [S,3]      colour; 0 where not asked                              colored [S] bool: colour was asked
    d [R,3]        unit directions in which colour was asked (NDC: those of the world ray)
    ray_rgb [R,3]  composited over the backdrop    ray_opacity [R] sum of weights    ray_depth [R] sum of weight * t
    """

    offsets: Tensor
    t: Tensor
    dt: Tensor
    x: Tensor
    d: Tensor
    sigma: Tensor
    weight: Tensor
    rgb: Tensor
    colored: Tensor
    ray_rgb: Tensor
    ray_opacity: Tensor
    ray_depth: Tensor


def ndc_rays(o: Tensor, d: Tensor, ray_space: RaySpace) -> tuple[Tensor, Tensor]:
    """Rays [R, 3] of the world -> o', d' [R, 3] in normalised device coordinates (layouts section 9.2).

    o' lies on the near plane (z' = -1) and o' + d' at infinity (z' = 1), so t' in [0, 1] is the whole view; d' is not
    unit. Needs width, height, focal, near of ``ray_space`` (InputError otherwise) and d.z < 0.
    """
    w, h, f, n = ray_space.width, ray_space.height, ray_space.focal, ray_space.near
    if w is None or h is None or f is None or n is None:
        raise InputError(
            "ray space 'ndc' needs width, height, focal and near",
            hint="--extra width=504 --extra height=378 --extra focal=407.5, all in pixels",
        )
    t = -(n + o[:, 2]) / d[:, 2]
    p = o + t[:, None] * d
    x, y, z = p.unbind(-1)
    ax, ay = -2.0 * f / w, -2.0 * f / h
    origin = torch.stack([ax * x / z, ay * y / z, 1.0 + 2.0 * n / z], -1)
    direction = torch.stack([ax * (d[:, 0] / d[:, 2] - x / z), ay * (d[:, 1] / d[:, 2] - y / z), -2.0 * n / z], -1)
    return origin, direction


def default_step(occupancy: Occupancy) -> float:
    """Half a cell, so that a cell that a ray crosses is seldom left without a sample."""
    return 0.5 * occupancy.cell


def trace(
    field: RadianceField,
    o: Tensor,
    d: Tensor,
    occupancy: Occupancy,
    *,
    step: float,
    near: float | None = None,
    far: float | None = None,
    backdrop: Sequence[float],
    stop: float = 1e-3,
    color_threshold: float = 1e-4,
    jitter: Tensor | None = None,
    ray_space: RaySpace = RaySpace(),  # noqa: B008 (frozen)
    chunk_points: int = 1 << 16,
    candidates: int = CANDIDATES,
) -> Trace:
    """Render rays ``o``, ``d`` [R, 3] (unit, world) and keep every sample that mattered.

    step             world units (NDC: units of the warped space, in which density is per unit length)
    near, far        distances along the ray (NDC: fractions t' in [0, 1] of the warped ray); None = the grid clips
    backdrop         rgb composited behind
    stop             a ray ends where its transmittance falls below: a pixel errs by at most this
    color_threshold  colour is asked where the running sum of weights passes a multiple of this, and stands for all of
                     the weight since the last: for every sample above the threshold, now and then in a thin fog
    jitter [R]       phase of the lattice of each ray in [0, 1); None = 0.5, midpoints
    chunk_points     most points handed to the field in one call
    candidates       bound on marched samples held at once
    """
    tracer = _Tracer(
        field,
        occupancy,
        step,
        near,
        far,
        backdrop,
        stop,
        color_threshold,
        chunk_points,
        keep=True,
        candidates=candidates,
    )
    parts = list(tracer.run(o, d, jitter, ray_space))
    offsets = torch.zeros(o.shape[0] + 1, dtype=torch.int64, device=o.device)
    torch.cumsum(torch.cat([p.counts for p in parts]), 0, out=offsets[1:])
    t = torch.cat([p.t for p in parts])
    return Trace(
        offsets=offsets,
        t=t,
        dt=torch.cat([p.dt for p in parts]),
        x=torch.cat([p.x for p in parts]),
        d=d,
        sigma=torch.cat([p.sigma for p in parts]),
        weight=torch.cat([p.weight for p in parts]),
        rgb=torch.cat([p.rgb for p in parts]),
        colored=torch.cat([p.colored for p in parts]),
        ray_rgb=torch.cat([p.ray_rgb for p in parts]),
        ray_opacity=torch.cat([p.ray_opacity for p in parts]),
        ray_depth=torch.cat([p.ray_depth for p in parts]),
    )


def render_rays(
    field: RadianceField,
    o: Tensor,
    d: Tensor,
    occupancy: Occupancy,
    *,
    step: float,
    near: float | None = None,
    far: float | None = None,
    backdrop: Sequence[float],
    stop: float = 1e-3,
    color_threshold: float = 1e-4,
    jitter: Tensor | None = None,
    ray_space: RaySpace = RaySpace(),  # noqa: B008 (frozen)
    chunk_points: int = 1 << 16,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`trace`, without keeping samples: rgb [R, 3], opacity [R], depth [R] (sum of weight * t)."""
    tracer = _Tracer(field, occupancy, step, near, far, backdrop, stop, color_threshold, chunk_points, keep=False)
    parts = list(tracer.run(o, d, jitter, ray_space))
    return (
        torch.cat([p.ray_rgb for p in parts]),
        torch.cat([p.ray_opacity for p in parts]),
        torch.cat([p.ray_depth for p in parts]),
    )


@dataclasses.dataclass
class _Part:
    """The answer for some consecutive rays; the per-sample entries are empty where they are not kept."""

    ray_rgb: Tensor
    ray_opacity: Tensor
    ray_depth: Tensor
    counts: Tensor
    t: Tensor
    dt: Tensor
    x: Tensor
    sigma: Tensor
    weight: Tensor
    rgb: Tensor
    colored: Tensor


@dataclasses.dataclass
class _Tracer:
    """The arguments of :func:`trace`, and how they are carried out."""

    field: RadianceField
    occupancy: Occupancy
    step: float
    near: float | None
    far: float | None
    backdrop: Sequence[float]
    stop: float
    threshold: float
    chunk_points: int
    keep: bool
    candidates: int = CANDIDATES

    @torch.no_grad()
    def run(self, o: Tensor, d: Tensor, jitter: Tensor | None, ray_space: RaySpace) -> Iterator[_Part]:
        view = d
        near, far = 0.0 if self.near is None else self.near, torch.inf if self.far is None else self.far
        scale = torch.ones_like(o[:, 0])
        phase = torch.full_like(scale, 0.5) if jitter is None else jitter.to(scale)
        if ray_space.kind == "contracted":
            for part in torch.split(torch.arange(len(o), device=o.device), _BENT):
                args = (self.occupancy, self.step, phase[part], ray_space, near, far)
                offsets, t, dt = contracted.march(o[part], d[part], *args)
                yield self._part(o[part], d[part], view[part], offsets, t, dt, ray_space)
            return
        if ray_space.kind == "ndc":
            # Measured along the warped ray: density times this length is what the source programs composite.
            o, d = ndc_rays(o, d, ray_space)
            scale = d.norm(dim=-1)
            d = d / scale[:, None]
            far = min(far, 1.0)
        t0, t1 = ray_box(o, d, _grid_box(self.occupancy))
        t0 = torch.maximum(t0, near * scale)
        t1 = torch.minimum(t1, far * scale)
        t1 = torch.maximum(t0, t1)
        bound = ((t1 - t0) / self.step).double().cumsum(0)
        group = torch.div(bound, self.candidates, rounding_mode="floor").long()
        for size in torch.unique_consecutive(group, return_counts=True)[1].tolist() or [0]:
            offsets, t = march(o[:size], d[:size], t0[:size], t1[:size], self.occupancy, self.step, phase[:size])
            yield self._part(o[:size], d[:size], view[:size], offsets, t)
            o, d, view, t0, t1, phase = o[size:], d[size:], view[size:], t0[size:], t1[size:], phase[size:]

    def _part(
        self,
        o: Tensor,
        d: Tensor,
        view: Tensor,
        offsets: Tensor,
        t: Tensor,
        dt: Tensor | None = None,
        bent: RaySpace | None = None,
    ) -> _Part:
        """Samples ``t`` of some rays. ``dt``: their lengths where they differ; ``bent``: how space is contracted."""
        wave = Wave.start(o, d, t, offsets)
        rgb = torch.zeros_like(o)
        log = _Log(t.shape[0] if self.keep else 0, t)
        low, high = (16, 64) if self.field.flops_per_point < _SLOW else (4, 16)
        live = (wave.cursor < wave.end).nonzero().squeeze(1)
        while live.numel():
            ahead = min(high, max(low, self.chunk_points // live.numel()), self.chunk_points)
            for rays in torch.split(live, max(1, self.chunk_points // ahead)):
                self._ask(wave, rays, ahead, view, rgb, log, dt, bent)
            live = live[(wave.left[live] >= self.stop) & (wave.cursor[live] < wave.end[live])]
        backdrop = torch.tensor([float(v) for v in self.backdrop], dtype=rgb.dtype, device=rgb.device)
        rgb += (1 - wave.colored)[:, None] * backdrop
        keep, sigma, weight, color, colored = log.read()
        place = torch.searchsorted(keep, offsets)
        counts = place[1:] - place[:-1]
        ray = torch.repeat_interleave(torch.arange(o.shape[0], device=o.device), counts)
        t = t[keep]
        dt = torch.full_like(t, self.step) if dt is None else dt[keep]
        x = o[ray] + t[:, None] * d[ray]
        x = x if bent is None else contracted.contract(x, bent)
        return _Part(rgb, wave.opacity, wave.depth, counts, t, dt, x, sigma, weight, color, colored)

    def _ask(
        self,
        wave: Wave,
        rays: Tensor,
        ahead: int,
        view: Tensor,
        rgb: Tensor,
        log: _Log,
        dt: Tensor | None,
        bent: RaySpace | None,
    ) -> None:
        """Ask the field for the next ``ahead`` samples of ``rays``, and colour what shows."""
        offsets, index, x = take(wave, rays, ahead)
        x = x if bent is None else contracted.contract(x, bent)
        latent = self.field.encode(x)
        sigma = self.field.density(latent).to(x.dtype)
        if torch.isnan(sigma).any():
            raise RequestError(
                "the field answers NaN for density", hint="pvdconvert inspect FILE shows which weights are NaN"
            )
        # Compositing knows one length; where they differ, density carries the ratio.
        thick = sigma if dt is None else sigma * (dt[index] / self.step)
        found = weigh(wave, rays, offsets, index, thick, self.step, self.stop, self.threshold)
        color = x.new_zeros((0, 3))
        if found.pick.numel():
            ray = torch.repeat_interleave(rays, found.pick_offsets[1:] - found.pick_offsets[:-1])
            color = self.field.color(latent[found.pick], view[ray, None])[:, 0].to(x.dtype)
            rgb[rays] += ray_sum(found.mass[:, None] * color, found.pick_offsets)
        if self.keep:
            log.write(index, sigma, found, color)


class _Log:
    """What was asked of S marched samples, in the order of the samples."""

    def __init__(self, samples: int, like: Tensor) -> None:
        self.sigma, self.weight = like.new_zeros(samples), like.new_zeros(samples)
        self.kept = torch.zeros(samples, dtype=torch.bool, device=like.device)
        self.asked: list[Tensor] = []
        self.answers: list[Tensor] = []

    def write(self, index: Tensor, sigma: Tensor, found: Weighed, color: Tensor) -> None:
        self.sigma[index] = sigma
        self.weight[index] = found.weight
        self.kept[index] = found.reached
        self.asked.append(index[found.pick])
        self.answers.append(color)

    def read(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of the samples that were reached: place among all [K], sigma, weight, rgb [K, 3], colored."""
        keep = self.kept.nonzero().squeeze(1)
        color, colored = self.sigma.new_zeros((keep.shape[0], 3)), torch.zeros_like(self.kept[keep])
        if self.asked:
            at = torch.searchsorted(keep, torch.cat(self.asked))
            color[at] = torch.cat(self.answers)
            colored[at] = True
        return keep, self.sigma[keep], self.weight[keep], color, colored


def _grid_box(occupancy: Occupancy) -> Box:
    low = [float(v) for v in occupancy.origin.tolist()]
    size = [n * occupancy.cell for n in occupancy.shape]
    return Box((low[0], low[1], low[2]), (low[0] + size[0], low[1] + size[1], low[2] + size[2]))
