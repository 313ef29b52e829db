"""LDR-FLIP: how visible a difference is to somebody who flips between two pictures.

Andersson, Nilsson, Akenine-Moeller, Oskarsson, Astroem, Fairchild: "FLIP: A Difference Evaluator for Alternating
Images", Proc. ACM Comput. Graph. Interact. Tech. 3 (2), 2020. Every filter of the paper is a product of two filters
along the axes, or a sum of two such products, and is applied so.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvdconvert.metrics.pictures import Picture, masked_mean, unit

PIXELS_PER_DEGREE = 0.7 * 3840 / 0.7 * math.pi / 180
"""67.02: a 4K screen 0.7 m wide, seen from 0.7 m (section 5)."""

_XYZ = np.array(  # linear sRGB -> CIE XYZ, D65
    [
        [10135552 / 24577794, 8788810 / 24577794, 4435075 / 24577794],
        [2613072 / 12288897, 8788810 / 12288897, 887015 / 12288897],
        [1425312 / 73733382, 8788810 / 73733382, 70074185 / 73733382],
    ]
)
_WHITE = _XYZ.sum(1)
_OPPONENT = np.array([[0.0, 116.0, 0.0], [500.0, -500.0, 0.0], [0.0, 200.0, -200.0]]) @ (_XYZ / _WHITE[:, None])
_FROM_OPPONENT = np.linalg.inv(_OPPONENT)
# Contrast sensitivity of Y, Cx, Cz: sums of Gaussians a * sqrt(pi / b) * exp(-pi^2 d^2 / b), d in degrees (table 1).
_SENSITIVITY = (((1.0, 0.0047),), ((1.0, 0.0053),), ((34.1, 0.04), (13.5, 0.025)))
_COLOR_POWER, _FEATURE_POWER = 0.7, 0.5
_KNEE, _KNEE_VALUE = 0.4, 0.95
_FEATURE_WIDTH = 0.082  # degrees from peak to trough of the detectors


def flip(
    reference: Picture,
    test: Picture,
    mask: NDArray[np.bool_] | None = None,
    *,
    pixels_per_degree: float = PIXELS_PER_DEGREE,
) -> float:
    """The mean of :func:`flip_map`: 0 for equal pictures, at most 1. ``mask`` [H, W] picks pixels."""
    return masked_mean(flip_map(reference, test, pixels_per_degree=pixels_per_degree), mask)


def flip_map(reference: Picture, test: Picture, *, pixels_per_degree: float = PIXELS_PER_DEGREE) -> NDArray[np.float64]:
    """LDR-FLIP [H, W] in [0, 1] of two sRGB pictures [H, W, 3] (bytes, or floats in [0, 1])."""
    pair = torch.from_numpy(np.stack([_opponent(unit(v)) for v in (reference, test)])).movedim(-1, 1)
    color = _color_difference(pair, pixels_per_degree)
    return np.asarray((color ** (1.0 - _feature_difference(pair[:, :1], pixels_per_degree))).numpy())


def _opponent(srgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """[H, W, 3] sRGB -> Y Cx Cz (without the offset -16 of Y, which no filter changes)."""
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((np.maximum(srgb, 0.04045) + 0.055) / 1.055) ** 2.4)
    return np.asarray(linear @ _OPPONENT.T)


def _color_difference(pair: Tensor, density: float) -> Tensor:
    """[H, W]: filtered by contrast sensitivity, Hunt-adjusted, HyAB, redistributed to [0, 1] (section 4.1)."""
    widest = max(b for terms in _SENSITIVITY for _, b in terms)
    x = _taps(math.ceil(3 * math.sqrt(widest / (2 * math.pi**2)) * density)) / density
    channels = []
    for k, terms in enumerate(_SENSITIVITY):
        kernels = [torch.exp(-(math.pi**2) * x * x / b) for _, b in terms]
        shares = [a * math.sqrt(math.pi / b) * float(g.sum()) ** 2 for (a, b), g in zip(terms, kernels)]
        parts = (_filter(pair[:, k : k + 1], g / g.sum(), g / g.sum()) * w for w, g in zip(shares, kernels))
        channels.append(sum(parts, torch.zeros_like(pair[:, :1])) / sum(shares))
    linear = torch.cat(channels, 1).movedim(1, -1) @ torch.from_numpy(_FROM_OPPONENT.T)
    first, second = _hunt_lab(linear.clamp(0.0, 1.0))
    corners = _hunt_lab(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64))
    largest = float(_hyab(corners[0], corners[1])) ** _COLOR_POWER
    distance, knee = torch.pow(_hyab(first, second), _COLOR_POWER), _KNEE * largest
    high = _KNEE_VALUE + (distance - knee) / (largest - knee) * (1.0 - _KNEE_VALUE)
    return torch.where(distance < knee, distance * (_KNEE_VALUE / knee), high)


def _hunt_lab(linear: Tensor) -> Tensor:
    """[..., 3] linear RGB -> L*a*b* with chroma scaled by L*/100."""
    t = linear @ torch.from_numpy((_XYZ / _WHITE[:, None]).T)
    delta = 6 / 29
    x, y, z = torch.where(t > delta**3, t.clamp_min(delta**3) ** (1 / 3), t / (3 * delta**2) + 4 / 29).unbind(-1)
    lightness = 116 * y - 16
    return torch.stack([lightness, 5 * lightness * (x - y), 2 * lightness * (y - z)], -1)


def _hyab(a: Tensor, b: Tensor) -> Tensor:
    """City-block distance in lightness plus Euclidean distance in chroma."""
    lightness, chroma = (a[..., 0] - b[..., 0]).abs(), a[..., 1:] - b[..., 1:]
    return lightness + torch.hypot(chroma[..., 0], chroma[..., 1])


def _feature_difference(pair: Tensor, density: float) -> Tensor:
    """[H, W] in [0, 1] of Y [2, 1, H, W]: what is an edge or a point in one picture only (section 4.2)."""
    y = pair / 116.0
    deviation = 0.5 * _FEATURE_WIDTH * density
    x = _taps(math.ceil(3 * deviation))
    g = torch.exp(-0.5 * (x / deviation) ** 2)
    strongest = torch.zeros_like(y[0, 0])
    for detector in (-x * g, ((x / deviation) ** 2 - 1) * g):
        up, down = detector.clamp_min(0.0), detector.clamp_max(0.0)
        detector = up / up.sum() - down / down.sum()
        along, across = _filter(y, detector, g / g.sum()), _filter(y, g / g.sum(), detector)
        size = torch.hypot(along, across)[:, 0]
        strongest = torch.maximum(strongest, (size[0] - size[1]).abs())
    return torch.pow(strongest / math.sqrt(2.0), _FEATURE_POWER)


def _taps(radius: int) -> Tensor:
    return torch.arange(-radius, radius + 1, dtype=torch.float64)


def _filter(v: Tensor, along: Tensor, across: Tensor) -> Tensor:
    """[N, 1, H, W] correlated with ``along`` the rows and ``across`` them; the border is repeated outwards."""
    radius = len(along) // 2
    v = torch.nn.functional.pad(v, (radius, radius, 0, 0), mode="replicate")
    v = torch.nn.functional.conv2d(v, along[None, None, None, :])
    v = torch.nn.functional.pad(v, (0, 0, radius, radius), mode="replicate")
    return torch.nn.functional.conv2d(v, across[None, None, :, None])
