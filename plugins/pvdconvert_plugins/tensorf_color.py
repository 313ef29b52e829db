"""Colour of a fresh TensoRF in closed form: products that sum to logits, and a head that hands them on.

Masked least squares makes a part of the products sum to the teacher's logits where its surface was seen, channel by
channel. The hidden layers of the head stay random but for units that carry the three logits, and its last layer is a
ridge regression on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pvdconvert.nn.head import carry, solve_last
from pvdconvert.solve.als import scatter
from pvdconvert.solve.voxels import DC, EDGE
from pvdconvert_plugins.tensorf_field import TensorialField

if TYPE_CHECKING:
    from pvdconvert.distill.store import Store

PART = 6
"""A channel has a sixth of the products, the other half stays random. On lego, after 100 and 300 steps of colour from
there on: 28.5 and 31.0 dB; without projection 27.4 and 30.8; where all products are shared out 30.1, at a twelfth 31.0.
"""
HEAD_SAMPLES = 1 << 16
LEAST = 0.02
"""Least slope of the sigmoid that a logit counts with."""


Fit = Callable[[Tensor, Tensor, list[int], list[int], Tensor, torch.Generator], list[Tensor]]
"""(vertices [M, 3], values [M], grid, products a mode, weights [M], generator) -> factors on the student's own grid."""


@dataclasses.dataclass(frozen=True)
class Solver:
    """How a decomposition is fitted to one channel.

    ranks     products of each mode
    modes     to which mode each of the student's factors belongs, components last
    factors   those factors as they are; ``assign`` puts others in their place
    rate      vertices of one channel that are solved in a second, all sweeps together, on two plain cores
    """

    ranks: Sequence[int]
    modes: Sequence[int]
    factors: Sequence[Tensor]
    assign: Callable[[list[Tensor]], None]
    fit: Fit
    rate: float

    def shared(self) -> list[int]:
        """Products of each mode that a channel has."""
        return [rank // PART for rank in self.ranks]


@torch.no_grad()
def project_color(field: TensorialField, store: Store, seconds: float, solver: Solver) -> str | None:
    """Products, mixing matrix and head from the store's colours, in place, within about ``seconds`` (estimated, not
    measured: the same call gives the same field). One line of what was solved, or None where nothing could be."""
    o, share = field.options, solver.shared()
    x, d, rgb, weight = store.colored_samples()
    x01 = field.unit(x)
    keep = ((x01 >= 0) & (x01 <= 1)).all(-1).nonzero().squeeze(1)
    if o.color_activation != "sigmoid" or min(share) < 1 or o.color_features < 3 or not len(keep):
        return None
    x, x01, d, weight = x[keep], x01[keep], d[keep], weight[keep]
    inner = rgb[keep].clamp(EDGE, 1 - EDGE)
    logit, slope = torch.logit(inner), (inner * (1 - inner)).clamp_min(LEAST)
    counts = weight[:, None] * slope.square()
    shape, vertices = _affordable(o.resolution, x01, seconds * solver.rate)
    parts: list[list[Tensor]] = []
    index, means, seen = scatter(x01, torch.cat([counts * logit, counts], 1), shape)
    for channel in range(3):
        total, mean = means[:, channel], means[:, 3 + channel].clamp_min(1e-12)
        # No vertex may outweigh the ridge of all others.
        trust = (mean * seen / (mean * seen).mean()).clamp(max=8.0)
        generator = torch.Generator().manual_seed(channel)
        parts.append(solver.fit(index, total / mean, shape, share, trust, generator))
    own = [factor[..., 3 * share[mode] :] for factor, mode in zip(solver.factors, solver.modes)]
    solver.assign([torch.cat(factors, -1) for factors in zip(*parts, own)])
    _mix(field, solver.ranks, share)
    how = f"colour by masked least squares over {vertices} vertices of {'x'.join(str(v) for v in shape)}"
    part = slice(None, None, -(-len(x) // HEAD_SAMPLES))
    if field.head is not None and len(field.head.layers) > 1:
        carry(field.head)
        last = field.head.layers[-1]
        assert isinstance(last, nn.Linear)
        solve_last(last, field.hidden(x[part], d[part, None]), logit[part], counts[part].mean(1))
        how += " and a last layer by ridge regression"
    error = (field.color(x[part], d[part, None])[:, 0] - inner[part]).square().mean(1)
    rms = float(((error * weight[part]).sum() / weight[part].sum()).sqrt())
    return f"{how}: rms {rms:.4f}"


def _affordable(resolution: Sequence[int], x01: Tensor, most: float) -> tuple[list[int], int]:
    """The finest grid over which three channels of ``most`` vertices in all are fitted, and how many of its vertices
    are seen (about)."""
    for scale in (1.0, 0.8, 0.64, 0.5, 0.4, 0.32, 0.25):
        shape = [max(2, round(scale * v)) for v in resolution]
        last = torch.tensor(shape, device=x01.device) - 1
        i = (x01 * last).round().long()
        cells = len(torch.unique((i[:, 0] * shape[1] + i[:, 1]) * shape[2] + i[:, 2]))
        # Each vertex should be seen by a few samples, too.
        if 3 * cells <= most and 2 * cells <= len(x01):
            break
    return shape, cells


def _mix(field: TensorialField, ranks: Sequence[int], share: Sequence[int]) -> None:
    """Rows of the mixing matrix that sum the products of each channel; the other rows stay random."""
    o = field.options
    matrix = field.basis.layers[0].get_parameter("weight").data
    step, scale = (o.bands**2, 1 / DC) if o.shading == "sh" else (1, 1.0)
    if o.shading == "sh":
        matrix.mul_(0.01)
    begin = 0
    for channel in range(3):
        matrix[channel * step] = 0.0
    for rank, part in zip(ranks, share):
        for channel in range(3):
            first = begin + channel * part
            matrix[channel * step, first : first + part] = scale
        begin += rank
