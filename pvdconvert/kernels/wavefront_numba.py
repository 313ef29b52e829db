"""numba twin of :mod:`pvdconvert.kernels.wavefront`: one pass over each ray, parallel over rays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from torch import Tensor

from pvdconvert.kernels.composite_numba import GRAIN, alpha
from pvdconvert.kernels.cpu import share

if TYPE_CHECKING:
    from pvdconvert.kernels.wavefront import Wave, Weighed


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _take(
    begin: int, stop: int, o: Any, d: Any, t: Any, cursor: Any, rays: Any, offsets: Any, index: Any, x: Any
) -> None:
    for j in range(begin, stop):
        r = rays[j]
        k = cursor[r]
        for n in range(offsets[j], offsets[j + 1]):
            index[n] = k
            for axis in range(3):
                x[n, axis] = o[r, axis] + t[k] * d[r, axis]
            k += 1
        cursor[r] = k


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _weigh(
    begin: int,
    stop: int,
    t: Any,
    left: Any,
    opacity: Any,
    colored: Any,
    depth: Any,
    rays: Any,
    offsets: Any,
    index: Any,
    sigma: Any,
    step: Any,
    least: Any,
    threshold: Any,
    weight: Any,
    reached: Any,
    mass: Any,
    counts: Any,
) -> None:
    for j in range(begin, stop):
        r = rays[j]
        through, total, done, far = np.float64(left[r]), np.float64(opacity[r]), np.float64(colored[r]), 0.0
        asked = 0
        for n in range(offsets[j], offsets[j + 1]):
            reached[n] = through >= least
            weight[n] = 0.0
            mass[n] = -1.0
            if reached[n]:
                a = alpha(sigma[n] * step)
                w = through * a
                before = total
                through *= 1.0 - a
                total += w
                far += w * t[index[n]]
                weight[n] = w
                ask = w > 0.0
                if threshold > 0.0:
                    ask = math.floor(total / threshold) > math.floor(before / threshold)
                if ask:
                    mass[n] = total - done
                    done = total
                    asked += 1
        left[r], opacity[r], colored[r] = through, total, done
        depth[r] += far
        counts[j + 1] = asked


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _pick(begin: int, stop: int, offsets: Any, mass: Any, picked: Any, pick: Any, stands: Any) -> None:
    for j in range(begin, stop):
        k = picked[j]
        for n in range(offsets[j], offsets[j + 1]):
            if mass[n] >= 0.0:
                pick[k] = n
                stands[k] = mass[n]
                k += 1


def take_numba(wave: Wave, rays: Tensor, ahead: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`pvdconvert.kernels.wavefront.take`."""
    counts = (wave.end[rays] - wave.cursor[rays]).clamp(max=ahead)
    offsets = torch.zeros(rays.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    n = int(offsets[-1])
    index, x = torch.empty(n, dtype=torch.int64), torch.empty((n, 3))
    arrays: list[Any] = [v.numpy() for v in (wave.o, wave.d, wave.t, wave.cursor, rays, offsets, index, x)]
    share(_take, len(rays), *arrays, grain=GRAIN)
    return offsets, index, x


def weigh_numba(
    wave: Wave, rays: Tensor, offsets: Tensor, index: Tensor, sigma: Tensor, step: float, stop: float, threshold: float
) -> Weighed:
    """See :func:`pvdconvert.kernels.wavefront.weigh`."""
    from pvdconvert.kernels.wavefront import Weighed

    n = index.shape[0]
    weight, mass, reached = torch.empty(n), torch.empty(n), torch.empty(n, dtype=torch.bool)
    picked = torch.zeros(rays.shape[0] + 1, dtype=torch.int64)
    state = (wave.t, wave.left, wave.opacity, wave.colored, wave.depth)
    given = (rays, offsets, index, sigma.detach().contiguous())
    arrays: list[Any] = [v.numpy() for v in (*state, *given)]
    out: list[Any] = [v.numpy() for v in (weight, reached, mass, picked)]
    share(_weigh, len(rays), *arrays, np.float32(step), stop, threshold, *out, grain=GRAIN)
    picked = picked.cumsum(0)
    pick, stands = torch.empty(int(picked[-1]), dtype=torch.int64), torch.empty(int(picked[-1]))
    given_back = [v.numpy() for v in (offsets, mass, picked, pick, stands)]
    share(_pick, len(rays), *given_back, grain=GRAIN)
    return Weighed(weight, reached, pick, stands, picked)
