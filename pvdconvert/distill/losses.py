"""What is compared at each stage, in bounded and meaningful spaces (pvd.md 1.3, 6.5).

PVD clamps the raw log-density to [-2, 7] and compares it there: an entry that leaves the range has no gradient and
never comes back, and empty space is never empty. Here density is compared as opacity over a step (bounded by itself)
plus a Huber loss on the log of the optical thickness that is *one-sided* beyond the range: too empty and too opaque are
satisfied by anything beyond the limit, and whoever is on the wrong side of it always has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = math.log(2e-3)
"""Log of the optical thickness of a step below which a sample is empty."""

CEILING = math.log(7.0)
"""Log of the optical thickness of a step above which a sample is opaque."""

TINY = 1e-18
"""Keeps logs finite, and lets a student that is far too empty feel it: at 1e-12 it would be deaf from exp(-28) on. Not
less: a density of exactly 0 has the slope 1 / TINY, and Adam squares it in float32."""


def log_thickness_error(sigma: Tensor, target: Tensor, dt: Tensor) -> Tensor:
    """Difference of log optical thickness [N], one-sided at FLOOR and CEILING; never a dead zone on the wrong side."""
    ours = torch.log(sigma * dt + TINY)
    theirs = torch.log(target * dt + TINY)
    error = ours - theirs.clamp(FLOOR, CEILING)
    error = torch.where(theirs <= FLOOR, error.clamp_min(0.0), error)
    return torch.where(theirs >= CEILING, error.clamp_max(0.0), error)


def density_loss(sigma: Tensor, target: Tensor, dt: Tensor, *, log_weight: float = 0.05) -> Tensor:
    """Mean over N samples of (opacity difference)^2 + ``log_weight`` Huber(log thickness difference)."""
    opacity = torch.exp(-target * dt) - torch.exp(-sigma * dt)
    error = log_thickness_error(sigma, target, dt)
    return opacity.square().mean() + log_weight * F.huber_loss(error, torch.zeros_like(error))


def color_loss(rgb: Tensor, target: Tensor) -> Tensor:
    """Mean square difference of colours [N, 3] of samples that were drawn by their compositing weight."""
    return (rgb - target).square().mean()


def whitened(features: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Principal components of the teacher's tap: mean [F], basis [F, k], and unit-variance coordinates [N, k]."""
    mean = features.mean(0)
    centered = (features - mean).double()
    values, vectors = torch.linalg.eigh(centered.T @ centered / len(centered))
    order = torch.argsort(values, descending=True)[: min(width, features.shape[1])]
    order = order[values[order] > 1e-8 * values.max().clamp_min(1e-30)]
    basis = vectors[:, order] / values[order].sqrt()
    return mean, basis.to(features.dtype), (centered @ basis).to(features.dtype)


Mean = Callable[[Tensor], Tensor]
"""What a mean over this process's part of a batch becomes over the parts of all."""


def alone(own: Tensor) -> Tensor:
    """The :data:`Mean` of one process."""
    return own


def adapter(ours: Tensor, targets: Tensor, mean: Mean = alone, ridge: float = 1e-3) -> Tensor:
    """The affine map [F + 1, k] that carries ``ours`` [N, F] onto ``targets`` [N, k], by ridge regression."""
    a = torch.cat([ours, torch.ones_like(ours[:, :1])], 1).double()
    gram = mean(a.T @ a / len(a))
    gram += ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * gram.diagonal().mean()
    solution: Tensor = torch.linalg.solve(gram, mean(a.T @ targets.double() / len(a)))
    return solution.to(ours.dtype)


def too_large(features: Tensor, mean: Mean = alone) -> Tensor:
    """Zero while the mean square of ``features`` is below 1, then the square of its logarithm.

    An adapter that is solved on each batch takes any scale, so nothing else holds a student's units: within some 600
    steps those of a perceptron grew by five orders, and its density was dead before it was asked for.
    """
    return torch.log(mean(features.square().mean()) + TINY).clamp_min(0.0).square()
