"""CPU twin of :mod:`pvdconvert.kernels.occupancy`: every thread owns a range of cells and reads all answers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange
from torch import Tensor

from pvdconvert.kernels.cpu import use_threads


@njit(cache=True, parallel=True)
def _update(peak: Any, index: Any, sigma: Any, decay: Any, parts: int) -> None:
    count = peak.shape[0]
    chunk = (count + parts - 1) // parts
    for part in prange(parts):
        low, high = part * chunk, min(count, (part + 1) * chunk)
        for c in range(low, high):
            peak[c] *= decay
        for n in range(index.shape[0]):
            c = index[n]
            if c >= low and c < high and sigma[n] > peak[c]:
                peak[c] = sigma[n]


def update(peak: Tensor, index: Tensor, sigma: Tensor, decay: float) -> None:
    """See :func:`pvdconvert.kernels.occupancy.occupancy_update`; float32 on the CPU."""
    answers = sigma.contiguous().numpy()
    _update(peak.numpy(), index.contiguous().numpy(), answers, np.float32(decay), use_threads())
