"""Colour of a fresh ``tensorf`` in closed form: products that sum to logits, and a head that hands them on.

Masked least squares makes a part of the products sum to the teacher's logits where its surface was seen, channel by
channel. The hidden layers of the head stay random but for units that carry the three logits, and its last layer is a
ridge regression on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pvdconvert.kernels.planes import AXES, PAIRS
from pvdconvert.nn.head import carry, solve_last
from pvdconvert.nn.planes import resample_mode
from pvdconvert.solve.als import scatter, vm_als
from pvdconvert.solve.voxels import DC, EDGE
from pvdconvert_plugins.tensorf_field import TensorfField

if TYPE_CHECKING:
    from pvdconvert.distill.store import Store

SWEEPS = 3
PART = 6
"""A channel has a sixth of the products, the other half stays random. On lego, after 100 and 300 steps of colour from
there on: 28.5 and 31.0 dB; without projection 27.4 and 30.8; where all products are shared out 30.1, at a twelfth 31.0.
"""
RATE = 1e6
"""Vertices solved in a second and sweep on two plain cores, for a channel's share of the products."""
HEAD_SAMPLES = 1 << 16
LEAST = 0.02
"""Least slope of the sigmoid that a logit counts with."""


@torch.no_grad()
def project_color(field: TensorfField, store: Store, seconds: float) -> str | None:
    """Products, mixing matrix and head from the store's colours, in place, within about ``seconds`` (estimated, not
    measured: the same call gives the same field). One line of what was solved, or None where nothing could be."""
    o = field.options
    share = [rank // PART for rank in o.color_ranks]
    x, d, rgb, weight = store.colored_samples()
    x01 = field.unit(x)
    keep = ((x01 >= 0) & (x01 <= 1)).all(-1).nonzero().squeeze(1)
    if o.color_activation != "sigmoid" or min(share) < 1 or not len(keep):
        return None
    x, x01, d, weight = x[keep], x01[keep], d[keep], weight[keep]
    inner = rgb[keep].clamp(EDGE, 1 - EDGE)
    logit, slope = torch.logit(inner), (inner * (1 - inner)).clamp_min(LEAST)
    counts = weight[:, None] * slope.square()
    shape, vertices = _affordable(o.resolution, x01, seconds)
    factors: list[list[Tensor]] = [[], [], [], [], [], []]
    for channel in range(3):
        index, total, seen = scatter(x01, counts[:, channel] * logit[:, channel], shape)
        _, mean, _ = scatter(x01, counts[:, channel], shape)
        mean = mean.clamp_min(1e-12)
        generator = torch.Generator().manual_seed(channel)
        # No vertex may outweigh the ridge of all others.
        trust = (mean * seen / (mean * seen).mean()).clamp(max=8.0)
        fit = vm_als(index, total / mean, shape, share, sweeps=SWEEPS, weights=trust, generator=generator)
        for i, ((a, b), c) in enumerate(zip(PAIRS, AXES)):
            plane, line = resample_mode(fit.planes[i], fit.lines[i], *(o.resolution[k] for k in (a, b, c)))
            factors[i].append(plane)
            factors[3 + i].append(line)
    for i, rank in enumerate(o.color_ranks):
        spare = rank - 3 * share[i]  # of a rank that 3 does not divide: products of nothing, for later
        old_plane, old_line = field.color_grid.planes[i].data, field.color_grid.lines[i].data
        factors[i].append(old_plane[..., rank - spare :])
        factors[3 + i].append(old_line[..., rank - spare :])
    field.color_grid.assign([torch.cat(p, -1) for p in factors[:3]], [torch.cat(v, -1) for v in factors[3:]])
    _mix(field, share)
    how = f"colour by {SWEEPS} sweeps over {vertices} vertices of {'x'.join(str(v) for v in shape)}"
    if field.head is not None:
        carry(field.head)
        stride = -(-len(x) // HEAD_SAMPLES)
        part = slice(None, None, stride)
        hidden = field.hidden(x[part], d[part, None])
        solve_last(_last(field.head), hidden, logit[part], counts[part].mean(1))
        how += " and a last layer by ridge regression"
    error = (field.color(x, d[:, None])[:, 0] - inner).square().mean(1)
    rms = float(((error * weight).sum() / weight.sum()).sqrt())
    return f"{how}: rms {rms:.4f}"


def _affordable(resolution: tuple[int, ...], x01: Tensor, seconds: float) -> tuple[list[int], int]:
    """The finest grid over which three channels are fitted in time, and how many of its vertices are seen (about)."""
    for scale in (1.0, 0.8, 0.64, 0.5, 0.4, 0.32, 0.25):
        shape = [max(2, round(scale * v)) for v in resolution]
        last = torch.tensor(shape, device=x01.device) - 1
        i = (x01 * last).round().long()
        cells = len(torch.unique((i[:, 0] * shape[1] + i[:, 1]) * shape[2] + i[:, 2]))
        # Each vertex should be seen by a few samples, too.
        if 3 * SWEEPS * cells <= seconds * RATE and 2 * cells <= len(x01):
            break
    return shape, cells


def _mix(field: TensorfField, share: list[int]) -> None:
    """Rows of the mixing matrix that sum the products of each channel; the other rows stay random."""
    o = field.options
    matrix = field.basis.layers[0].get_parameter("weight").data
    step, scale = (o.bands**2, 1 / DC) if o.shading == "sh" else (1, 1.0)
    if o.shading == "sh":
        matrix.mul_(0.01)
    begin = 0
    for channel in range(3):
        matrix[channel * step] = 0.0
    for rank, part in zip(o.color_ranks, share):
        for channel in range(3):
            first = begin + channel * part
            matrix[channel * step, first : first + part] = scale
        begin += rank


def _last(head: nn.Module) -> nn.Linear:
    layer = list(head.layers)[-1]  # type: ignore[arg-type]
    assert isinstance(layer, nn.Linear)
    return layer
