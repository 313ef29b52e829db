"""The bookkeeping of a ray tracer that asks a field front to back: take the next samples, weigh the answers."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pvdconvert.kernels.backend import use_numba
from pvdconvert.kernels.composite import OPAQUE


@dataclasses.dataclass
class Wave:
    """R rays under way over their marched samples; :func:`take` and :func:`weigh` change it in place.

    o, d [R, 3]       the ray ``o + t d``             t [S]        samples of all rays, those of a ray in order
    cursor [R]        int64: next sample              end [R]      int64: one past the last
    left [R]          transmittance so far            depth [R]    sum of weight * t so far
    opacity [R]       sum of weights so far           colored [R]  how much of it has a colour
    """

    o: Tensor
    d: Tensor
    t: Tensor
    cursor: Tensor
    end: Tensor
    left: Tensor
    opacity: Tensor
    colored: Tensor
    depth: Tensor

    @classmethod
    def start(cls, o: Tensor, d: Tensor, t: Tensor, offsets: Tensor) -> Wave:
        """All rays before their first sample; ray r owns ``t[offsets[r]:offsets[r+1]]``."""
        zero = torch.zeros_like(o[:, 0])
        rest = (zero + 1, zero.clone(), zero.clone(), zero.clone())
        return cls(o.contiguous(), d.contiguous(), t, offsets[:-1].clone(), offsets[1:].clone(), *rest)

    def _on_numba(self) -> bool:
        return use_numba(self.o, self.d, self.t, self.cursor)


@dataclasses.dataclass
class Weighed:
    """What samples weigh. n samples, C of them want a colour.

    weight [n]; reached [n] bool: the transmittance before the sample had not fallen below ``stop``; pick [C] int64: the
    samples to colour; mass [C]: the weight that each of these colours stands for; pick_offsets [L+1]: as ``offsets``.
    """

    weight: Tensor
    reached: Tensor
    pick: Tensor
    mass: Tensor
    pick_offsets: Tensor


def take(wave: Wave, rays: Tensor, ahead: int) -> tuple[Tensor, Tensor, Tensor]:
    """The next samples of ``rays`` [L] (int64, distinct), at most ``ahead`` each, and move their cursors on.

    -> offsets [L+1] int64, index [n] int64 into ``wave.t``, positions [n, 3].
    """
    if wave._on_numba():
        from pvdconvert.kernels.wavefront_numba import take_numba

        return take_numba(wave, rays, ahead)
    return take_torch(wave, rays, ahead)


def take_torch(wave: Wave, rays: Tensor, ahead: int) -> tuple[Tensor, Tensor, Tensor]:
    """The truth of :func:`take`."""
    first = wave.cursor[rays]
    counts = (wave.end[rays] - first).clamp(max=ahead)
    offsets = _offsets(counts)
    row = torch.repeat_interleave(torch.arange(rays.shape[0], device=rays.device), counts)
    index = first[row] + torch.arange(row.shape[0], device=rays.device) - offsets[row]
    ray = rays[row]
    wave.cursor[rays] = first + counts
    return offsets, index, wave.o[ray] + wave.t[index, None] * wave.d[ray]


def weigh(
    wave: Wave, rays: Tensor, offsets: Tensor, index: Tensor, sigma: Tensor, step: float, stop: float, threshold: float
) -> Weighed:
    """Composite densities ``sigma`` [n] of samples that :func:`take` gave, and choose those that need a colour.

    Samples behind transmittance < ``stop`` weigh 0. A sample is coloured where the ray's running sum of weights passes
    a multiple of ``threshold``, and then stands for all the weight since the last: every sample that weighs more is
    coloured, and of a thin fog one in a while (threshold 0: every sample that weighs anything). NaN stays on its ray.
    """
    if wave._on_numba() and use_numba(sigma):
        from pvdconvert.kernels.wavefront_numba import weigh_numba

        return weigh_numba(wave, rays, offsets, index, sigma, step, stop, threshold)
    return weigh_torch(wave, rays, offsets, index, sigma, step, stop, threshold)


def weigh_torch(
    wave: Wave, rays: Tensor, offsets: Tensor, index: Tensor, sigma: Tensor, step: float, stop: float, threshold: float
) -> Weighed:
    """The truth of :func:`weigh`: rays as padded rows [L, K]."""
    counts = offsets[1:] - offsets[:-1]
    most = int(counts.max()) if counts.numel() else 0
    valid = torch.arange(most, device=rays.device) < counts[:, None]
    tau, t = wave.t.new_zeros(valid.shape), wave.t.new_zeros(valid.shape)
    tau[valid] = (sigma.to(tau.dtype) * step).clamp(max=OPAQUE)
    t[valid] = wave.t[index]
    before = torch.cat([torch.zeros_like(tau[:, :1]), tau[:, :-1]], 1).cumsum(1)
    transmittance = wave.left[rays, None] * torch.exp(-before)
    reached = valid & (transmittance >= stop)
    tau = torch.where(reached, tau, 0)
    weight = torch.where(reached, transmittance * -torch.expm1(-tau), 0)
    total = wave.opacity[rays, None] + weight.cumsum(1)
    first = torch.cat([wave.opacity[rays, None], total[:, :-1]], 1)
    if threshold > 0:
        ask = torch.floor(total / threshold) > torch.floor(first / threshold)
    else:
        ask = weight > 0
    done = torch.where(ask, total, wave.colored[rays, None]).cummax(1).values
    since = torch.cat([wave.colored[rays, None], done[:, :-1]], 1)
    if most:
        wave.left[rays] *= torch.exp(-tau.sum(1))
        wave.opacity[rays] = total[:, -1]
        wave.colored[rays] = done[:, -1]
        wave.depth[rays] += (weight * t).sum(1)
    pick = ask[valid].nonzero().squeeze(1)
    return Weighed(weight[valid], reached[valid], pick, (done - since)[ask], _offsets(ask.sum(1)))


def _offsets(counts: Tensor) -> Tensor:
    offsets = torch.zeros(counts.shape[0] + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets
