"""What the numba twins share: threads, floating point, cells of an axis. Imported only when one of them runs."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import njit

FAST = {"contract", "reassoc", "nsz", "arcp"}
"""Sums may be reordered for vector units; NaN and infinities keep their meaning (they guard the indices)."""


def use_threads() -> int:
    """Let numba use as many threads as torch does; returns their number."""
    count = max(1, min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]
    numba.set_num_threads(count)
    return count


@njit(cache=True, fastmath=FAST, inline="always")
def cell(u: Any, n: Any) -> Any:
    """Lower vertex and fraction of ``u`` in [0, 1] on ``n`` vertices; anything outside (or NaN) is clamped."""
    pos = np.float32(0.0)
    if u > 0.0:
        pos = min(u, np.float32(1.0)) * np.float32(n - 1)
    i = max(min(np.int64(pos), n - 2), 0)
    return i, pos - np.float32(i)
