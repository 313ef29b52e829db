"""Keeping track of how dense the cells of a grid were found to be (Mueller et al. 2022, appendix E.2)."""

from __future__ import annotations

from torch import Tensor

from pvdconvert.kernels.backend import twin
from pvdconvert.kernels.operators import define


def occupancy_update(peak: Tensor, index: Tensor, sigma: Tensor, decay: float = 1.0) -> None:
    """``peak`` [C] becomes ``max(peak * decay, the largest sigma found in the cell)``, in place.

    peak [C] >= 0; index [N] int64: the cell of each answer, in 0..C-1 (others are passed over); sigma [N] (below 0 or
    not a number counts as 0); decay in [0, 1]. With a decay of 1 this is a scatter of maxima.
    Raises ValueError where shapes or the decay do not fit.
    """
    if peak.ndim != 1 or index.shape != sigma.shape or index.ndim != 1:
        shapes = [list(t.shape) for t in (peak, index, sigma)]
        raise ValueError(f"peak [C], index [N] and sigma [N] expected, got {shapes}")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in 0..1, got {decay}")
    if not peak.is_contiguous():
        raise ValueError("peak must be contiguous: it is changed in place")
    _occupancy_update(peak, index.detach(), sigma.detach(), float(decay))


def occupancy_update_torch(peak: Tensor, index: Tensor, sigma: Tensor, decay: float) -> None:
    """The truth of :func:`occupancy_update`."""
    keep = (index >= 0) & (index < len(peak)) & (sigma > 0)
    peak.mul_(decay)
    peak.scatter_reduce_(0, index[keep], sigma[keep].to(peak.dtype), "amax")


def _run(peak: Tensor, index: Tensor, sigma: Tensor, decay: float) -> None:
    which = twin(peak, index, sigma)
    if which == "numba":
        from pvdconvert.kernels import occupancy_numba

        occupancy_numba.update(peak, index, sigma, decay)
    elif which == "triton":
        from pvdconvert.kernels import occupancy_triton

        occupancy_triton.update(peak, index, sigma, decay)
    else:
        occupancy_update_torch(peak, index, sigma, decay)


_occupancy_update = define(
    "occupancy_update(Tensor(a!) peak, Tensor index, Tensor sigma, float decay) -> ()", _run, lambda *_: None
)
