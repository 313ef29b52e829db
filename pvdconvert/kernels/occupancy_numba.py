"""CPU twin of :mod:`pvdconvert.kernels.occupancy`: every thread owns a range of cells and reads all answers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from pvdconvert.kernels.cpu import share


@njit(cache=True, nogil=True)
def _update(begin: int, stop: int, peak: Any, index: Any, sigma: Any, decay: Any) -> None:
    for c in range(begin, stop):
        peak[c] *= decay
    for n in range(index.shape[0]):
        c = index[n]
        if c >= begin and c < stop and sigma[n] > peak[c]:
            peak[c] = sigma[n]


def update(peak: Tensor, index: Tensor, sigma: Tensor, decay: float) -> None:
    """See :func:`pvdconvert.kernels.occupancy.occupancy_update`; float32 on the CPU."""
    answers = sigma.contiguous().numpy()
    share(_update, len(peak), peak.numpy(), index.contiguous().numpy(), answers, np.float32(decay), grain=4096)
