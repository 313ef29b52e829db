"""CUDA twin of :mod:`pvdconvert.kernels.occupancy` in Triton: atomic maxima, whose order does not matter."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pvdconvert.kernels.gpu import cdiv, launch

_BLOCK = 256


@triton.jit
def _update(peak, index, sigma, cells, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = tl.load(index + n, mask=n < count, other=-1)
    value = tl.load(sigma + n, mask=n < count, other=0.0)
    keep = (c >= 0) & (c < cells) & (value > 0.0)
    tl.atomic_max(peak + c, value, mask=keep, sem="relaxed")


def update(peak: Tensor, index: Tensor, sigma: Tensor, decay: float) -> None:
    """See :func:`pvdconvert.kernels.occupancy.occupancy_update`."""
    peak.mul_(decay)
    if len(index) and len(peak):
        arrays = (peak, index.contiguous(), sigma.contiguous())
        launch(_update, (cdiv(len(index), _BLOCK),), peak, *arrays, len(peak), len(index), BLOCK=_BLOCK)
