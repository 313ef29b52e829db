"""The sample scene: an armillary sphere on a tiled plinth, as two functions. Ours, procedural, no files needed.

``density(x)`` and ``color(x, d)`` are all that ``pvdconvert.convert`` needs as a teacher. The scene lies inside of the
cube [-1, 1]^3, +z is up, the background is white and colours are sRGB. It is meant to be awkward: rings, wires and
balusters two to three hundredths thick, engraved ticks and tiles with soft edges, and a lacquered globe whose
highlights move with the viewer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BOX = ((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0))
BACKGROUND = (1.0, 1.0, 1.0)
SIGMA = 150.0
"""Density inside of solid matter, per world unit."""
SOFT = 0.008
"""Half the width of the shell in which density falls from SIGMA to exactly 0, world units."""

PARTS = ("plinth", "pedestal", "globe", "planets", "rings", "equator", "zodiac", "axis", "balusters", "stays")
THIN = ("rings", "equator", "zodiac", "axis", "balusters", "stays")
"""Parts less than four hundredths thick."""

_TOP, _BOTTOM = -0.74, -0.80
_GLOBE = 0.25
_RING, _ZODIAC, _RAIL = 0.60, 0.49, 0.615
_TILT = math.radians(23.4)
_PLANETS = ((0.6, 0.062), (2.5, 0.045), (4.3, 0.052))  # angle on the zodiac, radius
_LIGHTS = (((0.48, -0.62, 0.62), 0.55), ((-0.80, 0.10, 0.59), 0.35), ((0.25, 0.85, -0.46), 0.25))


# ---------------------------------------------------------------------------------------------- distances


def _band(h: Tensor, rho: Tensor, radius: float, radial: float, axial: float) -> Tensor:
    """Signed distance [N] to a ring of rectangular section: ``h`` along its axis, ``rho`` from it, half extents."""
    a, b = (rho - radius).abs() - radial, h.abs() - axial
    return torch.hypot(a.clamp(min=0), b.clamp(min=0)) + torch.maximum(a, b).clamp(max=0)


def _rod(rho: Tensor, z: Tensor, low: float, high: float, radius: float) -> Tensor:
    """Signed distance [N] to a vertical rod with flat ends; ``rho`` is the distance from its axis."""
    a, b = rho - radius, (z - (low + high) / 2).abs() - (high - low) / 2
    return torch.hypot(a.clamp(min=0), b.clamp(min=0)) + torch.maximum(a, b).clamp(max=0)


def _fold(x: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(radial, tangential) coordinates from the z axis in that of ``count`` sectors which holds the point."""
    angle, step = torch.atan2(y, x), 2 * math.pi / count
    local = torch.remainder(angle, step) - step / 2
    rho = torch.hypot(x, y)
    return rho * torch.cos(local), rho * torch.sin(local)


def _zodiac_frame(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates in the plane of the zodiac (tilted about y): two in the plane, one along its axis."""
    c, s = math.cos(_TILT), math.sin(_TILT)
    return c * x[:, 0] - s * x[:, 2], x[:, 1], s * x[:, 0] + c * x[:, 2]


def _planet_centers() -> list[tuple[float, float, float, float]]:
    c, s = math.cos(_TILT), math.sin(_TILT)
    out = []
    for angle, radius in _PLANETS:
        u, v = _ZODIAC * math.cos(angle), _ZODIAC * math.sin(angle)
        out.append((c * u, v, -s * u, radius))
    return out


def distances(x: Tensor) -> Tensor:
    """Signed distances [N, len(PARTS)] of ``x`` [N, 3] to every part, negative inside."""
    px, py, pz = x.unbind(-1)
    rho, r = torch.hypot(px, py), torch.linalg.vector_norm(x, dim=-1)
    u, v, w = _zodiac_frame(x)
    plinth = _rod(rho, pz, _BOTTOM, _TOP, 0.68)
    pedestal = torch.minimum(
        _rod(rho, pz, _TOP, -0.705, 0.15),
        torch.minimum(_rod(rho, pz, -0.71, -0.60, 0.034), torch.sqrt(rho**2 + (pz + 0.655) ** 2) - 0.055),
    )
    globe = r - _GLOBE
    planets = torch.stack(
        [torch.sqrt((px - a) ** 2 + (py - b) ** 2 + (pz - c) ** 2) - q for a, b, c, q in _planet_centers()]
    ).amin(0)
    tropic = 0.27
    rings = torch.stack(
        [
            _band(py, torch.hypot(px, pz), _RING, 0.015, 0.013),
            _band(px, torch.hypot(py, pz), _RING, 0.015, 0.013),
            _band(pz.abs() - tropic, rho, math.sqrt(_RING**2 - tropic**2), 0.012, 0.012),
        ]
    ).amin(0)
    equator = _band(pz, rho, _RING + 0.005, 0.012, 0.034)
    zodiac = _band(w, torch.hypot(u, v), _ZODIAC, 0.011, 0.048)
    axis = torch.minimum(_rod(rho, pz, -0.60, 0.68, 0.012), torch.sqrt(rho**2 + (pz - 0.68) ** 2) - 0.032)
    a, b = _fold(px, py, 72)
    balusters = torch.minimum(
        _rod(torch.hypot(a - _RAIL, b), pz, _TOP, -0.585, 0.008), _band(pz + 0.585, rho, _RAIL, 0.013, 0.011)
    )
    a, b = _fold(px, py, 4)
    stays = _rod(torch.hypot(a - _RING - 0.005, b), pz, _TOP, 0.0, 0.0115)
    return torch.stack([plinth, pedestal, globe, planets, rings, equator, zodiac, axis, balusters, stays], dim=-1)


def part(x: Tensor) -> Tensor:
    """Index [N] into PARTS of the part nearest to ``x`` [N, 3]."""
    return distances(x).argmin(-1)


def density(x: Tensor) -> Tensor:
    """Density [N] per world unit at ``x`` [N, 3]: SIGMA inside, exactly 0 further than SOFT outside of the surface."""
    t = ((SOFT - distances(x).amin(-1)) / (2 * SOFT)).clamp(0, 1)
    return SIGMA * t * t * (3 - 2 * t)


# ---------------------------------------------------------------------------------------------- colours


def _edge(value: Tensor, width: float) -> Tensor:
    """0 below zero, 1 above, soft over ``width`` (in the unit of ``value``)."""
    t = (value / width + 0.5).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _wave(phase: Tensor, width: float) -> Tensor:
    """Square wave in [0, 1] with period 1 and duty one half; edges soft over ``width`` of a period."""
    return _edge((torch.remainder(phase, 1.0) - 0.5).abs() - 0.25, width)


def _line(phase: Tensor, half: float, width: float) -> Tensor:
    """1 within ``half`` of a whole number, 0 elsewhere, edges soft over ``width``; all in periods."""
    return 1 - _edge((torch.remainder(phase + 0.5, 1.0) - 0.5).abs() - half, width)


def _mix(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return a + (b - a) * t[:, None]


def _rgb(x: Tensor, r: float, g: float, b: float) -> Tensor:
    return x.new_tensor((r, g, b)).expand(x.shape[0], 3)


def _lit(albedo: Tensor, normal: Tensor, strength: float = 0.45) -> Tensor:
    """A soft sky: brighter where the surface faces up and towards the key light. Does not depend on the viewer."""
    key = normal @ normal.new_tensor(_LIGHTS[0][0])
    return albedo * (1 - strength + strength * (0.55 + 0.3 * key + 0.15 * normal[:, 2]))[:, None]


def _gloss(normal: Tensor, d: Tensor, power: int, gain: float) -> Tensor:
    """Highlights [N] of the three lights for rays that travel along ``d`` [N, 3]: broad Phong lobes."""
    mirror = d - 2 * (d * normal).sum(-1, keepdim=True) * normal
    lobes = [k * (mirror @ d.new_tensor(light)).clamp(min=0) ** power for light, k in _LIGHTS]
    return gain * torch.stack(lobes).sum(0)


def _plinth(x: Tensor) -> Tensor:
    px, py, pz = x.unbind(-1)
    rho, angle = torch.hypot(px, py), torch.atan2(py, px)
    tile = 0.046
    checks = (_wave(px / (2 * tile) + 0.25, 0.14) - 0.5) * (_wave(py / (2 * tile) + 0.25, 0.14) - 0.5) * 2 + 0.5
    floor = _mix(_rgb(x, 0.93, 0.89, 0.80), _rgb(x, 0.13, 0.30, 0.33), checks)
    border = _mix(_rgb(x, 0.55, 0.12, 0.10), _rgb(x, 0.93, 0.80, 0.52), _wave(angle * (40 / math.pi), 0.14))
    top = _mix(floor, border, _edge(rho - 0.47, 0.01) * (1 - _edge(rho - 0.55, 0.01)))
    inlay = _edge(rho - 0.455, 0.008) * (1 - _edge(rho - 0.47, 0.008)) + _edge(rho - 0.55, 0.008)
    top = _mix(top, _rgb(x, 0.20, 0.13, 0.09), inlay)
    shade = 1 - 0.45 * torch.exp(-((px + 0.10) ** 2 + (py - 0.12) ** 2) / 0.075)
    under = _mix(_rgb(x, 0.30, 0.20, 0.14), _rgb(x, 0.62, 0.44, 0.27), _wave(rho / 0.07, 0.13))
    side = _edge(pz - (_TOP + _BOTTOM) / 2, 0.012)
    return _mix(under * 0.8, top * shade[:, None], side)


def _globe(x: Tensor, normal: Tensor) -> Tensor:
    nx, ny, nz = normal.unbind(-1)
    land = (
        torch.sin(3.1 * nx + 1.3 * ny + 0.4) * torch.cos(2.7 * ny - 1.9 * nz)
        + 0.6 * torch.sin(5.3 * nz + 2.1 * nx - 1.0) * torch.sin(4.7 * ny + 0.7)
        + 0.35 * torch.cos(8.9 * nx - 3.0 * nz) * torch.sin(7.7 * nz + 4.1 * ny)
    )
    sea = _mix(_rgb(x, 0.05, 0.20, 0.42), _rgb(x, 0.10, 0.42, 0.60), _edge(land + 0.28, 0.08))
    soil = _mix(_rgb(x, 0.82, 0.66, 0.34), _rgb(x, 0.30, 0.47, 0.20), _edge(land - 0.42, 0.10))
    base = _mix(sea, soil, _edge(land - 0.12, 0.05))
    base = _mix(base, _rgb(x, 0.95, 0.96, 0.97), _edge(nz.abs() - 0.93, 0.02))
    flat = torch.hypot(nx, ny)
    longitude = _line(torch.atan2(ny, nx) * (15 / math.pi), 0.12, 0.14) * _edge(flat - 0.3, 0.05)
    latitude = _line(torch.asin(nz.clamp(-1, 1)) * (15 / math.pi), 0.12, 0.14)
    lines = torch.maximum(longitude, latitude)
    return _mix(base, _rgb(x, 0.96, 0.84, 0.55), 0.85 * lines)


def color(x: Tensor, d: Tensor) -> Tensor:
    """Colour [N, 3], sRGB in [0, 1], of the part nearest to ``x`` [N, 3] for rays along unit ``d`` [N, 3]."""
    which = part(x)
    out = torch.zeros_like(x)
    for index, name in enumerate(PARTS):
        rows = (which == index).nonzero().squeeze(1)
        if rows.numel():
            out[rows] = _part_color(name, x[rows], d[rows]).clamp(0, 1)
    return out


def _part_color(name: str, x: Tensor, d: Tensor) -> Tensor:
    px, py, pz = x.unbind(-1)
    up = x.new_tensor((0.0, 0.0, 1.0)).expand_as(x)
    if name == "plinth":
        return _plinth(x) + 0.5 * _gloss(_mix(-up, up, (pz > -0.77).float()), d, 12, 0.25)[:, None]
    if name == "globe":
        normal = torch.nn.functional.normalize(x, dim=-1)
        return _lit(_globe(x, normal), normal, 0.6) + _gloss(normal, d, 10, 1.0)[:, None]
    if name == "planets":
        centers = x.new_tensor(_planet_centers())[:, :3]
        nearest = torch.cdist(x, centers).argmin(-1)
        normal = torch.nn.functional.normalize(x - centers[nearest], dim=-1)
        paint = x.new_tensor(((0.85, 0.30, 0.16), (0.90, 0.86, 0.78), (0.25, 0.52, 0.40)))[nearest]
        stripes = _wave(normal[:, 2] * 2.4 + 0.1, 0.2)[:, None]
        return _lit(paint * (0.62 + 0.38 * stripes), normal, 0.6) + _gloss(normal, d, 10, 0.8)[:, None]
    if name == "zodiac":
        u, v, w = _zodiac_frame(x)
        phase = torch.atan2(v, u) * (24 / math.pi)
        field = _mix(_rgb(x, 0.96, 0.92, 0.80), _rgb(x, 0.10, 0.16, 0.42), _wave(phase, 0.12))
        field = _mix(field, _rgb(x, 0.70, 0.16, 0.13), _edge(0.016 - w.abs(), 0.01))
        field = _mix(field, _rgb(x, 0.78, 0.58, 0.22), _edge(w.abs() - 0.036, 0.01))
        return _lit(field, torch.nn.functional.normalize(x, dim=-1), 0.4)
    if name == "pedestal":
        wood = _mix(_rgb(x, 0.36, 0.17, 0.10), _rgb(x, 0.80, 0.60, 0.26), _wave(pz / 0.05, 0.2))
        normal = torch.nn.functional.normalize(x * x.new_tensor((1.0, 1.0, 0.0)) + 0.02 * up, dim=-1)
        return _lit(wood, normal, 0.5) + _gloss(normal, d, 10, 0.3)[:, None]
    # Thin parts are shaded by where they are, not by their own round surface: one light a place, seen from all sides.
    # A mirror has no front, so the highlight that runs along a ring is right on its inside too.
    upright = name in ("balusters", "stays")
    normal = torch.nn.functional.normalize(x * x.new_tensor((1.0, 1.0, 0.0 if upright else 1.0)), dim=-1)
    if name == "equator":
        ticks = _line(torch.atan2(py, px) * (45 / math.pi), 0.22, 0.18) * _edge(0.012 - pz, 0.01)
        paint = _mix(_rgb(x, 0.90, 0.74, 0.40), _rgb(x, 0.18, 0.10, 0.06), ticks)
    else:
        metal = {"rings": (0.80, 0.58, 0.22), "axis": (0.34, 0.34, 0.38), "balusters": (0.30, 0.18, 0.12)}
        paint = _rgb(x, *metal.get(name, (0.62, 0.20, 0.14)))
    return _lit(paint, normal, 0.65) + _gloss(normal, d, 8, 0.6)[:, None] * _rgb(x, 1.0, 0.86, 0.62)
