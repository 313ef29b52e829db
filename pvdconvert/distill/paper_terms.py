"""Numbers and terms of the paper's method: what is compared, with what weight, at what rate (pvd.md 1.2, 1.3).

Everything that the reference schedules by the number of a step of its 30,000 is a function of *paper steps* here: the
share of the run that is done, times 30,000. A run of any length then keeps every proportion.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pvdconvert.distill import losses

STEPS = 30_000
"""Steps of the paper's run."""

FEATURES_END, VOLUME_END = 2_000, 5_000
"""Paper steps at which the feature stage and the volume stage end."""

FLOOR, CEILING = -2.0, 7.0
"""Range of the log-density that is compared and rendered; density per unit of a scene that fills the cube [-1, 1]^3."""

STEP = 2.0 * math.sqrt(3.0) / 1024
"""Distance between samples, in that unit."""

FEATURE, COLOR, SIGMA, PIXEL, FACTORS = 0.002, 0.002, 0.002, 1.0, 1e-4
"""Weights of the terms; the last is of the L1 norm of low-rank factors (``ArchitectureBase.factor_norm``)."""

FEATURE_DECAY = 0.995
"""The weight of features is multiplied by this at every paper step."""

GRID_RATE, NETWORK_RATE, LAST_RATE = 1e-2, 1e-3, 7e-5
"""Peak learning rates, and where their cosine ends."""

OWN_UNITS = 0.1
"""A plugin's rate above this says that its parameters have units of their own, such as densities that are not logs."""

BEYOND = 4.0
"""Feature channels are cut at this many standard deviations of the teacher's where it has matter."""

ROWS = 1 << 13
"""Rows that an adapter between features of unequal width is solved on."""


class Weights(NamedTuple):
    """Weight of each term of the loss; 0 = it is not even computed."""

    feature: float = 0.0
    color: float = 0.0
    sigma: float = 0.0
    pixel: float = 0.0
    factors: float = 0.0


def weights(tau: float, *, tapped: bool = True, joint: bool = False) -> Weights:
    """The weights at paper step ``tau``.

    tapped  both sides have features to compare; otherwise the volume stage begins at once
    joint   no stages: every term from the first step (PVD-AL)

    In the feature stage the term is alone and Adam does not see a constant: its weight is one. The reference's decays
    there as well: its square falls as fast as Adam's second moment forgets (0.995^2 = 0.99), which has no effect but
    that steps shrink, to 1 / 4.5 after 2,000.
    """
    if not joint and tapped and tau < FEATURES_END:
        return Weights(feature=FEATURE)
    feature = FEATURE * FEATURE_DECAY**tau if tapped else 0.0
    if not joint and tau < VOLUME_END:
        return Weights(feature, COLOR, SIGMA)
    return Weights(feature, COLOR, SIGMA, PIXEL, FACTORS)


def learning_rate(peak: float, progress: float) -> float:
    """Cosine from ``peak`` to 7e-5 at ``progress`` in [0, 1] of the run; in units of their own, by the same factor."""
    last = min(peak, LAST_RATE * max(1.0, peak / GRID_RATE))
    return last + (peak - last) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def groups(student: nn.Module, own: list[dict[str, Any]], rates: str) -> list[dict[str, Any]]:
    """The plugin's optimiser groups ``own`` with the paper's rates: 1e-3 for what belongs to linear layers, else 1e-2.

    No group gets more than its plugin would give it. ``rates`` "plugin": those of ``own``. None of the plugin's other
    wishes is granted: the method is plain Adam, whose momentum moves a row about ten times as far for each of its rare
    touches as a lazy one does. But a group in units of its own keeps its rate and its lazy rows, which belong together.
    """
    linear = {id(p) for m in student.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
    out = []
    for group in own:
        parameters = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        plugin = float(group["lr"])
        for rate, mine in ((NETWORK_RATE, True), (GRID_RATE, False)):
            part = [p for p in parameters if (id(p) in linear) is mine]
            kept = plugin if rates == "plugin" or plugin > OWN_UNITS else min(rate, plugin)
            if part:
                made = {"params": part, "lr": kept, "name": group.get("name", "")}
                out.append(made | ({"sparse_rows": group.get("sparse_rows", False)} if plugin > OWN_UNITS else {}))
    return out


def distance(a: Tensor, b: Tensor, kind: str, weight: Tensor | None = None) -> Tensor:
    """How far ``a`` [N, ...] is from ``b``; ``weight`` [N] counts rows more or less than once.

    "normL2", the paper's: the Frobenius norm of the difference, neither squared nor divided by the number of samples.
    "normL1": the sum of its absolute values. "L2", "L1": means of squares and of absolute values.
    """
    error = (a - b).reshape(len(a), -1)
    if weight is not None:
        error = error * (weight.sqrt() if kind.endswith("L2") else weight)[:, None]
    if not error.numel():
        return error.sum()
    if kind == "normL2":
        norm: Tensor = torch.linalg.vector_norm(error)
        return norm
    if kind == "L2":
        return error.square().mean()
    return error.abs().sum() if kind == "normL1" else error.abs().mean()


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, low, high)
        return torch.minimum(torch.maximum(x, low), high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, low, high = ctx.saved_tensors
        g = grads[0]
        # A step goes against the gradient: below the range only what leads up may pass, above it only what leads down.
        blocked = ((x < low) & (g > 0)) | ((x > high) & (g < 0))
        return g.masked_fill(blocked, 0.0), None, None


def cut(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """``clamp(x, low, high)`` that never traps: a value beyond the range keeps every gradient that leads back into it.

    The reference's clamp has none there, so that a voxel that leaves the range never comes back (pvd.md 1.3).
    """
    out: Tensor = _Cut.apply(x, torch.as_tensor(low).to(x), torch.as_tensor(high).to(x))  # type: ignore[no-untyped-call]
    return out


def log_density(sigma: Tensor, unit: float) -> Tensor:
    """The constrained log-density [N] of ``sigma`` [N], per world unit; ``unit``: the scene's unit in world units."""
    return cut(torch.log(sigma * unit + losses.TINY), FLOOR, CEILING)


class Tap:
    """How features of teacher and student are made comparable, from answers of the teacher where it has matter.

    Of equal width they are compared as they are, each channel cut to the teacher's range: the reference cuts the first,
    which is log-density there. Of unequal width (the reference asserts that they are not) the student's go through an
    affine map, solved in closed form at each step, onto the 15 strongest components of the teacher's.
    """

    WIDTH = 15

    def __init__(self, theirs: Tensor, width: int) -> None:
        """``theirs`` [N, F]: the teacher's at some points with matter; ``width``: of the student's."""
        self.mean = theirs.mean(0)
        self.basis: Tensor | None = None
        if theirs.shape[1] == width:
            spread = BEYOND * theirs.std(0, correction=0)
            self.low, self.high = self.mean - spread, self.mean + spread
        else:
            self.mean, self.basis, _ = losses.whitened(theirs, self.WIDTH)

    def pair(self, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's features [N, ...] as they are compared."""
        if self.basis is None:
            return cut(ours, self.low, self.high), theirs.clamp(self.low, self.high)
        targets = ((theirs - self.mean) @ self.basis).clamp(-BEYOND, BEYOND)
        with torch.no_grad():
            rows = slice(None, None, max(1, len(ours) // ROWS))
            a = losses.adapter(ours[rows], targets[rows])
        return ours @ a[:-1] + a[-1], targets
